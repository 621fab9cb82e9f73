"""What a study found, as tables and pictures made from its records alone."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from experiments.long_context.files import replace, save, write_records
from experiments.long_context.scoring import Score
from qwen_jax.benchmark.report import markdown
from qwen_jax.evaluation.figures import wilson_interval

# A length counts as read while the share of right answers is at least this part of that at the
# shortest length, as RULER's 85.6% is of a model at its trained length.
EFFECTIVE = 0.856
_RESAMPLES = 1000


def effective_length(shares: dict[int, float]) -> int | None:
    """The longest length up to which answers stay right, by `EFFECTIVE`; None if nothing is right.

    Args:
      shares: length -> share of right answers.
    """
    lengths = sorted(shares)
    least = EFFECTIVE * shares[lengths[0]]
    if least == 0:
        return None
    reached = lengths[0]
    for length in lengths[1:]:
        if shares[length] < least:
            break
        reached = length
    return reached


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean of `values`, by resampling them."""
    array = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(_RESAMPLES, len(array)))
    low, high = np.quantile(array[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def write_report(scores: Sequence[Score], title: str, workdir: Path) -> str:
    """Writes report.md, results.csv and the pictures, and returns the report.

    Args:
      scores: of all scalings, tasks and lengths.
      title: of the report.
      workdir: where they go.
    """
    lines = [f"# {title}", ""]
    lines += [_effective_table(scores), ""]
    lines += [
        f"A length is reached while right answers are at least {EFFECTIVE:.1%} of those at the "
        "shortest one. Intervals hold 95%: Wilson's of shares, resampled ones of nats.",
        "",
    ]
    for task in _names(scores, "task"):
        own = [s for s in scores if s.task == task]
        lines += [f"## {task}", "", "Share of right texts:", "", _table(own, _right_cell), ""]
        if any(s.share not in (0, 1) for s in own):
            lines += ["Share of right answers:", "", _table(own, _share_cell), ""]
        lines += ["Nats a token of the answers:", "", _table(own, _nats_cell), ""]
        if len({s.depth for s in own}) > 1:
            picture = f"heatmap_{task}.png"
            draw_heatmaps(own, workdir / picture)
            lines += [f"![right texts by length and depth]({picture})", ""]
    draw_lengths(scores, workdir / "lengths.png")
    lines += ["![right texts and nats by length, mean of all tasks](lengths.png)", ""]
    text = "\n".join(lines)
    replace(workdir / "report.md", text)
    write_records(workdir / "results", [dataclasses.asdict(s) for s in scores], origin=None)
    return text


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


def _means(scores: Sequence[Score], field: str) -> dict[int, float]:
    """Length -> the mean over its tasks of the mean of each."""
    found = {}
    for length in sorted({s.length for s in scores}):
        own = _at(scores, length=length)
        tasks = [_at(own, task=task) for task in _names(own, "task")]
        found[length] = float(np.mean([np.mean([getattr(s, field) for s in t]) for t in tasks]))
    return found


def _effective_table(scores: Sequence[Score]) -> str:
    tasks, rows = _names(scores, "task"), []
    for rope in _names(scores, "rope"):
        reached = [
            effective_length(_means(own, "share")) if own else None
            for own in (
                _at(scores, rope=rope),
                *(_at(scores, rope=rope, task=task) for task in tasks),
            )
        ]
        rows.append([f"`{rope}`", *("-" if r is None else f"{r:,}" for r in reached)])
    return markdown(["effective length", "all tasks", *tasks], rows)


def draw_lengths(scores: Sequence[Score], path: Path) -> None:
    """Right texts and nats by length, a line for each scaling, the mean of all tasks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for i, rope in enumerate(_names(scores, "rope")):
        for axes, field in zip(panels, ("right", "nats"), strict=True):
            means = _means(_at(scores, rope=rope), field)
            style = ("-", "--", ":")[i // 10 % 3]
            axes.plot(
                means.keys(), means.values(), style, color=f"C{i % 10}", marker="o", label=rope
            )
    panels[0].set(ylabel="right texts", ylim=(-0.03, 1.03))
    panels[1].set(ylabel="nats a token of the answers")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens")
        axes.grid(True, alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    save(figure, path)


def draw_heatmaps(scores: Sequence[Score], path: Path) -> None:
    """Right texts by depth and length of one task, a panel for each scaling."""
    from matplotlib.figure import Figure

    ropes = _names(scores, "rope")
    lengths, depths = sorted({s.length for s in scores}), sorted({s.depth for s in scores})
    columns = min(4, len(ropes))
    rows = -(-len(ropes) // columns)
    figure = Figure(figsize=(1 + 2.6 * columns, 0.6 + 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(ropes) :]:
        axes.set_visible(False)
    for rope, axes in zip(ropes, panels.flat, strict=False):
        shares = [
            [
                np.mean([s.right for s in own]) if own else np.nan
                for own in (_at(scores, rope=rope, length=n, depth=depth) for n in lengths)
            ]
            for depth in depths
        ]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(rope, fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45, fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=panels, label="right texts")
    save(figure, path)
