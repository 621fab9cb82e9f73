"""Checkpoint directory -> parameter tree, a tensor at a time."""

import concurrent.futures
import dataclasses
import difflib
import functools
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.checkpoint import names
from qwen_jax.checkpoint.nonfinite import all_finite, report_nonfinite
from qwen_jax.checkpoint.orbax_format import is_orbax, open_orbax
from qwen_jax.checkpoint.quantised import (
    FIELD,
    dequantised,
    drop_zero_biases,
    load_quantization,
    logical_tensors,
)
from qwen_jax.checkpoint.reader import Index, StoredTensor, bounds, open_checkpoint
from qwen_jax.checkpoint.regions import in_file_order, stored_shape, to_parameters
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import parameter_shapes
from qwen_jax.nn.quantized import QuantizedWeight

# Tensors in flight: one is converted while the next is read. It bounds the memory beside the
# parameters.
_READERS = 2

# Bytes compared in one go, so that the verdicts on them stay small beside the tensor.
_STEP = 1 << 22


def load_params(
    tensors: dict[names.Path, StoredTensor],
    directory: Path,
    dtype: jnp.dtype,
    allow_nonfinite: bool = True,
    shardings: Mapping[names.Path, NamedSharding] | None = None,
) -> dict[str, Any]:
    """Reads the parameters that `open_model` has found.

    Memory above the start stays under the parameters' size plus twice the largest tensor; with
    shardings, both of those of this process's shards. Two kinds of tensors can be cut along some
    axes only: of quantised weights all inputs of a shard's outputs are held, packed; of arrays that
    Orbax wrote itself, the chunks that a shard lies in. On a terminal, a progress bar is shown.

    Args:
      tensors: by their path in the tree.
      directory: that they come from, for messages.
      dtype: of the parameters, those aside that are packed or that `names.stays_float32`.
      allow_nonfinite: whether NaN and infinite weights are warned of; else they are refused.
      shardings: where each parameter lies, by the same paths; all processes call this. Packed ones
        have theirs by the axes of the weight that they stand for. None for the default device.

    Returns:
      The nested dict that `Decoder(config).apply` takes as "params".

    Raises:
      UserError: non-finite weights that are not allowed, packed arrays that cannot be cut as
        their weight would be.
    """
    bad: list[str] = []
    layouts = {
        path: _packed_layout("/".join(path), tensor, shardings[path])
        for path, tensor in (tensors.items() if shardings else ())
        if tensor.quantised
    }

    def load(path: names.Path) -> jax.Array | QuantizedWeight:
        tensor = tensors[path]
        if tensor.quantised:
            return _load_packed(tensor, layouts.get(path), bad)
        to = jnp.float32 if names.stays_float32(path) else dtype
        if shardings is None:
            return jax.device_put(_read(tensor, to, bad))
        return _place(
            tensor.shape, to, shardings[path], lambda index: _read(tensor[index], to, bad)
        )

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        loaded = pool.map(load, tensors)
        bar = tqdm.tqdm(loaded, "loading", len(tensors), unit="tensor", disable=None)
        params = names.unflatten(dict(zip(tensors, bar, strict=True)))
    if shardings is not None:
        bad = _of_all_processes(tensors.values(), bad)
    report_nonfinite(directory, bad, dtype, allow_nonfinite)
    return params


def _read(tensor: StoredTensor, dtype: jnp.dtype, bad: list[str]) -> np.ndarray:
    """The values as `dtype`; adds the names of parts of `tensor` that are not finite to `bad`."""
    host = _own_memory(tensor.shape, dtype, tensor)
    if not all_finite(host):
        parts = zip(tensor.parts, host, strict=True) if tensor.parts else ((tensor, host),)
        bad.extend(part.name for part, values in parts if not all_finite(values))
    return host


