"""The base-versus-length bound: by brute force, against the paper, and as a command."""

import csv
import json
import math

import pytest

from experiments.long_context.base_bound import PUBLISHED, PUBLISHED_POWER, bounds, exponent, reach
from tests.experiments.conftest import run


@pytest.mark.parametrize(("theta", "dim"), [(100.0, 8), (1e3, 64), (500.0, 128)])
def test_a_base_reaches_to_the_first_negative_sum(theta, dim):
    def total(m):
        return sum(math.cos(m * theta ** (-2 * i / dim)) for i in range(dim // 2))

    first = next(m for m in range(100_000) if total(m) < 0)
    assert reach(theta, dim, 100_000) == first
    assert reach(theta, dim, first - 1) == first - 1


def test_the_smallest_base_is_not_the_one_from_which_all_reach():
    found = bounds(128, [10, 20, 50], [1e2, 1e3, 1e4, 1e5], [10, 25, 5, 40])
    assert [(bound.first, bound.safe) for bound in found] == [(1e2, 1e5), (1e3, 1e5), (None, None)]
    assert {bound.published for bound in found} == {None}


def test_bases_are_the_paper_s_within_a_factor_of_two():
    """The sum is not monotone in the base, so that grids of bases find neighbouring ones."""
    lengths = [n for n in PUBLISHED if n <= 8192]
    bases = [10 ** (3 + i / 20) for i in range(61)]
    found = bounds(128, lengths, bases, [reach(base, 128, 8192) for base in bases])
    for bound in found:
        assert bound.published == PUBLISHED[bound.length]
        assert 0.5 < bound.first / bound.published < 2
    assert 0.8 < exponent(found) / PUBLISHED_POWER < 1.2
    assert exponent(found[:1]) is None


def test_the_command_writes_figures_tables_and_a_picture(tmp_path):
    done = run(
        "--study=base_bound", f"--workdir={tmp_path}", "--lengths=256,1024", "--per_decade=4"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "base_bound.md").read_text() == done.stdout
    assert (tmp_path / "base_bound.png").stat().st_size > 5000
    records = [json.loads(line) for line in (tmp_path / "base_bound.jsonl").open()]
    with (tmp_path / "base_bound.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["head_dim"], r["length"]) for r in records] == [
        (dim, length) for dim in (64, 128) for length in (256, 1024)
    ]
    assert [float(row["first"]) for row in rows] == [r["first"] for r in records]
    assert records[0]["flags"]["per_decade"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head_dims=7"], "--head_dims=7 should be even"),
        (["--lengths=none"], "--lengths: 'none' should be a number of tokens"),
    ],
)
def test_bad_flags_are_one_line(arguments, words, tmp_path):
    done = run("--study=base_bound", f"--workdir={tmp_path / 'new'}", *arguments)
    assert done.returncode == 1 and words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()
