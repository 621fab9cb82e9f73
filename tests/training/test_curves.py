"""Curves of several runs: what is drawn, what is said, and what is refused."""

import json

import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.training.curves import draw_runs, read_curve, smoothed


def write_run(directory, rewards, first=1):
    directory.mkdir()
    rows = [{"step": first + i, "reward": r, "loss": "nan"} for i, r in enumerate(rewards)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)
    return directory


def test_the_mean_and_the_range_over_runs_at_common_steps_are_told(tmp_path):
    runs = [
        write_run(tmp_path / "a", [0.0, 0.2, 0.4, 0.6]),
        write_run(tmp_path / "b", [0.4, 0.6, 0.9], first=2),
    ]
    told = draw_runs(runs, "reward", tmp_path / "c.png", smooth=3)
    assert told == (
        "reward, mean and range of 2 runs: 0.3 (0.2 to 0.4) in the first 1 of 3 points, "
        "0.75 (0.6 to 0.9) in the last 1"
    )
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"
    assert not list(tmp_path.glob("*.tmp"))


def test_smoothing_is_the_mean_of_what_is_there():
    values = np.array([[0.0, 3.0, 6.0, 0.0]])
    np.testing.assert_allclose(smoothed(values, 3), [[1.5, 3.0, 3.0, 3.0]])
    np.testing.assert_array_equal(smoothed(values, 1), values)


def test_a_run_without_the_figure_is_refused_with_those_that_it_has(tmp_path):
    run = write_run(tmp_path / "a", [0.0])
    with pytest.raises(UserError, match="has no eval_reward; it has loss, reward"):
        read_curve(run, "eval_reward")
    with pytest.raises(UserError, match="is not there or empty"):
        read_curve(tmp_path, "reward")
    other = write_run(tmp_path / "b", [0.0], first=9)
    with pytest.raises(UserError, match="the runs have no step in common"):
        draw_runs([run, other], "reward", tmp_path / "c.png")
