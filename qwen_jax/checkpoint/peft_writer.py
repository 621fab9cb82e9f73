"""A tree of low-rank updates -> an adapter in PEFT's directory format.

Where a published tensor is several parameters here, its adapter is theirs together: with `a` in
common as it was read, or, where they were trained apart, of a rank that is the sum of theirs, each
part's `b` with zeros in the others' place. So all can be written but what transformers has no
module for.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen_jax.checkpoint import names
from qwen_jax.checkpoint.peft_config import FILE
from qwen_jax.checkpoint.peft_names import (
    BASE_LAYER,
    EXPERTS,
    PREFIX,
    WEIGHTS,
    PublishedNames,
    Update,
)
from qwen_jax.checkpoint.reader import StoredTensor, in_memory
from qwen_jax.checkpoint.regions import to_stored
from qwen_jax.checkpoint.writer import gathered, new_directory, write_json, write_safetensors
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.nn.low_rank import LowRankWeight, low_rank_weights

# Linear layers whose names, in a model with experts, PEFT takes for those of experts: they are
# adapted as parameters. The router is a parameter in any case.
_MISTAKEN = ("gate", "gate_proj", "up_proj", "down_proj")


def save_adapter(
    directory: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    base_name: str = "",
) -> None:
    """Writes the adapter of `params` as a new directory that PEFT loads for transformers 5.

    Rank-stabilised scales are written as the plain alpha that amounts to the same. Experts are
    written as `target_parameters`, as transformers 5 holds them. Of several processes all call
    this, and the first writes.

    Args:
      directory: to create.
      config: of the model.
      params: with adapters, or an adapter by itself.
      base_name: of the model, a directory or a hub id, for base_model_name_or_path.

    Raises:
      UserError: `directory` exists, `params` have no adapter, or one for a layer that transformers
        has no module for.
    """
    leaves = dict(low_rank_weights(params))
    if not leaves:
        raise UserError(f"{directory}: the parameters have no adapter to save")
    known = PublishedNames(config)
    updates: dict[str, Update] = {}
    for name, regions in known.regions.items():
        if name in known.fused and any(region.path in leaves for region in regions):
            updates[name] = _join(regions, leaves, known)
    written = {region.path for name in updates for region in known.regions[name]}
    for path in leaves:
        if path[0] == "mtp" or path not in written:
            raise UserError(
                f"{'/'.join(path)}: has an adapter, and transformers has no module that PEFT could "
                "put it on; merge it into a checkpoint instead"
            )
    tensors: dict[str, StoredTensor] = {}
    for name, update in updates.items():
        a, b = update.a, update.b
        if a.ndim == 3:
            a = a.reshape(-1, a.shape[-1])
            b = b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        for part, values in (("A", a), ("B", b)):
            module = PREFIX + _module(name, updates)
            tensors[f"{module}.lora_{part}.weight"] = in_memory(np.ascontiguousarray(values))
    content = _config_of(updates, known, config.moe is not None, base_name)
    if jax.process_index() == 0:
        with new_directory(Path(directory).expanduser()) as partial:
            write_json(partial / FILE, content)
            write_safetensors(partial / WEIGHTS, tensors)
    multihost_utils.sync_global_devices(f"saved {directory}")


def _module(name: str, updates: Mapping[str, Update]) -> str:
    """The module that PEFT wraps for a published tensor."""
    container, _, last = name.rpartition(".")
    inner = last == EXPERTS[0] and f"{container}.{EXPERTS[1]}" in updates
    return container + BASE_LAYER * inner


def _join(
    regions: list[names.Region], leaves: Mapping[names.Path, LowRankWeight], known: PublishedNames
) -> Update:
    """One adapter of those of the parts of a published tensor."""
    parts = {r.path: _on_host(leaves[r.path]) for r in regions if r.path in leaves}
    first, *others = parts.values()
    scale = first.scale.flat[0]
    shared = len(parts) == len(regions) and all(
        np.array_equal(part.a, first.a) and np.array_equal(part.scale, first.scale)
        for part in others
    )
    ranks = [first.rank] if shared else [part.rank for part in parts.values()]
    a = first.a if shared else np.concatenate([part.a for part in parts.values()], axis=-2)
    stored, start = {}, 0
    for region in regions:
        whole = names.leaf_at(known.shapes, region.path).shape
        b = np.zeros((*whole[:-1], sum(ranks)), np.float32)
        if region.path in parts:
            part = parts[region.path]
            # PEFT has one scale for all experts.
            weighed = part.b * (part.scale / scale)[..., None, None]
            b[..., start : start + part.rank] = weighed
            start += 0 if shared else part.rank
        stored[region.path] = in_memory(b)
    (b,) = to_stored(regions, stored).values()
    return Update(a, b.read(), float(scale))


def _on_host(leaf: LowRankWeight) -> LowRankWeight:
    a, b, scale = (gathered(part).astype(np.float32) for part in (leaf.a, leaf.b, leaf.scale))
    return LowRankWeight(None, a, b, scale)


def _config_of(
    updates: Mapping[str, Update], known: PublishedNames, has_experts: bool, base_name: str
) -> dict[str, Any]:
    """The content of adapter_config.json."""

    def is_parameter(name: str) -> bool:
        last = name.removesuffix(".weight").rpartition(".")[2]
        return not name.endswith(".weight") or (has_experts and last in _MISTAKEN)

    everything = [*known.linear(), *(n for n in known.fused if n.endswith(EXPERTS))]
    modules = [name.removesuffix(".weight") for name in everything if not is_parameter(name)]
    parameters = [name for name in everything if is_parameter(name)]
    numbers = {
        name if is_parameter(name) else name.removesuffix(".weight"): (
            update.a.shape[-2],
            _alpha(update.scale, update.a.shape[-2]),
        )
        for name, update in updates.items()
    }
    (rank, alpha), _ = Counter(numbers.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _shortest([n for n in modules if n in numbers], modules, _last),
        "target_parameters": _shortest(
            [n for n in parameters if n in numbers], parameters, _in_layer
        ),
        "rank_pattern": _exceptions({n: r for n, (r, _) in numbers.items()}, rank),
        "alpha_pattern": _exceptions({n: alpha for n, (_, alpha) in numbers.items()}, alpha),
        "modules_to_save": None,
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _in_layer(name: str) -> str:
    """The name without the layer: "mlp.experts.down_proj"."""
    return re.sub(r"^.*\.\d+\.", "", name)


def _shortest(chosen: list[str], everything: list[str], short: Callable[[str], str]) -> list[str]:
    """Ends of names that PEFT takes for those that are chosen and no others."""
    ends = sorted({short(name) for name in chosen})
    taken = [n for n in everything if any(n == end or n.endswith(f".{end}") for end in ends)]
    return ends if taken == chosen else sorted(chosen)


def _exceptions(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """What is not as usual, by expressions of names; one for all layers where they agree."""
    by_end: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_end.setdefault(_in_layer(name), set()).add(value)
    return {
        re.escape(_in_layer(name) if len(by_end[_in_layer(name)]) == 1 else name): value
        for name, value in values.items()
        if value != usual
    }


def _alpha(scale: float, rank: int) -> float:
    """The alpha that makes this float32 scale at this rank, in few digits where they do."""
    exact = float(scale) * rank
    short = float(f"{exact:.7g}")
    alpha = short if np.float32(short / rank) == np.float32(scale) else exact
    return int(alpha) if alpha == int(alpha) else alpha
