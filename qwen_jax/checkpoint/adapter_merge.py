"""Adapters merged into tensors as they are read, so that a checkpoint streams."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_jax.checkpoint import names
from qwen_jax.checkpoint.reader import Index, StoredTensor, bounds
from qwen_jax.checkpoint.regions import stack
from qwen_jax.nn.low_rank import low_rank_weights


def merge_into(
    tensors: Mapping[names.Path, StoredTensor],
    adapter: Mapping[str, Any],
    dtype: np.dtype | None = None,
) -> dict[names.Path, StoredTensor]:
    """The parameters with the updates of an adapter added to their bases in float32.

    Args:
      tensors: dense, by their path in the tree.
      adapter: as `load_adapter` returns it.
      dtype: of those that have an update; None for what they are stored in.
    """
    merged = dict(tensors)
    for path, leaf in low_rank_weights(adapter):
        a, b, scale = (np.asarray(part, np.float32) for part in (leaf.a, leaf.b, leaf.scale))
        merged[path] = _merged(tensors[path], a, b, scale, dtype or tensors[path].dtype)
    return merged


def _merged(
    tensor: StoredTensor, a: np.ndarray, b: np.ndarray, scale: np.ndarray, dtype: np.dtype
) -> StoredTensor:
    if tensor.parts:
        experts = zip(tensor.parts, a, b, scale, strict=True)
        return stack([_merged(*expert, dtype) for expert in experts])
    shape = tensor.shape

    def read(index: Index = ()) -> np.ndarray:
        *outer, rows, columns = bounds(index, shape)
        base = tensor.read((*outer, rows, columns)).astype(np.float32)
        update = b[(*outer, rows)] @ a[(*outer, slice(None), columns)]
        with np.errstate(over="ignore"):
            return (base + scale[tuple(outer)][..., None, None] * update).astype(dtype)

    return dataclasses.replace(tensor, dtype=np.dtype(dtype), read=read)
