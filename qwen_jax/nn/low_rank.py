"""Weights with a low-rank update beside them: LoRA (arXiv 2106.09685).

An adapter is a tree like the parameters' that has the adapted weights only, as `LowRankWeight`
without a base. `attach` lays it over parameters, whose arrays it shares, `detach` takes it off.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.nn.quantized import QuantizedWeight, dequantize

Array = jax.Array | np.ndarray
Tree = Mapping[str, Any]


@flax.struct.dataclass
class LowRankWeight:
    """The weight [..., out, in] that is `base + scale * b @ a`, its parts kept apart.

    All arrays share the leading axes, so that layers and experts are stacked and taken as if it
    were one array. `scale` is an array, so that adapters that differ in it share their programs.

    Attributes:
      base: [..., out, in], dense or packed; None in an adapter by itself.
      a: [..., r, in].
      b: [..., out, r].
      scale: float32 [...], alpha / r or, rank-stabilised (arXiv 2312.03732), alpha / sqrt(r).
    """

    base: Array | QuantizedWeight | None
    a: Array
    b: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., out, in] of the weight that this stands for."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    @property
    def ndim(self) -> int:
        """Axes of the weight that this stands for."""
        return self.b.ndim

    @property
    def dtype(self) -> np.dtype:
        """The base's; without one the adapter's own."""
        return self.b.dtype if self.base is None else self.base.dtype

    @property
    def rank(self) -> int:
        """How many rows `a` has."""
        return self.b.shape[-1]


def base_of(weight: Any) -> Any:
    """The weight without its low-rank update, if it has one."""
    return weight.base if isinstance(weight, LowRankWeight) else weight


def add_update(y: jax.Array, update: jax.Array, scale: jax.Array) -> jax.Array:
    """`y + scale * update` in y's dtype, rounded where PyTorch rounds."""
    update = (update.astype(jnp.float32) * scale).astype(update.dtype)
    return (y + update).astype(y.dtype)


def cast(params: Any, dtype: jnp.dtype) -> Any:
    """`params` to compute with in `dtype`; packed weights and the scales of updates stay."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, QuantizedWeight):
            return leaf
        if isinstance(leaf, LowRankWeight):
            a, b = leaf.a.astype(dtype), leaf.b.astype(dtype)
            return leaf.replace(base=one(leaf.base), a=a, b=b)
        return leaf.astype(dtype)

    return jax.tree.map(one, params, is_leaf=is_weight)


def attach(params: Tree, adapter: Tree) -> dict[str, Any]:
    """`params` with an adapter laid over them; both stay as they are.

    Raises:
      UserError: the adapter is not for these parameters, or one of them has an adapter already.
    """
    weights = _flat(params)
    for path, update in low_rank_weights(adapter):
        name = "/".join(path)
        if path not in weights:
            raise UserError(f"the adapter is for {name}, which the model has not")
        if isinstance(weights[path], LowRankWeight):
            raise UserError(f"parameter {name} has an adapter already; merge it or detach it first")
        if weights[path].shape != update.shape:
            raise UserError(
                f"the adapter makes {name} {list(update.shape)}, the model "
                f"{list(weights[path].shape)}; they are not of the same model"
            )
        weights[path] = update.replace(base=weights[path])
    return flax.traverse_util.unflatten_dict(weights)


def detach(params: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters without their adapter, and the adapter."""
    adapter = {path: leaf.replace(base=None) for path, leaf in low_rank_weights(params)}
    plain = {path: base_of(leaf) for path, leaf in _flat(params).items()}
    unflatten = flax.traverse_util.unflatten_dict
    return unflatten(plain), unflatten(adapter)


def merge(params: Tree, dtype: jnp.dtype | None = None) -> dict[str, Any]:
    """`params` with each update added to its base in float32, as one dense array.

    Args:
      params: with adapters. A packed base is dequantised, since rounding the sum to its few bits
        would lose most of a small update; other packed weights stay packed.
      dtype: of the merged weights; None for the base's, which of a packed one is its scales'.
    """
    weights = _flat(params)
    for path, leaf in low_rank_weights(params):
        weights[path] = _added(leaf, 1, dtype or leaf.dtype)
    return flax.traverse_util.unflatten_dict(weights)


def unmerge(params: Tree, adapter: Tree) -> dict[str, Any]:
    """The inverse of `merge` for dense bases, to the rounding of two additions in their dtype."""
    weights = _flat(attach(params, adapter))
    for path, _ in low_rank_weights(adapter):
        leaf = weights[path]
        weights[path] = leaf.replace(base=_added(leaf, -1, leaf.dtype))
    return flax.traverse_util.unflatten_dict(weights)


def merged(leaf: LowRankWeight, dtype: jnp.dtype) -> jax.Array:
    """The dense weight that `leaf` stands for, added up in float32."""
    return _added(leaf, 1, dtype)


def low_rank_weights(tree: Tree) -> Iterator[tuple[tuple[str, ...], LowRankWeight]]:
    """Every adapted weight of a nested dict, with its path."""
    for path, leaf in _flat(tree).items():
        if isinstance(leaf, LowRankWeight):
            yield path, leaf


def _added(leaf: LowRankWeight, sign: int, dtype: jnp.dtype) -> jax.Array:
    base = leaf.base
    if isinstance(base, QuantizedWeight):
        base = dequantize(base, jnp.float32)
    a, b = (jnp.asarray(part, jnp.float32) for part in (leaf.a, leaf.b))
    # A merged weight is for good: no accelerator's shorter products.
    product = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    update = sign * leaf.scale[..., None, None] * product
    return (jnp.asarray(base, jnp.float32) + update).astype(dtype)


def _flat(tree: Tree) -> dict[tuple[str, ...], Any]:
    return flax.traverse_util.flatten_dict(dict(tree))


def is_weight(node: Any) -> bool:
    """Whether a node of a parameter tree is a weight that is no array by itself."""
    return isinstance(node, QuantizedWeight | LowRankWeight)
