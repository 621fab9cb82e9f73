"""Figures of several runs by step, as a picture: their mean, their range, and each of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.training.report import LOG, read_log

REWARD_CURVE = "reward.png"


def read_curve(workdir: Path, metric: str) -> dict[int, float]:
    """A figure of a run by step, from `WORKDIR/metrics.jsonl`.

    Raises:
      UserError: the run has no log, or none of that figure; tells those that there are.
    """
    rows = read_log(workdir)
    if not rows:
        raise UserError(f"{workdir / LOG}: is not there or empty; name the workdir of a run")
    found = {row["step"]: row[metric] for row in rows if isinstance(row.get(metric), float | int)}
    if not found:
        names = sorted({name for row in rows for name in row} - {"step"})
        raise UserError(f"{workdir / LOG}: has no {metric}; it has {', '.join(names)}")
    return found


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of up to `window` values around each, fewer at both ends: [runs, points]."""
    left = (window - 1) // 2
    right = window - 1 - left
    count = values.shape[-1]
    return np.stack(
        [values[:, max(0, i - left) : i + right + 1].mean(axis=-1) for i in range(count)], axis=-1
    )


def draw_runs(workdirs: Sequence[Path], metric: str, path: Path, smooth: int = 1) -> str:
    """Draws a figure of runs that differ in their seed, as a PNG, at the steps that all have.

    Args:
      workdirs: of the runs.
      metric: as `metrics.jsonl` calls it.
      path: of the picture.
      smooth: points that each shown is the mean of.

    Returns:
      The mean and the range over runs of the first and the last tenth of the points, in a line.

    Raises:
      UserError: there is no run, one has no such figure, they have no step in common, or the
        picture cannot be written.
    """
    from matplotlib.figure import Figure

    if not workdirs:
        raise UserError("no run is named; give the workdir of one at least")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a file for the picture")
    curves = [read_curve(workdir, metric) for workdir in workdirs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        raise UserError(f"{metric}: the runs have no step in common; give runs of one recipe")
    values = np.array([[curve[step] for step in steps] for curve in curves])
    shown = smoothed(values, smooth)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if len(curves) > 1:
        axes.fill_between(
            steps, shown.min(axis=0), shown.max(axis=0), alpha=0.2, label="lowest to highest"
        )
        for workdir, line in zip(workdirs, shown, strict=True):
            axes.plot(steps, line, linewidth=0.6, alpha=0.7, label=workdir.name)
    label = f"mean of {len(curves)} runs" if len(curves) > 1 else workdirs[0].name
    axes.plot(steps, shown.mean(axis=0), linewidth=1.8, color="black", label=label)
    of_points = f", each point the mean of {smooth} around it" if smooth > 1 else ""
    axes.set(xlabel="step", ylabel=f"{metric}{of_points}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    tenth = max(1, len(steps) // 10)
    ends = [values[:, :tenth].mean(axis=1), values[:, -tenth:].mean(axis=1)]
    parts = [f"{e.mean():.3g} ({e.min():.3g} to {e.max():.3g})" for e in ends]
    return (
        f"{metric}, mean and range of {len(curves)} runs: {parts[0]} in the first {tenth} of "
        f"{len(steps)} points, {parts[1]} in the last {tenth}"
    )
