"""How a checkpoint uses its experts on texts of several domains, and how two checkpoints differ."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from experiments.files import replace, write_records
from experiments.moe_balance import pictures
from experiments.moe_balance.measuring import Measured, Reader, in_batches, saturation
from qwen_jax.benchmark.report import markdown
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.training.router_figures import information

_MEASURED = "measured.npz"
_RESAMPLES = 1000
# Of them; all together could be as large as a model.
_AT_ONCE = 50
# Of a picture of all layers, those that are shown.
_SHOWN_LAYERS = 6
_NAMES = {
    "load_entropy": "entropy of the load, part of its most",
    "max_vio": "MaxVio",
    "domain_information": "I(expert; domain), bits",
    "router_entropy": "entropy of the router, nats",
    "top_probability": "largest probability",
    "logit_scale": "scale of the logits",
}
_FIGURES = {
    "max_vio": "MaxVio",
    "max_vio_micro": "of batches of one domain",
    "load_cv": "CV",
    "load_gini": "Gini",
    "dead_experts": "dead experts",
    "drop_1": "drops at capacity 1",
    "drop_1.25": "at 1.25",
    "drop_2": "at 2",
    "domain_information": "I(expert; domain), bits",
    "router_entropy": "router entropy, nats",
    "top_probability": "top-1 probability",
    "margin": "margin",
    "logit_scale": "logit scale",
    "log_z": "log Z",
    "pair_share": "largest co-activation",
}


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What was measured of a checkpoint.

    Attributes:
      model: its name.
      domains: names.
      layers: indices of those with experts.
      num_experts: E.
      measured: of its routers.
    """

    model: str
    domains: tuple[str, ...]
    layers: tuple[int, ...]
    num_experts: int
    measured: Measured


def analyse(
    model: Decoder,
    params: Any,
    name: str,
    domains: Sequence[str],
    rows: Mapping[str, np.ndarray],
    batch_size: int,
) -> Analysis:
    """Runs a checkpoint on rows of `texts.rows_of`.

    Args:
      model, params: the checkpoint.
      name: of it, for reports.
      domains: names.
      rows: domain after domain.
      batch_size: rows that run together.

    Raises:
      UserError: the model has no experts.
    """
    moe = model.config.moe
    if moe is None:
        raise UserError(f"{name} has no experts; give a checkpoint of a mixture of experts")
    reader = Reader(model, len(domains), batch_size)
    batches = list(in_batches(rows, batch_size))
    measured = reader.read(params, tqdm.tqdm(batches, desc="texts", unit="batch", disable=None))
    return Analysis(name, tuple(domains), moe.layers, moe.num_experts, measured)


def save_analysis(workdir: Path, found: Analysis, origin: Mapping[str, Any]) -> None:
    """Writes what was measured, for reports and comparisons: `measured.npz`, `layers.jsonl`."""
    workdir.mkdir(parents=True, exist_ok=True)
    own, temporary = found.measured, workdir / f"{_MEASURED}.tmp"
    head = {
        "model": found.model,
        "domains": found.domains,
        "layers": found.layers,
        "num_experts": found.num_experts,
    }
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            head=json.dumps(head),
            losses=own.losses,
            row_domains=own.domains,
            by_domain=own.by_domain,
            together=own.together,
            choices=own.choices,
            **{f"figure_{name}": value for name, value in own.figures.items()},
        )
    temporary.replace(workdir / _MEASURED)
    figures = {name: value for name, value in own.figures.items() if value.ndim == 1}
    rows = [
        {"layer": layer, **{name: float(value[i]) for name, value in figures.items()}}
        for i, layer in enumerate(found.layers)
    ]
    write_records(workdir / "layers", rows, origin)


