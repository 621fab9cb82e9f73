"""The report of the study: known effects, all arms, domains, published tables, pictures."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.files import replace, write_records
from experiments.findings import Finding, draw_findings
from experiments.intervals import Estimate, difference
from experiments.moe_balance import pictures
from experiments.moe_balance.arms import GLOBAL, LOSS_FREE, MICRO, NONE
from experiments.moe_balance.domains import DOMAINS, LOW_ENTROPY, entropy_rate
from experiments.moe_balance.effects import LOSS, LOSSES, by_seed, findings, losses_of
from experiments.moe_balance.published import PUBLISHED, SWITCHED
from experiments.moe_balance.study import Result
from experiments.moe_balance.training import Sizes
from qwen_jax.benchmark.report import markdown

# Of the arms, those that pictures of every detail show.
_SHOWN = (NONE, MICRO, GLOBAL, LOSS_FREE)
_NOISE = ("global 0.01", "global 0.01001")
# The figures of the arms' table, and how they are called there.
_FIGURES = {
    "max_vio": "MaxVio",
    "max_vio_micro": "of micro-batches",
    "load_cv": "CV",
    "load_gini": "Gini",
    "load_entropy": "load entropy",
    "dead_experts": "dead",
    "drop_1": "drops at 1",
    "drop_1.25": "at 1.25",
    "drop_2": "at 2",
    "overload_4": "4 devices wait",
    "domain_information": "I(expert; domain)",
    "router_entropy": "router entropy",
    "top_probability": "top-1",
    "margin": "margin",
    "logit_scale": "logit scale",
    "log_z": "log Z",
}


def write_report(workdir: Path, sizes: Sizes, results: Sequence[Result]) -> str:
    """Writes report.md, the tables as CSV and the pictures; returns the report."""
    arms = list(dict.fromkeys(result.arm for result in results))
    seeds = sorted({result.seed for result in results})
    found = findings(results)
    _draw(workdir, results, arms, found)
    # More experts can be shared by more devices.
    names = list(dict.fromkeys(name for result in results for name in result.figures))
    rows = [_row(result, names) for result in results]
    write_records(workdir / "results", rows, origin=None)
    if found:
        write_records(workdir / "effects", [finding.row() for finding in found], origin=None)
    lines = [
        "# Balancing a mixture of experts",
        "",
        f"Qwen3-MoE models of {sizes.layers} layers, {sizes.hidden_size} channels and 16 experts "
        f"of 32, 2 for each token, in {sizes.steps} steps of {32 * sizes.length:,} tokens: a "
        f"micro-batch of each of eight domains. {len(seeds)} seed{'s' * (len(seeds) > 1)}; the "
        "arms of a seed begin with the same parameters and read the same texts. A coefficient's "
        "unit is a loss that is 1 where experts are used evenly. All figures are of held-out texts "
        "and routers at rest.",
        "",
        "## Known effects",
        "",
        _effect_table(found),
        "",
        "Of losses in nats a token, of information in bits. An effect is seen where its whole "
        "interval lies where the effect has it. Intervals hold 95%: Student's of the seeds' paired "
        "differences, or the texts' where that is wider; with one seed figures have none.",
        "",
        "![differences with their intervals](effects.png)",
        "![the same of losses](effects_loss.png)",
        "",
        "## All arms",
        "",
        _arm_table(results, arms),
        "",
        f"Differences are to {NONE}, of the same seed and texts. {_noise(results)}",
        "",
        _figure_table(results, arms),
        "",
        f"MaxVio of tokens that choose at random is {_floor(16_384):.2f} in all held-out texts and "
        f"{_floor(4 * sizes.length):.2f} in a micro-batch; I(expert; domain) of untrained routers "
        f"is {_untrained(results):.2f} bits. Drops are what an expert's capacity of so many times "
        "its even share would drop, were there one. `4 devices wait` is by how much the busiest of "
        "four that share the experts is above the mean: the experts' part of a step takes so much "
        "longer.",
        "",
        "![MaxVio against loss](trade.png)",
        "![load of every expert by step](loads.png)",
        "![figures by step](history.png)",
        "![coefficients and rates](sweep.png)",
        "",
        "## Domains",
        "",
        "Loss of each domain, difference to global 0.1 in nats a token:",
        "",
        _domain_table(results, arms),
        "",
        _floors(seeds),
        "",
        "![experts of each domain, before and after](domains.png)",
        "![entropies by layer](layers.png)",
        "![experts that are chosen together](together.png)",
        "",
        "## Published",
        "",
        _published_table(results),
        "",
        "Losses here are those of a model of 0.1M parameters in half a million tokens: what can be "
        "compared is the order, and MaxVio. Perplexity by the step at which groups of 2 texts went "
        "over to 512 (arXiv 2501.11873): "
        + ", ".join(f"{name} {value}" for name, value in SWITCHED)
        + ".",
        "",
    ]
    text = "\n".join(lines)
    replace(workdir / "report.md", text)
    return text


def _row(result: Result, names: Sequence[str]) -> dict[str, object]:
    own = {name: result.figure(name) if name in result.figures else None for name in names}
    head = {"arm": result.arm, "seed": result.seed, "steps": result.steps, "loss": result.loss}
    trained = None if result.trained_losses is None else float(np.mean(result.trained_losses))
    return {**head, **own, "trained_loss": trained, "seconds": result.seconds}


def _cell(found: Estimate, digits: int = 4) -> str:
    if found.low == found.high or not math.isfinite(found.high):
        return f"{found.mean:+.{digits}f}"
    low, high = f"{found.low:+.{digits}f}", f"{found.high:+.{digits}f}"
    return f"{found.mean:+.{digits}f} ({low} to {high})"


def _effect_table(found: Sequence[Finding]) -> str:
    rows = []
    for finding in found:
        e = finding.effect
        expected = f"above {e.least:g}" if math.isinf(e.most) else f"{e.least:g} to {e.most:g}"
        verdict = finding.verdict
        if verdict.startswith("not seen"):
            verdict += f" ({e.otherwise})"
        rows.append([e.name, expected, _cell(finding.found), verdict])
    return markdown(["effect", "expected", "difference", "verdict"], rows)


def _arm_table(results: Sequence[Result], arms: Sequence[str]) -> str:
    rows, base = [], by_seed(results, NONE, LOSS)
    for arm in arms:
        own = [result for result in results if result.arm == arm]
        loss, vio = (_mean(own, name) for name in (LOSS, "max_vio"))
        cells = [arm, f"{loss:.4f}"]
        cells.append(_cell(difference(by_seed(results, arm, LOSS), base, paired=True)))
        saturation = _saturation(own)
        cells += [f"{vio:.2f}", f"{_mean(own, 'domain_information'):.2f}", saturation]
        rows.append(cells)
    heads = [
        "arm",
        "loss",
        f"to {NONE}",
        "MaxVio",
        "I(expert; domain)",
        "choices fixed at 10%, 50%",
    ]
    return markdown(heads, rows)


def _mean(results: Sequence[Result], figure: str) -> float:
    if figure == LOSS:
        return float(np.mean([result.loss for result in results]))
    return float(np.mean([result.figure(figure) for result in results]))


def _saturation(results: Sequence[Result]) -> str:
    cells = []
    for part in (0.1, 0.5):
        values = [
            row["saturation"]
            for result in results
            for row in result.history
            if row["step"] == round(part * result.steps)
        ]
        cells.append(f"{np.mean(values):.0%}" if values else "-")
    return ", ".join(cells)


def _figure_table(results: Sequence[Result], arms: Sequence[str]) -> str:
    rows = []
    for arm in arms:
        own = [result for result in results if result.arm == arm]
        # The model with other experts may have other devices that share them.
        known = [name if name in own[0].figures else None for name in _FIGURES]
        rows.append([arm, *("-" if name is None else f"{_mean(own, name):.3g}" for name in known)])
    return markdown(["arm", *_FIGURES.values()], rows)


def _noise(results: Sequence[Result]) -> str:
    one, other = (by_seed(results, arm, LOSS) for arm in _NOISE)
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return ""
    apart = [
        abs(np.mean([*one[seed].values()]) - np.mean([*other[seed].values()])) for seed in shared
    ]
    return (
        f"{_NOISE[0]} and {_NOISE[1]} are one arm but for rounding, and differ by up to "
        f"{max(apart):.4f} within a seed: of one seed, less than that means nothing."
    )


def _floor(tokens: int, experts: int = 16, k: int = 2, draws: int = 200) -> float:
    """MaxVio where each token takes k experts at random."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        chosen = np.argpartition(rng.random((tokens, experts)), k, axis=1)[:, :k]
        counts = np.bincount(chosen.ravel(), minlength=experts)
        found.append(counts.max() / counts.mean() - 1)
    return float(np.mean(found))


