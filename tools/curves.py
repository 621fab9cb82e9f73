"""Draws a figure of one or several runs by step: mean, range and each run.

    python -m tools.curves --runs=runs/a,runs/b,runs/c --metric=reward --output=reward.png

RUNS are workdirs of tools.train; METRIC is a name in their metrics.jsonl. Prints the mean and range
over runs at the beginning and the end.
"""

from pathlib import Path

from absl import flags

from qwen_jax.training.curves import draw_runs
from tools import command_line

_RUNS = flags.DEFINE_list("runs", None, "Workdirs of the runs, by commas.", required=True)
_METRIC = flags.DEFINE_string("metric", "reward", "What is drawn.")
_OUTPUT = flags.DEFINE_string("output", None, "The picture, a PNG.", required=True)
_SMOOTH = flags.DEFINE_integer(
    "smooth", 1, "Points that each shown is the mean of; 1 for no smoothing.", lower_bound=1
)


def main() -> None:
    """Draws it."""
    output = command_line.path(_OUTPUT)
    runs = [Path(run).expanduser() for run in _RUNS.value]
    print(draw_runs(runs, _METRIC.value, output, _SMOOTH.value))
    print(f"written: {output}")


if __name__ == "__main__":
    command_line.run(main)
