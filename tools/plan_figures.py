"""The figures of plans as JSON and as a picture, for the commands that make plans."""

import dataclasses
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from qwen_jax.sharding.plan import Plan

# Drawn into files, on machines without a screen.
matplotlib.use("agg")


def as_json(plan: Plan) -> dict[str, object]:
    """All figures of a plan, those that follow from others included."""
    return {
        **dataclasses.asdict(plan),
        "analytic_flops": sum(plan.flops_by_part.values()),
        "step_seconds": plan.step_seconds,
        "bound": plan.bound,
    }


def draw_memory(bars: list[tuple[str, dict[str, int], int]], title: str, path: Path) -> None:
    """A bar for each name, bytes by part and bytes of a chip, as a PNG."""
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    names = [name for name, _, _ in bars]
    left = [0.0] * len(bars)
    for part in dict.fromkeys(part for _, memory, _ in bars for part in memory):
        widths = [100 * memory.get(part, 0) / available for _, memory, available in bars]
        axes.barh(names, widths, left=left, label=part)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.axvline(100, color="black", linestyle="--")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set(xlabel="% of a chip's memory", title=title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
