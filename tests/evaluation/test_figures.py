"""Intervals against scipy, and that a log of results survives what happens to it."""

import csv
import json

import pytest
from scipy.stats import binomtest

from qwen_jax.errors import UserError
from qwen_jax.evaluation import figures
from qwen_jax.evaluation.figures import LOG, TABLE, Figure, add_to_log, check_workdir, share


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (3, 7), (950, 1000), (1, 1)])
def test_intervals_are_wilson_s(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    figure = share("problems", "add", "right", right, count)
    assert (figure.low, figure.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert figure.value == right / count
    assert figures.wilson_interval(0, 0) == (0, 1)


def test_runs_add_up_in_both_files(tmp_path):
    first = [Figure("text", "a, b.txt", "perplexity", float("inf"), count=3)]
    add_to_log(tmp_path, first, {"model": "m", "seed": 0, "flags": {"x": 1}})
    add_to_log(tmp_path, [share("problems", "加", "right", 1, 2)], {"model": "n", "seed": 1})
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [(row["name"], row["model"], row["value"]) for row in rows] == [
        ("a, b.txt", "m", "inf"),
        ("加", "n", 0.5),
    ]
    assert rows[0]["flags"] == {"x": 1}
    with (tmp_path / TABLE).open() as file:
        table = list(csv.DictReader(file))
    assert [(row["name"], row["model"], row["seed"]) for row in table] == [
        ("a, b.txt", "m", "0"),
        ("加", "n", "1"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [TABLE, LOG]


def test_a_log_that_is_none_is_named_and_left(tmp_path):
    (tmp_path / LOG).write_text('{"a": 1}\nx\n')
    with pytest.raises(UserError, match=f"^{tmp_path / LOG}:2: is not JSON; give another"):
        check_workdir(tmp_path)
    assert (tmp_path / LOG).read_text() == '{"a": 1}\nx\n'
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^{tmp_path / 'file'}: cannot be written"):
        check_workdir(tmp_path / "file")