def _place(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    sharding: NamedSharding,
    read: Callable[[Index], np.ndarray],
) -> jax.Array:
    """The array whose shards `read` gives, each read once for all devices here that hold it."""
    found: dict[str, np.ndarray] = {}
    shards = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = bounds(index, shape)
        # Slices have no hash yet.
        key = str(index)
        if key not in found:
            found[key] = read(index)
        shards.append(jax.device_put(found[key], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)


# A packed array of a weight: its shape, dtype and where it lies.
_Layout = dict[str, tuple[tuple[int, ...], np.dtype, NamedSharding]]


def _packed_layout(name: str, tensor: StoredTensor, sharding: NamedSharding) -> _Layout:
    """The arrays of a packed weight by their field, each cut along the axes that the weight is.

    Raises:
      UserError: the inputs of one do not divide.
    """
    row = tensor.read((slice(0, 1),) * (len(tensor.shape) - 1))
    *outer, inputs = sharding.spec
    layout = {}
    for field in ("values", "scales", "zeros", "group_of"):
        array = getattr(row, field)
        if array is None:
            continue
        # The outputs have their groups in common.
        length = len(outer) - (field == "group_of")
        shape = (*tensor.shape[:length], array.shape[-1])
        place = NamedSharding(sharding.mesh, PartitionSpec(*outer[:length], inputs))
        try:
            place.shard_shape(shape)
        except ValueError:
            cut = inputs if isinstance(inputs, tuple) else (inputs,)
            by = " x ".join(f"{axis}:{sharding.mesh.shape[axis]}" for axis in cut)
            raise UserError(
                f"parameter {name}: the last axis of its packed {field} {list(shape)} does not "
                f"divide by {by}; give another mesh, or load it dense"
            ) from None
        layout[field] = (shape, array.dtype, place)
    return layout


def _load_packed(tensor: StoredTensor, layout: _Layout | None, bad: list[str]) -> QuantizedWeight:
    """The weight as it is packed, on the default device or laid out."""
    if layout is None:
        weight = jax.tree.map(lambda a: _own_memory(a.shape, a.dtype, a), tensor.read())
        _check_packed(tensor.name, weight, bad)
        return jax.device_put(weight)
    held: dict[str, QuantizedWeight] = {}

    def read(field: str, index: Index) -> np.ndarray:
        outputs = (slice(0, 1),) if field == "group_of" else ()
        rows = (*index[:-1], *outputs)
        key = str(rows)
        if key not in held:
            held[key] = tensor.read(rows)
            _check_packed(tensor.name, held[key], bad)
        values = getattr(held[key], field)[..., index[-1]]
        return _own_memory(values.shape, values.dtype, values)

    placed = {
        field: _place(shape, dtype, place, functools.partial(read, field))
        for field, (shape, dtype, place) in layout.items()
    }
    return next(iter(held.values())).replace(**placed)


def _check_packed(name: str, weight: QuantizedWeight, bad: list[str]) -> None:
    arrays = (weight.typed_values, weight.scales)
    floats = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    bad.extend([name] * (not all(map(all_finite, floats))))


def _of_all_processes(tensors: Iterable[StoredTensor], bad: list[str]) -> list[str]:
    """What any process has found, each having seen its own shards only."""
    if jax.process_count() == 1:
        return bad
    known = list({part.name: None for tensor in tensors for part in tensor.parts or (tensor,)})
    found = multihost_utils.process_allgather(np.isin(known, bad)).any(axis=0)
    return [name for name, is_bad in zip(known, found, strict=True) if is_bad]


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """What a directory holds of a model.

    Attributes:
      config: with the parts that only the tensors tell of (`names.fit_config`).
      tensors: the stored tensor of each parameter of `Decoder(config)`, by its path in the tree,
        in file order.
      left_out: names of tensors that belong to other towers of a vision-language model.
    """

    config: ModelConfig
    tensors: dict[names.Path, StoredTensor]
    left_out: tuple[str, ...] = ()


def open_model(config: ModelConfig, directory: Path, packed: bool = False) -> StoredModel:
    """Opens a Hugging Face or Orbax directory without reading any tensor.

    Args:
      config: as config.json has it.
      directory: holds the tensor files, and config.json with what it says of quantised weights.
      packed: whether the large matrices of a quantised checkpoint are read as they are stored,
        which needs one; else all of it is dequantised.

    Raises:
      UserError: unknown, missing, duplicate or misshapen tensors, broken files.
    """
    quantization = load_quantization(directory)
    if packed and quantization is None:
        raise UserError(f"{directory}: is not quantised, so that there are no packed weights")
    if is_orbax(directory):
        if quantization is not None:
            raise UserError(f"{directory}: quantised weights in Orbax format are not read")
        if any(directory.glob("*.safetensors")):
            raise UserError(f"{directory}: holds Orbax params and safetensors; keep one of them")
        return StoredModel(*open_orbax(config, directory))
    files = open_checkpoint(directory, quantised=quantization is not None)
    if quantization is not None:
        source = f"{directory / 'config.json'}: {FIELD}"
        files = logical_tensors(files, quantization, source)
    config = names.fit_config(config, files)
    stored = _by_canonical_name(config, directory, files)
    known = {tensor.name for tensor in stored.values()}
    regions = names.regions(config, names.layers_of_fused_experts(stored))
    stored = drop_zero_biases(stored, {region.name for region in regions})
    regions = _match_tensors(config, directory, stored, regions)
    tensors = {
        path: tensor if packed and names.is_projection(path) else dequantised(tensor)
        for path, tensor in to_parameters(regions, stored).items()
    }
    tensors = in_file_order(tensors, regions, stored)
    return StoredModel(config, tensors, tuple(name for name in files if name not in known))


def _by_canonical_name(
    config: ModelConfig, directory: Path, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    renamed: dict[str, StoredTensor] = {}
    for name, canonical in names.canonical_names(config, stored).items():
        if canonical in renamed:
            raise UserError(
                f"{directory}: {names.printable(name)} and "
                f"{names.printable(renamed[canonical].name)} are the same tensor; keep one"
            )
        if canonical is not None:
            renamed[canonical] = stored[name]
    return renamed


def _match_tensors(
    config: ModelConfig,
    directory: Path,
    stored: dict[str, StoredTensor],
    regions: list[names.Region],
) -> list[names.Region]:
    """`regions` by the names in use, after checking that both sides agree on every tensor."""
    head, embedding = names.TIED_HEAD
    second_copy = None
    if config.tie_word_embeddings and head in stored:
        if embedding in stored:
            _check_tied_head(directory, stored)
            second_copy = head
        else:
            regions = [
                dataclasses.replace(region, name=head) if region.name == embedding else region
                for region in regions
            ]

    wanted = dict.fromkeys(region.name for region in regions)
    missing = [name for name in wanted if name not in stored]
    unknown = [
        name
        for name in stored
        if not (name in wanted or name == second_copy or name.endswith(names.COMPUTED_SUFFIXES))
    ]
    if missing:
        near = difflib.get_close_matches(missing[0], unknown, n=1)
        hint = f" ({names.printable(near[0])} is there instead)" if near else ""
        raise UserError(
            f"{directory}: missing tensors for {config.family}: {names.listed(missing)}{hint}; "
            "config.json and the weights are not of the same model, or a file is incomplete"
        )
    if unknown:
        raise UserError(
            f"{directory}: unknown tensors for {config.family}: {names.listed(unknown)}; "
            "config.json and the weights are not of the same model"
        )
    shapes = parameter_shapes(config)
    for region in regions:
        expected = stored_shape(region, names.leaf_at(shapes, region.path).shape)
        tensor = stored[region.name]
        if tensor.shape != expected:
            raise UserError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json makes it {list(expected)}; they are not of the same model"
            )
    return regions


def _check_tied_head(directory: Path, stored: dict[str, StoredTensor]) -> None:
    """A tied model's second copy of its table must equal the first."""
    head, embedding = names.TIED_HEAD
    same = stored[head].shape == stored[embedding].shape and _same_bits(
        dequantised(stored[head]).read(), dequantised(stored[embedding]).read()
    )
    if not same:
        raise UserError(
            f"{directory}: tie_word_embeddings is true, yet {head} differs from {embedding}; "
            "set it to false in config.json, or remove the tensor"
        )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equality in which NaN equals itself."""
    if a.dtype != b.dtype:
        return False
    a, b = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    starts = range(0, a.size, _STEP)
    return all(np.array_equal(a[i : i + _STEP], b[i : i + _STEP]) for i in starts)


def _own_memory(
    shape: tuple[int, ...], dtype: jnp.dtype, source: StoredTensor | np.ndarray
) -> np.ndarray:
    """A copy of `source` in `dtype`, in whole pages of its own, which XLA on CPU takes as they are.

    numpy asks for huge pages, which a virtual machine may not hold yet: fetching them from its
    host takes several times as long as the copy.
    """
    dtype, size = np.dtype(dtype), math.prod(shape)
    pages = mmap.mmap(
        -1, max(size * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    out = np.frombuffer(pages, dtype, size).reshape(shape)
    if isinstance(source, StoredTensor):
        source.read_into(out)
    else:
        np.copyto(out, source)
    return out
