"""What a study found, as tables and pictures made from its records alone."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from experiments.files import line_style, replace, save, write_records
from experiments.intervals import bootstrap_interval
from experiments.long_context.scoring import Score
from experiments.long_context.tasks import LOSSES
from qwen_jax.benchmark.report import markdown
from qwen_jax.evaluation.figures import wilson_interval

# A length counts as read while the share of right answers is at least this part of the best
# scaling's at the shortest length, as RULER's 85.6% is of a model at its trained length.
EFFECTIVE = 0.856
# A picture that is shown where it has been drawn, for which a model's config is needed.
FREQUENCIES = "frequencies.png"


def effective_length(shares: dict[int, float], whole: float) -> int | None:
    """The longest length up to which enough answers are right; None where not even at the first.

    Args:
      shares: length -> share of right answers.
      whole: of which `EFFECTIVE` is enough.
    """
    reached = None
    for length in sorted(shares):
        if shares[length] < EFFECTIVE * whole or not whole:
            break
        reached = length
    return reached


def write_report(
    scores: Sequence[Score], title: str, workdir: Path, before: Sequence[str] = ()
) -> str:
    """Writes report.md, results.csv, places.csv and the pictures, and returns the report.

    Args:
      scores: of all scalings, tasks and lengths.
      title: of the report.
      workdir: where they go.
      before: lines in front of its tables.
    """
    lines = [f"# {title}", "", *before]
    asked = in_common([s for s in scores if s.task not in LOSSES])
    if asked:
        draw_effective(asked, workdir / "effective.png")
        draw_lengths(asked, workdir / "lengths.png")
        lines += [
            "## All tasks",
            "",
            _effective_table(asked),
            "",
            f"A length is reached while right answers are at least {EFFECTIVE:.1%} of the best "
            "scaling's at the shortest one. Intervals hold 95%: Wilson's of shares, resampled ones "
            "of nats.",
            "",
            *_orders(asked),
            "",
            "![longest length that is reached](effective.png)",
            "![right answers and nats by length, mean of all tasks](lengths.png)",
            "",
        ]
    for task in _names(scores, "task"):
        own = [s for s in scores if s.task == task]
        lines += [f"## {task}", ""]
        lines += _loss_lines(own, task, workdir) if task in LOSSES else _asked_lines(own, workdir)
    if (workdir / FREQUENCIES).is_file():
        lines += [f"![frequency by pair of each scaling]({FREQUENCIES})", ""]
    text = "\n".join(lines)
    replace(workdir / "report.md", text)
    write_records(workdir / "results", [_row(s) for s in scores], origin=None)
    write_records(workdir / "places", _places(scores), origin=None)
    return text


def in_common(scores: Sequence[Score]) -> list[Score]:
    """Those of tasks that a scaling has at every length at which it has any; maybe none."""
    asked = {(s.rope, s.length) for s in scores}
    has = {(s.task, s.rope, s.length) for s in scores}
    whole = {task for task in _names(scores, "task") if all((task, *pair) in has for pair in asked)}
    return [s for s in scores if s.task in whole]


def _row(score: Score) -> dict[str, object]:
    row = dataclasses.asdict(score)
    del row["by_place"]
    return row


def _places(scores: Sequence[Score]) -> list[dict[str, object]]:
    """Of every answer its place and nats."""
    fields = ("rope", "task", "length", "depth", "seed", "number")
    return [
        {**{name: getattr(s, name) for name in fields}, "place": place, "nats": nats}
        for s in scores
        for place, nats in s.by_place
    ]


def _asked_lines(own: list[Score], workdir: Path) -> list[str]:
    lines = ["Share of right texts:", "", _table(own, _right_cell), ""]
    if any(s.share not in (0, 1) for s in own):
        lines += ["Share of right answers:", "", _table(own, _share_cell), ""]
    lines += ["Nats a token of the answers:", "", _table(own, _nats_cell), ""]
    if len({s.depth for s in own}) > 1:
        picture = f"heatmap_{own[0].task}.png"
        what = draw_heatmaps(own, workdir / picture)
        lines += [f"![{what} by length and depth]({picture})", ""]
    return lines


def _loss_lines(own: list[Score], task: str, workdir: Path) -> list[str]:
    lines = ["Nats a token:", "", _table(own, _nats_cell), ""]
    lines += ["Perplexity:", "", _table(own, _perplexity_cell), ""]
    # Where parts of texts are the same ones.
    longest = [s for s in own if s.length == max(s.length for s in own)]
    if len({tuple(place for place, _ in s.by_place) for s in longest}) == 1 < len(own[0].by_place):
        picture = f"positions_{task}.png"
        draw_positions(own, workdir / picture)
        lines += [f"![nats by position in the text]({picture})", ""]
    return lines


def _names(scores: Iterable[Score], field: str) -> list:
    return list(dict.fromkeys(getattr(s, field) for s in scores))


def _at(scores: Sequence[Score], **fields: object) -> list[Score]:
    return [s for s in scores if all(getattr(s, name) == v for name, v in fields.items())]


def _table(scores: Sequence[Score], cell: Callable[[list[Score]], str]) -> str:
    lengths = sorted({s.length for s in scores})
    rows = []
    for rope in _names(scores, "rope"):
        own = [_at(scores, rope=rope, length=length) for length in lengths]
        rows.append([f"`{rope}`", *(cell(part) if part else "-" for part in own)])
    return markdown(["scaling", *(f"{length:,}" for length in lengths)], rows)


def _right_cell(scores: list[Score]) -> str:
    right = sum(s.right for s in scores)
    low, high = wilson_interval(right, len(scores))
    return f"{right / len(scores):.0%} ({low:.0%} to {high:.0%})"


def _share_cell(scores: list[Score]) -> str:
    low, high = bootstrap_interval([s.share for s in scores])
    return f"{np.mean([s.share for s in scores]):.0%} ({low:.0%} to {high:.0%})"


def _nats_cell(scores: list[Score]) -> str:
    low, high = bootstrap_interval([s.nats for s in scores])
    return f"{np.mean([s.nats for s in scores]):.3g} ({low:.3g} to {high:.3g})"


def _perplexity_cell(scores: list[Score]) -> str:
    nats = [s.nats for s in scores]
    low, high = bootstrap_interval(nats)
    return f"{np.exp(np.mean(nats)):.4g} ({np.exp(low):.4g} to {np.exp(high):.4g})"


def _means(scores: Sequence[Score], field: str) -> dict[int, float]:
    """Length -> the mean over its tasks of the mean of each."""
    found = {}
    for length in sorted({s.length for s in scores}):
        own = _at(scores, length=length)
        tasks = [_at(own, task=task) for task in _names(own, "task")]
        found[length] = float(np.mean([np.mean([getattr(s, field) for s in t]) for t in tasks]))
    return found


def _effective_table(scores: Sequence[Score]) -> str:
    tasks = _names(scores, "task")
    columns = [_reached(scores), *(_reached(_at(scores, task=task)) for task in tasks)]
    rows = [
        [f"`{rope}`", *(f"{column[rope]:,}" if column.get(rope) else "-" for column in columns)]
        for rope in columns[0]
    ]
    return markdown(["effective length", "all tasks", *tasks], rows)


def _orders(scores: Sequence[Score]) -> list[str]:
    """For each length the scalings by their nats, mean of all tasks."""
    lines = []
    for length in sorted({s.length for s in scores}):
        own = _at(scores, length=length)
        nats = {r: _means(_at(own, rope=r), "nats")[length] for r in _names(own, "rope")}
        listed = ", ".join(f"{r} {nats[r]:.2f}" for r in sorted(nats, key=nats.__getitem__))
        lines.append(f"- Fewest nats at {length:,} tokens: {listed}")
    return lines


def _reached(scores: Sequence[Score]) -> dict[str, int | None]:
    """Scaling -> the length that it reaches, over all tasks."""
    shares = {rope: _means(_at(scores, rope=rope), "share") for rope in _names(scores, "rope")}
    shortest = min(s.length for s in scores)
    whole = max(own.get(shortest, 0) for own in shares.values())
    return {
        rope: effective_length(own, whole) if shortest in own else None
        for rope, own in shares.items()
    }


def draw_effective(scores: Sequence[Score], path: Path) -> None:
    """A bar for each scaling: the length that it reaches."""
    from matplotlib.figure import Figure

    reached = _reached(scores)
    figure = Figure(figsize=(8, 1 + 0.24 * len(reached)), layout="constrained")
    axes = figure.subplots()
    lengths = sorted({s.length for s in scores})
    least = lengths[0]
    bars = [(r or least / 2) - least / 2 for r in reached.values()]
    axes.barh(list(reached), bars, left=least / 2, color="C0")
    axes.set_xscale("log", base=2)
    axes.set_xlim(least / 2, lengths[-1] * 1.1)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    of = f"{EFFECTIVE:.1%} of the best scaling's right answers at {least:,}"
    axes.set(xlabel=f"longest length with {of}")
    axes.grid(True, axis="x", alpha=0.3)
    save(figure, path)


def draw_lengths(scores: Sequence[Score], path: Path) -> None:
    """Right answers and nats by length, a line for each scaling, the mean of all tasks."""
    from matplotlib.figure import Figure

    ropes, lengths = _names(scores, "rope"), sorted({s.length for s in scores})
    figure = Figure(figsize=(12, max(4.2, 0.18 * len(ropes))), layout="constrained")
    panels = figure.subplots(1, 2)
    for i, rope in enumerate(ropes):
        for axes, field in zip(panels, ("share", "nats"), strict=True):
            means = _means(_at(scores, rope=rope), field)
            axes.plot(means.keys(), means.values(), marker="o", label=rope, **line_style(i))
    panels[0].set(ylabel="right answers", ylim=(-0.03, 1.03))
    panels[1].set(ylabel="nats a token of the answers")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axes.minorticks_off()
        axes.set(xlabel="tokens")
        axes.grid(True, alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    save(figure, path)


def draw_positions(scores: Sequence[Score], path: Path) -> None:
    """Nats by position in the longest texts, a line for each scaling."""
    from matplotlib.figure import Figure

    longest = max(s.length for s in scores)
    ropes = [r for r in _names(scores, "rope") if _at(scores, rope=r, length=longest)]
    figure = Figure(figsize=(10, max(4.2, 0.18 * len(ropes))), layout="constrained")
    axes = figure.subplots()
    for i, rope in enumerate(ropes):
        by_place: dict[float, list[float]] = {}
        for s in _at(scores, rope=rope, length=longest):
            for place, nats in s.by_place:
                by_place.setdefault(place, []).append(nats)
        at = [place * longest for place in by_place]
        axes.plot(at, [np.mean(own) for own in by_place.values()], label=rope, **line_style(i))
    axes.set(xlabel=f"position in texts of {longest:,} tokens", ylabel="nats a token")
    axes.grid(True, alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize=7)
    save(figure, path)


def draw_heatmaps(scores: Sequence[Score], path: Path) -> str:
    """Right texts by depth and length of one task, a panel for each scaling.

    Where no text is right, nats a token in their place.

    Returns:
      Which of the two.
    """
    from matplotlib.figure import Figure

    some_right = any(s.right for s in scores)
    field, what = ("right", "right texts") if some_right else ("nats", "nats a token")
    most = 1.0 if some_right else float(np.quantile([s.nats for s in scores], 0.95))
    ropes = _names(scores, "rope")
    lengths, depths = sorted({s.length for s in scores}), sorted({s.depth for s in scores})
    columns = min(6 if len(ropes) > 12 else 4, len(ropes))
    rows = -(-len(ropes) // columns)
    figure = Figure(figsize=(1 + 2.6 * columns, 0.6 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(ropes) :]:
        axes.set_visible(False)
    for rope, axes in zip(ropes, panels.flat, strict=False):
        shares = [
            [
                np.mean([getattr(s, field) for s in own]) if own else np.nan
                for own in (_at(scores, rope=rope, length=n, depth=depth) for n in lengths)
            ]
            for depth in depths
        ]
        colours = "RdYlGn" if some_right else "RdYlGn_r"
        image = axes.imshow(shares, vmin=0, vmax=most, cmap=colours, aspect="auto")
        axes.set_title("\n".join(textwrap.wrap(rope, 34)), fontsize=7)
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45, fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=panels, label=what)
    save(figure, path)
    return what