def _untrained(results: Sequence[Result]) -> float:
    values = [
        row["domain_information"]
        for result in results
        for row in result.history
        if result.arm == NONE and row["step"] == 0
    ]
    return float(np.mean(values)) if values else math.nan


def _domain_table(results: Sequence[Result], arms: Sequence[str]) -> str:
    base = {result.seed: result for result in results if result.arm == GLOBAL}
    if not base:
        return f"(without {GLOBAL} there is nothing to compare with)"
    rows = []
    for arm in arms:
        own = {result.seed: result for result in results if result.arm == arm}
        if arm == GLOBAL or not own.keys() & base.keys():
            continue
        cells = [arm]
        for names in (LOW_ENTROPY, *([name] for name in DOMAINS)):
            sides = ({s: losses_of(r, names) for s, r in side.items()} for side in (own, base))
            found = difference(*sides, paired=True)
            cells.append(_cell(found, 3) if names is LOW_ENTROPY else f"{found.mean:+.3f}")
        rows.append(cells)
    return markdown(["arm", "low entropy", *DOMAINS], rows)


def _floors(seeds: Sequence[int]) -> str:
    names = [name for name in DOMAINS if name == "dna" or name.startswith("markov")]
    listed = (
        f"{name} {np.mean([entropy_rate(seed, name) for seed in seeds]):.2f}" for name in names
    )
    return f"No model's loss can be below, in nats a token: {', '.join(listed)}."


