"""Measurements as pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from qwen_jax.benchmark.dispatch import DispatchRow

# Drawn into files, on machines without a screen.
matplotlib.use("agg")


def draw_dispatch(rows: Sequence[DispatchRow], title: str, path: Path) -> None:
    """Seconds and temporary bytes of each method against the number of tokens, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method is method]
        timed = [row for row in own if row.median is not None]
        counts = [row.num_tokens for row in timed]
        spread = [
            [row.median - min(row.seconds) for row in timed],
            [max(row.seconds) - row.median for row in timed],
        ]
        medians = [row.median for row in timed]
        time_axes.errorbar(counts, medians, spread, marker="o", capsize=3, label=method.value)
        memory_axes.plot(
            [row.num_tokens for row in own],
            [max(row.temporaries, 1) / 1e6 for row in own],
            marker="o",
            label=method.value,
        )
    time_axes.set(ylabel="seconds (median, lowest to highest)")
    memory_axes.set(ylabel="temporaries, MB")
    for axes in (time_axes, memory_axes):
        axes.set(xlabel="tokens", xscale="log", yscale="log")
        axes.grid(True, which="major", alpha=0.3)
    time_axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