def read_analysis(workdir: Path) -> Analysis:
    """What `save_analysis` wrote.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = workdir / _MEASURED
    if not path.is_file():
        raise UserError(f"{path}: is not there; run --analyze with --workdir={workdir} first")
    try:
        with np.load(path) as kept:
            arrays = dict(kept)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run --analyze again") from None
    head = json.loads(str(arrays["head"]))
    figures = {
        name.removeprefix("figure_"): value
        for name, value in arrays.items()
        if name.startswith("figure_")
    }
    measured = Measured(
        arrays["losses"],
        arrays["row_domains"],
        figures,
        arrays["by_domain"],
        arrays["together"],
        arrays["choices"],
    )
    domains, layers = tuple(head["domains"]), tuple(head["layers"])
    return Analysis(head["model"], domains, layers, head["num_experts"], measured)


def write_analysis(workdir: Path, found: Analysis) -> str:
    """Writes the report of a checkpoint with its tables and pictures; returns it."""
    own = found.measured
    title = found.model
    shares = own.by_domain / np.maximum(own.by_domain.sum(axis=-1, keepdims=True), 1)
    rows = [
        {"layer": layer, "domain": domain, "expert": expert, "share": float(shares[i, d, expert])}
        for i, layer in enumerate(found.layers)
        for d, domain in enumerate(found.domains)
        for expert in range(found.num_experts)
    ]
    write_records(workdir / "domains", rows, origin=None)
    shown = _shown(found)
    heat = {f"layer {found.layers[i]}": shares[i] for i in shown}
    pictures.draw_domains(heat, found.domains, workdir / "domains.png", columns=3)
    pairs = {f"layer {found.layers[i]}": own.together[i] for i in shown}
    pictures.draw_together(pairs, workdir / "together.png")
    pictures.draw_layers({title: own.figures}, _NAMES, workdir / "layers.png")
    low, high = information_interval(found)
    text = "\n".join(
        [
            f"# Experts of {title}",
            "",
            f"{len(found.layers)} layers of {found.num_experts} experts, "
            f"{own.choices.shape[-1]} for each token; {own.choices.shape[1]:,} tokens of "
            f"{len(found.domains)} domains, as many of each. Loss {own.loss:.4g} nats a token.",
            "",
            f"I(expert; domain), mean of layers: {own.figures['domain_information'].mean():.3f} "
            f"bits ({low:.3f} to {high:.3f} by resampling rows, 95%), of at most "
            f"{np.log2(len(found.domains)):.3g}.",
            "",
            "## Figures",
            "",
            _figures_table({title: found}),
            "",
            "Means over layers, and the least and the most of a layer. Drops are counterfactual: "
            "what a capacity of so many times the even share would drop.",
            "",
            _overload_line(found),
            "",
            "![figures by layer](layers.png)",
            "",
            "## Domains",
            "",
            markdown(
                ["domain", "loss, nats a token"],
                [
                    [name, f"{own.losses[own.domains == number].mean():.4g}"]
                    for number, name in enumerate(found.domains)
                ],
            ),
            "",
            "![experts of each domain](domains.png)",
            "![experts that are chosen together](together.png)",
            "",
        ]
    )
    replace(workdir / "report.md", text)
    return text


def write_comparison(workdir: Path, one: Analysis, other: Analysis) -> str:
    """Writes how two checkpoints use their experts, as compare.md and compare.png; returns it.

    Raises:
      UserError: they have read other domains.
    """
    if one.domains != other.domains:
        raise UserError(
            f"{one.model} has read {', '.join(one.domains)}, {other.model} "
            f"{', '.join(other.domains)}; analyze both on the same --domains"
        )
    names = [one.model, other.model]
    if names[0] == names[1]:
        names = [f"{name} ({i})" for i, name in enumerate(names, 1)]
    both = dict(zip(names, (one, other), strict=True))
    figures = {name: found.measured.figures for name, found in both.items()}
    pictures.draw_layers(figures, _NAMES, workdir / "compare.png")
    means = [_resampled(found, seed) for seed, found in enumerate(both.values())]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    gap = float(np.subtract(*(f["domain_information"].mean() for f in figures.values())))
    verdict = "no difference that these texts can tell"
    if low > 0 or high < 0:
        more, less = names if low > 0 else names[::-1]
        verdict = f"{more} specialises more than {less}"
    lines = [
        f"# {names[0]} and {names[1]}",
        "",
        f"I(expert; domain), the first less the second: {gap:+.3f} bits ({low:+.3f} to "
        f"{high:+.3f} by resampling rows, 95%): {verdict}.",
        "",
        _figures_table(both),
        "",
        *_shared_choices(one, other),
        "![figures by layer](compare.png)",
        "",
    ]
    text = "\n".join(lines)
    replace(workdir / "compare.md", text)
    return text


def information_interval(found: Analysis) -> tuple[float, float]:
    """95% of I(expert; domain), mean of layers, by resampling rows within their domains."""
    low, high = np.quantile(_resampled(found, 0), [0.025, 0.975])
    return float(low), float(high)


def _resampled(found: Analysis, seed: int) -> np.ndarray:
    """[resamples], centred on what was found: resampling adds information of its own."""
    own, rng = found.measured, np.random.default_rng(seed)
    counts = _by_row(found)
    L, D, E = own.by_domain.shape
    values = []
    for _ in range(_RESAMPLES // _AT_ONCE):
        drawn = np.zeros((_AT_ONCE, L, D, E))
        for number in range(D):
            rows = counts[own.domains == number].astype(np.float64)
            even = np.full(len(rows), 1 / len(rows))
            weights = rng.multinomial(len(rows), even, _AT_ONCE)
            drawn[:, :, number] = np.einsum("nr,rle->nle", weights, rows)
        values.append(np.asarray(information(drawn)).mean(axis=-1))
    found_values = np.concatenate(values)
    return found_values - found_values.mean() + own.figures["domain_information"].mean()


def _by_row(found: Analysis) -> np.ndarray:
    """int64 [rows, L, E], of rows of one length."""
    own, E = found.measured, found.num_experts
    L, tokens, _ = own.choices.shape
    rows = len(own.losses)
    apart = own.choices.reshape(L, rows, tokens // rows, -1).astype(np.int64)
    number = np.arange(rows)[None, :, None, None] * L + np.arange(L)[:, None, None, None]
    return np.bincount((number * E + apart).ravel(), minlength=rows * L * E).reshape(rows, L, E)


def _shared_choices(one: Analysis, other: Analysis) -> list[str]:
    """How alike two states of one model choose, where they have read the same tokens."""
    shapes = [found.measured.choices.shape for found in (one, other)]
    if shapes[0] != shapes[1] or one.num_experts != other.num_experts:
        return []
    shared = saturation(one.measured.choices, other.measured.choices)
    by_chance = shapes[0][-1] / one.num_experts
    return [
        f"Of a token's experts {shared.mean():.1%} are the same in both (by layer "
        f"{shared.min():.1%} to {shared.max():.1%}; by chance {by_chance:.1%}): the router's "
        "saturation, if the two are states of one model.",
        "",
    ]


def _figures_table(both: Mapping[str, Analysis]) -> str:
    rows = []
    for name, label in _FIGURES.items():
        cells = [label]
        for found in both.values():
            values = found.measured.figures[name]
            cells.append(f"{values.mean():.3g} ({values.min():.3g} to {values.max():.3g})")
        rows.append(cells)
    return markdown(["figure", *both], rows)


def _overload_line(found: Analysis) -> str:
    figures = found.measured.figures
    names = [name for name in figures if name.startswith("overload_")]
    names.sort(key=lambda name: int(name.removeprefix("overload_")))
    if not names:
        return ""
    listed = (f"{name.removeprefix('overload_')}: {figures[name].mean():.1%}" for name in names)
    return (
        "Shared out over devices, the experts' part of a step would wait for the busiest, and take "
        f"longer than evenly by, at devices: {', '.join(listed)}."
    )


def _shown(found: Analysis) -> list[int]:
    count = len(found.layers)
    return sorted({round(i) for i in np.linspace(0, count - 1, min(_SHOWN_LAYERS, count))})
