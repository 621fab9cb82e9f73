"""Checkpoint directory -> parameter tree, a tensor at a time."""

import concurrent.futures
import difflib
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
from qwen_jax.checkpoint.reader import StoredTensor, open_checkpoint
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import parameter_shapes

# Tensors in flight: one is converted while the next is read. It bounds the memory beside the
# parameters.
_READERS = 2

# Bytes compared in one go, so that the verdicts on them stay small beside the tensor.
_STEP = 1 << 22


def load_params(
    config: ModelConfig,
    directory: Path,
    dtype: jnp.dtype,
    allow_nonfinite: bool = True,
) -> dict[str, Any]:
    """Reads the parameters of `Decoder(config)` from a Hugging Face or Orbax directory.

    Memory above the start stays under the parameters' size plus twice the largest tensor. On a
    terminal, a progress bar is shown.

    Args:
      config: the model.
      directory: holds the tensor files.
      dtype: of the parameters.
      allow_nonfinite: whether NaN and infinite weights are warned of; else they are refused.

    Returns:
      The nested dict that `Decoder(config).apply` takes as "params".

    Raises:
      UserError: unknown, missing, duplicate or misshapen tensors, broken files.
    """
    tensors = open_model(config, directory)
    bad: list[str] = []

    def load(tensor: StoredTensor) -> jax.Array:
        host = _cast_to_own_memory(tensor.read(), dtype)
        if not all_finite(host):
            bad.append(tensor.name)
        return jax.device_put(host)

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        loaded = pool.map(load, tensors.values())
        bar = tqdm.tqdm(loaded, "loading", len(tensors), unit="tensor", disable=None)
        params = names.unflatten(dict(zip(tensors, bar, strict=True)))
    report_nonfinite(directory, bad, dtype, allow_nonfinite)
    return params


def open_model(config: ModelConfig, directory: Path) -> dict[names.Path, StoredTensor]:
    """The stored tensor of each parameter of `Decoder(config)`, by its path in the tree.

    They are in file order, so that the disk is read in order.

    Raises:
      UserError: unknown, missing, duplicate or misshapen tensors, broken files.
    """
    if is_orbax(directory):
        if any(directory.glob("*.safetensors")):
            raise UserError(f"{directory}: holds Orbax params and safetensors; keep one of them")
        return open_orbax(config, directory)
    stored = open_checkpoint(directory)
    table = _match_tensors(config, directory, stored)
    return {table[name]: tensor for name, tensor in stored.items() if name in table}


def _match_tensors(
    config: ModelConfig, directory: Path, stored: dict[str, StoredTensor]
) -> dict[str, names.Path]:
    """Stored name -> path in the tree, after checking that both sides agree on every tensor."""
    table = names.tensor_names(config)
    head, embedding = names.TIED_HEAD
    second_copy = None
    if config.tie_word_embeddings and head in stored:
        if embedding in stored:
            _check_tied_head(directory, stored)
            second_copy = head
        else:
            table = {head if name == embedding else name: path for name, path in table.items()}

    missing = [name for name in table if name not in stored]
    unknown = [
        name
        for name in stored
        if not (name in table or name == second_copy or name.endswith(names.COMPUTED_SUFFIXES))
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
    for name, path in table.items():
        expected = names.leaf_at(shapes, path).shape
        if stored[name].shape != expected:
            raise UserError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, "
                f"config.json makes it {list(expected)}; they are not of the same model"
            )
    return table


def _check_tied_head(directory: Path, stored: dict[str, StoredTensor]) -> None:
    """A tied model's second copy of its table must equal the first."""
    head, embedding = names.TIED_HEAD
    same = stored[head].shape == stored[embedding].shape and _same_bits(
        stored[head].read(), stored[embedding].read()
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


def _cast_to_own_memory(values: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """A copy in `dtype`, in whole pages of its own, which XLA on CPU takes as they are.

    numpy asks for huge pages, which a virtual machine may not hold yet: fetching them from its
    host takes several times as long as the copy.
    """
    dtype = np.dtype(dtype)
    pages = mmap.mmap(
        -1, max(values.size * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    out = np.frombuffer(pages, dtype, values.size).reshape(values.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, values, casting="unsafe")
    return out
