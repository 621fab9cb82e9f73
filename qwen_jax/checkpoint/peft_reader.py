"""An adapter in PEFT's directory format -> a tree of low-rank updates.

Where a published tensor is several parameters here, its adapter is too: they have `a` in common,
and each has its rows of `b`.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.checkpoint import names
from qwen_jax.checkpoint.nonfinite import all_finite, report_nonfinite
from qwen_jax.checkpoint.peft_config import FILE, PeftConfig, read_peft_config
from qwen_jax.checkpoint.peft_names import (
    BASE_LAYER,
    EXPERTS,
    PREFIX,
    WEIGHTS,
    PublishedNames,
    Update,
)
from qwen_jax.checkpoint.reader import StoredTensor, in_memory, open_safetensors
from qwen_jax.checkpoint.regions import to_parameters
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.nn.low_rank import LowRankWeight
from qwen_jax.sharding.axes import parameter_sharding

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


def load_adapter(
    directory: str | Path, config: ModelConfig, mesh: Mesh | None = None
) -> dict[str, Any]:
    """An adapter that PEFT or `save_adapter` has written, for `nn.low_rank.attach`.

    What PEFT computes with it in evaluation is computed here; `lora_dropout` is of training only.
    Matrices become float32, as PEFT makes them.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      config: of the model that it is for.
      mesh: where its arrays are to lie; None for the default device.

    Raises:
      UserError: files that are missing or broken, settings that are not honoured, tensors that are
        missing, unknown, misshapen or not finite, by name.
    """
    directory = Path(directory).expanduser()
    peft = read_peft_config(directory)
    known = PublishedNames(config)
    updates = _read_updates(directory, peft, known)
    regions = [
        region for name, found in known.regions.items() if name in updates for region in found
    ]
    _check_stacks(directory, regions, known)

    def parts(field: str, found: list[names.Region]) -> dict[names.Path, StoredTensor]:
        stored = {name: in_memory(getattr(update, field)) for name, update in updates.items()}
        return to_parameters(found, stored)

    # All rows of a published tensor share `a`.
    a = parts("a", [dataclasses.replace(region, rows=None) for region in regions])
    b = parts("b", regions)
    scales: dict[names.Path, list[float]] = {}
    for region in regions:
        scales.setdefault(region.path, []).append(updates[region.name].scale)

    def place(path: names.Path, part: str, values: np.ndarray) -> jax.Array:
        if mesh is None:
            return jax.device_put(values)
        sharding = parameter_sharding(config, mesh, "/".join((*path, part)))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    leaves = {}
    for path in b:
        outer = b[path].shape[:-2]
        scale = np.broadcast_to(np.float32(scales[path] if outer else scales[path][0]), outer)
        leaves[path] = LowRankWeight(
            base=None,
            a=place(path, "a", a[path].read()),
            b=place(path, "b", b[path].read()),
            scale=place(path, "scale", np.array(scale)),
        )
    return names.unflatten(leaves)


def _read_updates(directory: Path, peft: PeftConfig, known: PublishedNames) -> dict[str, Update]:
    """By the published tensors' names, in the table's spelling."""
    path = directory / WEIGHTS
    if not path.is_file():
        if (directory / "adapter_model.bin").is_file():
            raise UserError(
                f"{directory}: adapter_model.bin is not read; save the adapter as {WEIGHTS}"
            )
        raise UserError(f"{path}: no such file; download the adapter again")
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in open_safetensors(path).items():
        match = _TENSOR.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            raise UserError(
                f"{path}: tensor {names.printable(name)} is not one of a LoRA of linear layers "
                "(lora_A and lora_B); embeddings, magnitudes and whole modules are not read"
            )
        pairs.setdefault(match["module"], {})[match["part"]] = tensor
    if not pairs:
        raise UserError(f"{path}: holds no adapter")
    updates: dict[str, Update] = {}
    targets: dict[str, str] = {}
    bad: list[str] = []
    for module, pair in pairs.items():
        target = _target(path, module, peft, known)
        name = names.known_name(target, known.regions)
        missing = {"A", "B"} - pair.keys()
        if missing:
            raise UserError(f"{path}: {module} has no lora_{missing.pop()}; download it again")
        if name in updates:
            raise UserError(f"{path}: {module} is there twice, under two names; keep one")
        targets[name] = target
        # PEFT's patterns are of modules, or of parameters where those are what it adapts.
        key = target if peft.targets_parameter(target) else target.removesuffix(".weight")
        updates[name] = _read_update(path, key, pair["A"], pair["B"], known.shape(name), peft)
        bad += [t.name for t in pair.values() if not all_finite(np.asarray(t.read()))]
    report_nonfinite(directory, bad, np.dtype(np.float32), allowed=False)
    _check_complete(path, peft, known, targets)
    return updates


def _target(path: Path, module: str, peft: PeftConfig, known: PublishedNames) -> str:
    """The whole name, as the file has it, of the tensor that a module's matrices are for."""
    container = module.removesuffix(BASE_LAYER)
    adapted = [f"{container}.{n}" for n in EXPERTS if peft.targets_parameter(f"{container}.{n}")]
    if module != container or adapted:
        # The innermost wrapper is the first's; the outermost has the module's own name.
        inner = module != container
        if len(adapted) != 2 and (inner or len(adapted) != 1):
            raise UserError(
                f"{path}: {module} is not what target_parameters of {FILE} name; they disagree"
            )
        target = adapted[0 if inner else -1]
    else:
        target = f"{module}.weight"
        if not (peft.targets_module(module) or peft.targets_parameter(target)):
            raise UserError(
                f"{path}: {module} is not among the targets of {FILE}; they disagree, and PEFT "
                "would leave it out"
            )
    name = names.known_name(target, known.regions)
    if name is None:
        raise UserError(
            f"{path}: {names.printable(module)} is no linear layer of this model; "
            "the adapter is for another one"
        )
    if known.regions[name][0].unit_axis or name.endswith("embed_tokens.weight"):
        raise UserError(f"{path}: {module} is no linear layer, and adapters of others are not read")
    return target


