"""Checkpoint directory -> parameter tree, a tensor at a time."""

import concurrent.futures
import dataclasses
import difflib
import math
import mmap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

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
from qwen_jax.checkpoint.reader import StoredTensor, open_checkpoint
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
) -> dict[str, Any]:
    """Reads the parameters that `open_model` has found.

    Memory above the start stays under the parameters' size plus twice the largest tensor. On a
    terminal, a progress bar is shown.

    Args:
      tensors: by their path in the tree.
      directory: that they come from, for messages.
      dtype: of the parameters, packed ones aside.
      allow_nonfinite: whether NaN and infinite weights are warned of; else they are refused.

    Returns:
      The nested dict that `Decoder(config).apply` takes as "params".

    Raises:
      UserError: non-finite weights that are not allowed.
    """
    bad: list[str] = []

    def load(tensor: StoredTensor) -> jax.Array | QuantizedWeight:
        if tensor.quantised:
            host = jax.tree.map(lambda a: _own_memory(a.shape, a.dtype, a), tensor.read())
            arrays = (host.typed_values, host.scales)
            floats = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
            bad.extend([tensor.name] * (not all(map(all_finite, floats))))
            return jax.device_put(host)
        host = _own_memory(tensor.shape, dtype, tensor)
        if not all_finite(host):
            parts = zip(tensor.parts, host, strict=True) if tensor.parts else ((tensor, host),)
            bad.extend(part.name for part, values in parts if not all_finite(values))
        return jax.device_put(host)

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        loaded = pool.map(load, tensors.values())
        bar = tqdm.tqdm(loaded, "loading", len(tensors), unit="tensor", disable=None)
        params = names.unflatten(dict(zip(tensors, bar, strict=True)))
    report_nonfinite(directory, bad, dtype, allow_nonfinite)
    return params


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
