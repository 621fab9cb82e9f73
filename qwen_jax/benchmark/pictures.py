"""Measurements as pictures."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_jax.benchmark.dispatch import DispatchRow
from qwen_jax.benchmark.growth import (
    DECODE_COMPILED,
    MIXED,
    MOST_OF_CAPACITY,
    MOST_OF_LAYERS,
    MOST_OF_MIXING,
    PADDED,
    SLOTS,
    TRAIN_COMPILED,
    UNIFORM,
    Point,
)
from qwen_jax.benchmark.profile import Profile, parts_in
from qwen_jax.benchmark.report import Row
from qwen_jax.benchmark.throughput import WAYS, Pass

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> "Figure":
    """An empty one of these inches."""
    import matplotlib
    from matplotlib.figure import Figure

    # Drawn into files, on machines without a screen.
    matplotlib.use("agg")
    return Figure(figsize=(width, height), layout="constrained")


def _spreads(
    values: Sequence[Sequence[float]], scale: float = 1.0
) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Of each of some, times `scale`: the median, and how far it is to the lowest and highest."""
    medians = [scale * statistics.median(own) for own in values]
    below = [m - scale * min(own) for m, own in zip(medians, values, strict=True)]
    above = [scale * max(own) - m for m, own in zip(medians, values, strict=True)]
    return medians, (below, above)


def draw_dispatch(rows: Sequence[DispatchRow], title: str, path: Path) -> None:
    """Seconds and temporary bytes of each method against the number of tokens, as a PNG."""
    figure = _figure(10, 4)
    time_axes, memory_axes = figure.subplots(1, 2)
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method is method]
        timed = [row for row in own if row.median is not None]
        counts = [row.num_tokens for row in timed]
        medians, spread = _spreads([row.seconds for row in timed])
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
    figure = _figure(11, 1.2 + 0.5 * len(rows))
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


def draw_throughput(groups: Sequence[Sequence[Pass]], path: Path) -> None:
    """Tokens a second by the number of rows and the way, axes for each group of texts, as a PNG.

    Bars are medians; lines from the lowest to the highest are of the sizes that were repeated.
    """
    from matplotlib.patches import Patch

    figure = _figure(6 * len(groups), 4.5)
    for axes, passes in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        sizes = sorted({p.size for p in passes})
        width = 0.8 / len(WAYS)
        for i, way in enumerate(WAYS):
            for place, size in enumerate(sizes):
                own = [p for p in passes if (p.way, p.size) == (way, size)]
                if not own:
                    continue
                middle, spread = _spreads([[p.rate for p in own]])
                x = place + (i - (len(WAYS) - 1) / 2) * width
                axes.bar(x, middle, width, yerr=spread, capsize=2, color=f"C{i}")
        axes.set(
            title=passes[0].what,
            xticks=range(len(sizes)),
            xticklabels=sizes,
            xlabel="rows at once",
            ylabel="new tokens a second",
        )
        axes.grid(axis="y", alpha=0.3)
    colours = [Patch(color=f"C{i}") for i in range(len(WAYS))]
    figure.legend(colours, WAYS, loc="outside lower center", ncols=len(WAYS), fontsize="small")
    figure.savefig(path, dpi=120)


# A panel's size in inches: three stand side by side on a page.
_PANEL = (3.1, 2.7)
_AIM = {"color": "black", "linestyle": "--", "linewidth": 1}
_COLORS = {UNIFORM: "C0", MIXED: "C1", DECODE_COMPILED: "C2", TRAIN_COMPILED: "C3"}