def _read_update(
    path: Path,
    key: str,
    a: StoredTensor,
    b: StoredTensor,
    shape: tuple[int, ...],
    peft: PeftConfig,
) -> Update:
    *outer, n_out, n_in = shape
    rank, experts = peft.rank_of(key), outer[0] if outer else 1
    for tensor, expected in ((a, (rank * experts, n_in)), (b, (n_out, rank * experts))):
        if tensor.shape != expected:
            raise UserError(
                f"{path}: tensor {tensor.name} has shape {list(tensor.shape)}, the model and rank "
                f"{rank} make it {list(expected)}; they are not of the same model, or {FILE} is "
                "not the adapter's"
            )
    a, b = (np.asarray(tensor.read()).astype(np.float32) for tensor in (a, b))
    if outer:
        a = a.reshape(experts, rank, n_in)
        b = np.ascontiguousarray(b.reshape(n_out, rank, experts).transpose(2, 0, 1))
    return Update(a, b, peft.scale_of(key))


def _check_complete(
    path: Path, peft: PeftConfig, known: PublishedNames, targets: Mapping[str, str]
) -> None:
    """Refuses a file without a module that the configuration names; `targets` are those it has."""
    if not isinstance(peft.target_modules, tuple):
        # An expression may be written for more than one architecture.
        return
    # Names of the table begin with "model.", the file's as its base model's do.
    start, spelled = "model.", "model."
    for name, target in targets.items():
        if name.startswith(start):
            spelled = target.removesuffix(name.removeprefix(start))
    for name in known.linear():
        module = name.removesuffix(".weight")
        own = spelled + module.removeprefix(start) if module.startswith(start) else module
        if name not in targets and peft.targets_module(own):
            raise UserError(
                f"{path}: lacks {own}, which is among the targets of {FILE}; download it again"
            )


def _check_stacks(directory: Path, regions: list[names.Region], known: PublishedNames) -> None:
    """Refuses adapters for some experts of a layer only, or for both layouts of them."""
    found: dict[names.Path, list[int | None]] = {}
    for region in regions:
        found.setdefault(region.path, []).append(region.expert)
    for path, experts in found.items():
        count = names.leaf_at(known.shapes, path).shape[0]
        complete = experts == [None] or experts == list(range(count))
        if not complete:
            raise UserError(
                f"{directory}: has adapters for {len(experts)} of the {count} experts of "
                f"{'/'.join(path[:-1])}, in one layout or in two; all are needed, once"
            )
