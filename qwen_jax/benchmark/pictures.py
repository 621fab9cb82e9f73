"""Measurements as pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from qwen_jax.benchmark.dispatch import DispatchRow
from qwen_jax.benchmark.report import Row

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


def draw_speeds(rows: Sequence[Row], path: Path) -> None:
    """Ratios to each peer and shares of the machine's limit, with what is aimed at, as a PNG."""
    figure = Figure(figsize=(11, 1.2 + 0.5 * len(rows)), layout="constrained")
    ratio_axes, share_axes = figure.subplots(1, 2, sharey=True)
    places = list(range(len(rows)))[::-1]
    ours, *peers = dict.fromkeys(name for row in rows for name in row.values)
    height = 0.8 / max(len(peers), 1)
    for i, peer in enumerate(peers):
        own = [(y, row) for y, row in zip(places, rows, strict=True) if peer in row.values]
        ratio_axes.barh(
            [y + (i - (len(peers) - 1) / 2) * height for y, _ in own],
            [row.ratio(peer) for _, row in own],
            height,
            label=f"{ours} to {peer}",
        )
    bounded = [(y, row.share) for y, row in zip(places, rows, strict=True) if row.share is not None]
    share_axes.barh([y for y, _ in bounded], [100 * share for _, share in bounded], 0.8)
    for axes, name, scale in ((ratio_axes, "aim_ratio", 1), (share_axes, "aim_share", 100)):
        aims = [(y, getattr(row, name)) for y, row in zip(places, rows, strict=True)]
        for y, aim in aims:
            if aim is not None:
                axes.plot([scale * aim] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
        axes.grid(axis="x", alpha=0.3)
    ratio_axes.axvline(1, color="grey", linewidth=1)
    if any(row.aim_ratio or row.aim_share for row in rows):
        ratio_axes.plot([], [], color="black", linewidth=2, label="aim")
    ratio_axes.set(yticks=places, yticklabels=[row.what for row in rows], xlabel="times as good")
    share_axes.set(xlabel="% of the machine's limit")
    figure.legend(loc="outside lower center", ncols=len(peers) + 1, fontsize="small")
    figure.savefig(path, dpi=120)