def draw_growth(points: Sequence[Point], title: str, path: Path) -> None:
    """A panel for each of the five figures, aims as dashed lines, as a PNG."""
    figure = _figure(3 * _PANEL[0], 2 * _PANEL[1])
    (by_capacity, by_tokens, memory), (mixing, compiling, key) = figure.subplots(2, 3)
    panels = (by_capacity, by_tokens, memory, mixing, compiling)
    own = {
        name: [p for p in points if p.figure == name]
        for name in ("capacity", "filled", "prefill memory", "mixed lengths", "compiling")
    }
    _draw_decoding(by_capacity, own["capacity"])
    by_capacity.axhline(1e3 * MOST_OF_CAPACITY * own["capacity"][0].median, **_AIM)
    slots = f"(a) {own['capacity'][0].series} in the cache"
    by_capacity.set(title=slots, xlabel="slots of the cache")
    _draw_decoding(by_tokens, own["filled"])
    tokens = f"(b) a cache of {own['filled'][0].series}"
    by_tokens.set(title=tokens, xlabel="tokens in the cache")
    _draw_memory(memory, own["prefill memory"])
    _draw_mixing(mixing, own["mixed lengths"])
    _draw_compiling(compiling, own["compiling"])
    for axes in panels:
        axes.grid(True, which="major", alpha=0.3)
    for name, label in (
        (UNIFORM, "(d) equal lengths"),
        (MIXED, "(d) mixed lengths"),
        (DECODE_COMPILED, f"(e) {DECODE_COMPILED}"),
        (TRAIN_COMPILED, f"(e) {TRAIN_COMPILED}"),
    ):
        key.plot([], [], color=_COLORS[name], label=label, linewidth=4)
    key.plot([], [], label="aim: at most this, in (c) no steeper", **_AIM)
    key.legend(loc="center", fontsize="small", frameon=False)
    key.set_axis_off()
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=200)


def _draw_decoding(axes: "Axes", points: Sequence[Point]) -> None:
    _draw_curve(axes, points, 1e3)
    axes.set(ylabel="decode step, ms", xscale="log", ylim=(0, None))
    _tick_tokens(axes, points)


def _draw_memory(axes: "Axes", points: Sequence[Point]) -> None:
    _draw_curve(axes, points, 1e-6)
    last = points[-1]
    axes.plot([p.x for p in points], [1e-6 * last.median * p.x / last.x for p in points], **_AIM)
    axes.set(title="(c) prefill", xlabel="tokens of the prompt", ylabel="temporaries, MB")
    axes.set(xscale="log", yscale="log")
    _tick_tokens(axes, points)


def _draw_mixing(axes: "Axes", points: Sequence[Point]) -> None:
    for place, series in enumerate((PADDED, SLOTS)):
        for p in points:
            if p.series == series:
                x, color = place + (0.2 if p.x == MIXED else -0.2), _COLORS[p.x]
                middle, spread = _spreads([p.values], 1e3)
                axes.bar(x, middle, 0.4, yerr=spread, capsize=2, color=color)
                if (p.series, p.x) == (SLOTS, UNIFORM):
                    axes.plot([0.6, 1.4], [1e3 * MOST_OF_MIXING * p.median] * 2, **_AIM)
    axes.set(title="(d) a batch", ylabel="ms a token", xticks=(0, 1), xticklabels=(PADDED, SLOTS))


def _draw_compiling(axes: "Axes", points: Sequence[Point]) -> None:
    for series in (DECODE_COMPILED, TRAIN_COMPILED):
        own = [p for p in points if p.series == series]
        _draw_curve(axes, own, 1, color=_COLORS[series])
    # Of the train step, which was drawn last.
    axes.axhline(MOST_OF_LAYERS * own[0].median, **_AIM)
    axes.set(title="(e) compiling", xlabel="layers", ylabel="seconds", ylim=(0, None))
    axes.set_xticks([p.x for p in own])


def _draw_curve(axes: "Axes", points: Sequence[Point], scale: float, **style: str) -> None:
    """Medians with the lowest and the highest, times `scale`."""
    medians, spread = _spreads([p.values for p in points], scale)
    xs = [p.x for p in points]
    axes.errorbar(xs, medians, spread, marker="o", markersize=3, capsize=2, **style)


def _tick_tokens(axes: "Axes", points: Sequence[Point]) -> None:
    axes.set_xticks([p.x for p in points], [_short(p.x) for p in points])
    axes.set_xticks([], minor=True)


def _short(n: int) -> str:
    """A number of tokens as ticks have it: 512, 32k."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def draw_profile(profiles: Sequence[Profile], title: str, path: Path) -> None:
    """Each part's share of a decode step, median with the lowest and the highest, as a PNG."""
    parts = parts_in(profiles)[::-1]
    shares = [[profile.share(part) for profile in profiles] for part in parts]
    medians, spread = _spreads(shares, 100)
    figure = _figure(6, 1 + 0.3 * len(parts))
    axes = figure.subplots()
    bars = axes.barh(parts, medians, xerr=spread, capsize=2)
    axes.bar_label(bars, fmt="%.1f", padding=4, fontsize="small")
    axes.set(xlabel="% of the time")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=200)