def _published_table(results: Sequence[Result]) -> str:
    rows = []
    for row in PUBLISHED:
        own = [result for result in results if result.arm == row.arm]
        cells = [row.source, row.method, f"{row.perplexity:g}"]
        cells += ["-" if row.max_vio is None else f"{row.max_vio:g}", row.arm]
        if own:
            cells += [f"{math.exp(_mean(own, LOSS)):.3f}", f"{_mean(own, 'max_vio'):.2f}"]
        else:
            cells += ["-", "-"]
        rows.append(cells)
    heads = ["published", "method", "perplexity", "MaxVio", "arm here", "perplexity", "MaxVio"]
    return markdown(heads, rows)


def _draw(
    workdir: Path, results: Sequence[Result], arms: Sequence[str], found: Sequence[Finding]
) -> None:
    shown = [arm for arm in _SHOWN if arm in arms]
    first = {arm: next(r for r in results if r.arm == arm) for arm in arms}
    of_loss = [f for f in found if f.effect.one.figure in LOSSES]
    others = [f for f in found if f not in of_loss]
    for own, name, what in (
        (others, "effects.png", "difference: MaxVio, or bits of information"),
        (of_loss, "effects_loss.png", "difference: nats a token"),
    ):
        if own:
            draw_findings(own, workdir / name, what)
    pictures.draw_loads({arm: first[arm].loads for arm in shown}, workdir / "loads.png")
    loss = f"loss, difference to {NONE} in nats a token"
    points = {arm: _point(results, arm) for arm in arms}
    pictures.draw_trade(points, workdir / "trade.png", loss)
    pictures.draw_sweep(_sweeps(points), workdir / "sweep.png", loss)
    heat = {}
    for arm in shown:
        begun, after = (
            np.array(c[-1]) for c in (first[arm].by_domain_before, first[arm].by_domain)
        )
        if arm == shown[0]:
            heat["before"] = _shares(begun)
        heat[arm] = _shares(after)
    pictures.draw_domains(heat, DOMAINS, workdir / "domains.png")
    names = {
        "router_entropy": "entropy of the router, nats",
        "load_entropy": "entropy of the load, part of its most",
        "domain_information": "I(expert; domain), bits",
    }
    layers = {
        arm: {
            name: np.mean([r.figures[name] for r in results if r.arm == arm], axis=0)
            for name in names
        }
        for arm in shown
    }
    pictures.draw_layers(layers, names, workdir / "layers.png")
    together = {arm: np.array(first[arm].together[-1]) for arm in shown}
    pictures.draw_together(together, workdir / "together.png")
    lines = {}
    switched = [arm for arm in arms if " then " in arm]
    for arm in (*shown, *switched):
        rows = [row for result in results if result.arm == arm for row in result.history]
        steps = sorted({row["step"] for row in rows})
        lines[arm] = {"step": steps} | {
            name: [np.mean([r[name] for r in rows if r["step"] == step]) for step in steps]
            for name in rows[0]
            if name != "step"
        }
    followed = {
        "max_vio": "MaxVio",
        "domain_information": "I(expert; domain), bits",
        "saturation": "choices as at the end",
    }
    pictures.draw_history(lines, followed, workdir / "history.png")


def _point(results: Sequence[Result], arm: str) -> tuple[pictures.Interval, pictures.Interval]:
    vio = difference(by_seed(results, arm, "max_vio"), None, paired=False)
    losses = by_seed(results, arm, LOSS), by_seed(results, NONE, LOSS)
    loss = difference(*losses, paired=True)
    least = 0.01
    return (
        (vio.mean, max(vio.low, least), max(vio.high, least)),
        (loss.mean, loss.low, loss.high),
    )


def _sweeps(points: dict[str, tuple[pictures.Interval, pictures.Interval]]):
    """Arms that differ in a number alone, by what they are called without it."""
    sweeps: dict[str, list] = {}
    for arm, (vio, loss) in points.items():
        match = re.fullmatch(r"(micro|global|loss-free sign|loss-free proportional) ([\d.]+)", arm)
        if match and arm != _NOISE[1]:
            sweeps.setdefault(match[1], []).append((float(match[2]), vio, loss))
    return {way: sorted(own) for way, own in sweeps.items() if len(own) > 1}


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
