"""The report of the study on small models: what they learned, known effects, published orders."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.files import save, write_records
from experiments.findings import Finding, draw_findings
from experiments.long_context import frequencies
from experiments.long_context.effects import findings
from experiments.long_context.report import FREQUENCIES, write_report
from experiments.long_context.scoring import Score
from experiments.long_context.small_model import SmallModel
from experiments.long_context.small_study import (
    FACTOR,
    LANGUAGE,
    LEARNED,
    Trained,
    methods,
    read_trained,
)
from qwen_jax.benchmark.report import markdown

# Perplexity on arXiv's texts of Qwen-7B, trained at 2,048 tokens, by multiples of that (its README,
# github.com/QwenLM/Qwen).
_QWEN1 = {
    "none": (3.78, 39.35, 469.81, 2645.09),
    "Qwen1 NTK": (3.78, 3.59, 3.66, 5.71),
    "Qwen1 NTK + logn": (3.78, 3.58, 3.56, 4.62),
    "Qwen1 NTK + logn + window": (3.78, 3.58, 3.49, 4.32),
}
_QWEN1_TIMES = (1, 2, 4, 8)
# Before fine-tuning, least first (YaRN, arXiv 2309.00071, figure 5 and its text).
_ZERO_SHOT = ("dynamic YaRN", "YaRN", "NTK", "PI", "none")


def write_small_report(workdir: Path, model: SmallModel, scores: Sequence[Score]) -> str:
    """Writes the report of a workdir of the study, with its tables and pictures; returns it."""
    ropes = methods(model)
    models = read_trained(workdir)
    learned = {own.seed for own in models if own.learned}
    # Of others nothing is said.
    found = findings([s for s in scores if s.seed in learned], ropes, model.trained)
    scaled = frequencies.scalings(
        model.config(LANGUAGE), list(ropes.values()), model.trained, FACTOR * model.trained
    )
    frequencies.draw(scaled, workdir / FREQUENCIES)
    draw_findings(found, workdir / "effects.png", "difference: share of right answers, or nats")
    if found:
        write_records(
            workdir / "effects", [{**f.row(), "field": f.effect.field} for f in found], origin=None
        )
    lines = [
        f"Qwen3 models of {model.layers} layers and heads of {model.head_dim} channels, trained at "
        f"{model.trained} tokens with RoPE's base {model.theta:.4g}"
        f"{'' if model.qk_norm else ', queries and keys not normed'}.",
        "",
        "## What the models have learned",
        "",
        _models_table(models),
        "",
    ]
    if len(learned) < len(models) or not models:
        lines += [
            f"**A model recalls less than {LEARNED:.0%} at its trained length, and is left out of "
            "the effects. Give more --train_steps.**",
            "",
        ]
    lines += [
        "## Known effects",
        "",
        _effect_table(found),
        "",
        "Differences of right answers are in points, of nats in nats a token; an effect is seen "
        "where its whole interval lies where the effect has it. "
        + (
            f"Intervals hold 95%: the wider of Student's of {len(learned)} models and of the texts."
            if len(learned) > 1
            else "Intervals are of the texts alone: of one model they tell nothing of others."
        )
        + " Those in the tables below are of texts, all models' together.",
        "",
        "![differences with their intervals](effects.png)",
        "",
        "## Orders",
        "",
        _order_lines(scores, ropes, model.trained),
        "",
        "Perplexity of Qwen-7B as published, and nats of the answers here:",
        "",
        _qwen1_table(scores, ropes, model.trained),
        "",
    ]
    if any(own.adapting for own in models):
        lines += [
            f"## Fine-tuning at {FACTOR * model.trained} tokens",
            "",
            _adapting_table(models, ropes),
            "",
            "![recall by steps of fine-tuning](adapting.png)",
            "",
        ]
        draw_adapting(models, ropes, workdir / "adapting.png")
    names = [f"| {name} | `{rope}` |" for name, rope in ropes.items()]
    lines += ["## Scalings", "", "| name | --rope |", "|---|---|", *names, ""]
    # Reports read better by names than by what a command line needs.
    return write_report(
        named_scores(scores, ropes), "Long contexts of small models", workdir, lines
    )


def named_scores(scores: Sequence[Score], ropes: dict[str, str]) -> list[Score]:
    """Scores whose scalings are called as reports call them."""
    names = {rope: name for name, rope in ropes.items()}
    found = []
    for score in scores:
        rope, bracket, rest = score.rope.partition(" (")
        found.append(dataclasses.replace(score, rope=names.get(rope, rope) + bracket + rest))
    return found


def _models_table(models: Sequence[Trained]) -> str:
    rows = [
        [str(m.seed), str(m.tries), f"{m.recall:.1%}", "yes" if m.learned else "**no**"]
        for m in models
    ]
    heads = ["seed", "draws", "recall at the trained length", f"at least {LEARNED:.0%}"]
    return markdown(heads, rows)


def _show(finding: Finding) -> tuple[str, str]:
    """The difference with its interval, and where it should lie."""
    scale, unit = (100, " points") if finding.effect.field == "share" else (1, " nats")
    digits = ".0f" if scale == 100 else ".2f"
    e, f = finding.effect, finding.found
    mean, low, high, least, most = (scale * x for x in (f.mean, f.low, f.high, e.least, e.most))
    expected = f"above {least:g}" if not np.isfinite(most) else f"{least:g} to {most:g}"
    if e.other is None:
        expected = f"below {most:g}"
    return f"{mean:+{digits}} ({low:+{digits}} to {high:+{digits}}){unit}", expected


def _effect_table(found: Sequence[Finding]) -> str:
    rows = []
    for finding in found:
        measured, expected = _show(finding)
        verdict = finding.verdict
        if not finding.seen:
            verdict += f" ({finding.effect.otherwise})"
        rows.append([finding.effect.name, expected, measured, verdict])
    return markdown(["effect", "expected", "difference", "verdict"], rows)


def _mean_nats(scores: Sequence[Score], rope: str, length: int) -> float | None:
    own = [s.nats for s in scores if (s.rope, s.task, s.length) == (rope, "recall", length)]
    return float(np.mean(own)) if own else None


def _order_lines(scores: Sequence[Score], ropes: dict[str, str], trained: int) -> str:
    length = FACTOR * trained
    nats = {name: _mean_nats(scores, rope, length) for name, rope in ropes.items()}
    known = {name: value for name, value in nats.items() if value is not None}
    found = sorted(known, key=known.__getitem__)
    ours = [name for name in found if name in _ZERO_SHOT]
    return "\n".join(
        [
            f"- Found, nats of recall at {length:,} tokens: "
            + ", ".join(f"{name} {known[name]:.2f}" for name in ours),
            f"- Published, before fine-tuning (arXiv 2309.00071): {', '.join(_ZERO_SHOT)}",
        ]
    )


def _qwen1_table(scores: Sequence[Score], ropes: dict[str, str], trained: int) -> str:
    rows = []
    for name, published in _QWEN1.items():
        cells = [name]
        for times, perplexity in zip(_QWEN1_TIMES, published, strict=True):
            nats = _mean_nats(scores, ropes[name], times * trained)
            cells += [f"{perplexity:,}", "-" if nats is None else f"{nats:.2f}"]
        rows.append(cells)
    heads = [f"{n}x, {what}" for n in _QWEN1_TIMES for what in ("Qwen-7B", "here")]
    return markdown(["scaling", *heads], rows)


def _adapting_table(models: Sequence[Trained], ropes: dict[str, str]) -> str:
    names = {rope: name for name, rope in ropes.items()}
    rows = []
    for rope in dict.fromkeys(rope for own in models for rope in own.adapting):
        own = [m for m in models if rope in m.adapting]
        steps = [m.steps(rope) for m in own]
        ends = [m.adapting[rope][-1] for m in own]
        told = ", ".join(
            f"> {end}" if step is None else str(step)
            for step, (end, _) in zip(steps, ends, strict=True)
        )
        before = ", ".join(f"{m.adapting[rope][0][1]:.0%}" for m in own)
        rows.append([names[rope], before, told, ", ".join(f"{share:.0%}" for _, share in ends)])
    heads = [
        "scaling",
        "recall before, each seed",
        f"steps from which on it is {LEARNED:.0%}",
        "recall at the end",
    ]
    return markdown(heads, rows)


def draw_adapting(models: Sequence[Trained], ropes: dict[str, str], path: Path) -> None:
    """Recall at the longer length by steps of fine-tuning, a line for each seed."""
    from matplotlib.figure import Figure

    names = {rope: name for name, rope in ropes.items()}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, rope in enumerate(dict.fromkeys(rope for own in models for rope in own.adapting)):
        for j, own in enumerate(m for m in models if rope in m.adapting):
            pairs = zip(*own.adapting[rope], strict=True)
            label = None if j else names[rope]
            axes.plot(*pairs, color=f"C{i}", marker=".", label=label)
    axes.axhline(LEARNED, color="black", linewidth=0.6, linestyle=":")
    axes.set(xlabel="steps of fine-tuning", ylabel="right answers", ylim=(-0.03, 1.03))
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)
