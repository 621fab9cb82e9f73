"""Checkpoint directory -> parameter tree, a tensor at a time."""

import concurrent.futures
import difflib
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tqdm

from qwen_jax.checkpoint import names
from qwen_jax.checkpoint.reader import StoredTensor, open_checkpoint
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import parameter_shapes

# Tensors in flight: one is converted while the next is read. It bounds the memory beside the
# parameters.
_READERS = 2

# XLA takes a host buffer as it is where it is aligned so.
_ALIGNMENT = 64


def load_params(
    config: ModelConfig,
    directory: Path,
    dtype: jnp.dtype,
    allow_nonfinite: bool = True,
) -> dict[str, Any]:
    """Reads the parameters of `Decoder(config)` from a Hugging Face directory.

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
    stored = open_checkpoint(directory)
    table = match_tensors(config, directory, stored)
    bad: list[str] = []

    def load(name: str) -> jax.Array:
        values = stored[name].read()
        host = _aligned_cast(values, dtype)
        if not _all_finite(host):
            bad.append(name)
        return jax.device_put(host)

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        # In file order, so that the disk is read in order.
        order = [name for name in stored if name in table]
        loaded = pool.map(load, order)
        bar = tqdm.tqdm(loaded, "loading", len(order), unit="tensor", disable=None)
        params = names.unflatten({table[name]: leaf for name, leaf in zip(order, bar, strict=True)})
    if bad:
        message = f"{directory}: NaN or infinite values in {names.listed(sorted(bad))}"
        if not allow_nonfinite:
            raise UserError(f"{message}; the checkpoint is damaged, or overflows as {dtype}")
        warnings.warn(message, stacklevel=2)
    return params


def match_tensors(
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
        hint = f"; {near[0]} is there instead" if near else ""
        raise UserError(f"{directory}: missing tensors: {names.listed(missing)}{hint}")
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
                f"config.json makes it {list(expected)}"
            )
    return table


def _check_tied_head(directory: Path, stored: dict[str, StoredTensor]) -> None:
    """A tied model's second copy of its table must equal the first."""
    head, embedding = names.TIED_HEAD
    # As bits, so that NaN equals itself.
    same = stored[head].shape == stored[embedding].shape and np.array_equal(
        stored[head].read().view(np.uint8), stored[embedding].read().view(np.uint8)
    )
    if not same:
        raise UserError(
            f"{directory}: tie_word_embeddings is true, yet {head} differs from {embedding}; "
            "set it to false in config.json, or remove the tensor"
        )


def _aligned_cast(values: np.ndarray, dtype: jnp.dtype) -> np.ndarray:
    """A copy in `dtype`, aligned so that XLA on CPU need not copy it again."""
    dtype = np.dtype(dtype)
    size = values.size * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    out = raw[offset : offset + size].view(dtype).reshape(values.shape)
    with np.errstate(over="ignore"):
        np.copyto(out, values, casting="unsafe")
    return out


def _all_finite(values: np.ndarray) -> bool:
    flat = values.reshape(-1)
    if values.dtype == np.float32:
        # One pass of BLAS; only its verdict "not finite" can be wrong, by overflow.
        with np.errstate(all="ignore"):
            return bool(np.isfinite(np.dot(flat, flat)) or np.isfinite(flat).all())
    exponent = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}[values.dtype]
    bits = flat.view(np.uint16)
    step = 1 << 20
    return not any(
        ((bits[i : i + step] & exponent) == exponent).any() for i in range(0, bits.size, step)
    )
