"""Logits of a block of tokens at a time, over a vocabulary that devices may share out.

What stands here runs on a device's shard, within `sharding.axes.on_shards`: its tokens [b, t] and
its rows [v, D] of the output head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.nn.linear import linear
from qwen_jax.sharding.axes import TOKENS, Layout

HEAD = ("vocabulary", None)


def mesh_axes(layout: Layout | None, *logical: str) -> tuple[str, ...]:
    """The mesh axes that logical axes are cut along; none without a mesh."""
    return () if layout is None else layout.axes_of(*logical)


def in_blocks(
    function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, arrays: Any, block_size: int
) -> tuple[Any, Any]:
    """A scan over blocks of tokens.

    Args:
      function: of the carry and a block, [n, ...] of each array, the new carry and arrays
        [n, ...]. The last block is filled up with zeros.
      carry: to begin with.
      arrays: a pytree of [b, t, ...].
      block_size: n, or all tokens where they are fewer.

    Returns:
      The last carry, and [b, t, ...] of what `function` returned besides.
    """
    shape = jax.tree.leaves(arrays)[0].shape[:2]
    count = shape[0] * shape[1]
    size = min(block_size, count)

    def cut(a: jax.Array) -> jax.Array:
        a = a.reshape(count, *a.shape[2:])
        a = jnp.pad(a, ((0, -count % size), *[(0, 0)] * (a.ndim - 1)))
        return a.reshape(-1, size, *a.shape[1:])

    def join(a: jax.Array) -> jax.Array:
        return a.reshape(-1, *a.shape[2:])[:count].reshape(*shape, *a.shape[2:])

    carry, made = jax.lax.scan(function, carry, jax.tree.map(cut, arrays))
    return carry, jax.tree.map(join, made)


def logits_of(x: jax.Array, head: jax.Array, temperature: float = 1.0) -> jax.Array:
    """float32 [n, v], divided by the temperature."""
    return linear(x, head, out_dtype=jnp.float32) / temperature


def log_denominator(logits: jax.Array, layout: Layout | None) -> jax.Array:
    """The logarithm [n] of the softmax's denominator, over all devices' shares."""
    return exponentials_of(logits, layout)[2]


def exponentials_of(
    logits: jax.Array, layout: Layout | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The softmax before its division, for whoever would else take exponentials again.

    Returns:
      Exponentials [n, v] of the logits less the largest of a token; their sum [n] over all devices'
      shares; and the logarithm [n] of the softmax's denominator.
    """
    across = mesh_axes(layout, "vocabulary")
    peak = jax.lax.pmax(logits.max(axis=-1), across)
    exponentials = jnp.exp(logits - peak[:, None])
    total = jax.lax.psum(exponentials.sum(axis=-1), across)
    return exponentials, total, peak + jnp.log(total)


def sum_vocabulary(values: jax.Array, layout: Layout | None) -> jax.Array:
    """The sum [n] over the vocabulary of values [n, v], over all devices' shares."""
    return jax.lax.psum(values.sum(axis=-1), mesh_axes(layout, "vocabulary"))


def of_targets(logits: jax.Array, targets: jax.Array, layout: Layout | None) -> jax.Array:
    """The targets' logits [n]; NaN of one outside the vocabulary."""
    across = mesh_axes(layout, "vocabulary")
    share = logits.shape[-1]
    column = targets - _first(share, across)
    here = (column >= 0) & (column < share)
    chosen = jnp.take_along_axis(logits, jnp.where(here, column, 0)[:, None], axis=1)[:, 0]
    chosen = jax.lax.psum(jnp.where(here, chosen, 0), across)
    vocab_size = share * (jax.lax.axis_size(across) if across else 1)
    return jnp.where((targets >= 0) & (targets < vocab_size), chosen, jnp.nan)


def is_target(targets: jax.Array, share: int, layout: Layout | None) -> jax.Array:
    """bool [n, v], which of a device's `share` columns is each target's."""
    first = _first(share, mesh_axes(layout, "vocabulary"))
    return jnp.arange(share) == (targets - first)[:, None]


def back_through_logits(
    dlogits: jax.Array, x: jax.Array, head: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `x @ head.T`, float32 [n, D] and [v, D], from rounded ones of the logits."""
    dlogits = dlogits.astype(x.dtype)
    multiply = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    dx = multiply(dlogits, head, (((1,), (0,)), ((), ())))
    return dx, multiply(dlogits, x, (((0,), (0,)), ((), ())))


def reduce_gradients(
    dx: jax.Array, dhead: jax.Array, layout: Layout | None
) -> tuple[jax.Array, jax.Array]:
    """The sums over devices of gradients, the head's cut as the weight is stored.

    One reduction after all blocks; out of the shards they are `HIDDEN` and
    ("vocabulary", "hidden").
    """
    dx = jax.lax.psum(dx, mesh_axes(layout, "vocabulary"))
    stored = mesh_axes(layout, "hidden")
    # Tokens lie along that axis too.
    if stored:
        dhead = jax.lax.psum_scatter(dhead, stored, scatter_dimension=1, tiled=True)
    others = tuple(axis for axis in mesh_axes(layout, *TOKENS) if axis not in stored)
    return dx, jax.lax.psum(dhead, others)


def weighted_sums(
    block: Callable[..., tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]],
    x: jax.Array,
    head: jax.Array,
    others: tuple[jax.Array, ...],
    weights: jax.Array,
    *,
    block_size: int,
    layout: Layout | None,
    gradients: bool,
) -> tuple[jax.Array, ...]:
    """The sums over tokens of three terms by weight, and the gradients of the first.

    Args:
      block: of a block of `x` and of each of `others`, [n, ...], the terms, [n] each, and the
        gradients [n, v] of the first by the logits, which without `gradients` nothing computes.
      x: [b, t, D].
      head: [v, D].
      others: [b, t, ...].
      weights: float32 [b, t]; where one is 0 the terms may be anything.
      block_size: as for `in_blocks`.
      layout: of the tokens and the head.
      gradients: whether they are made.

    Returns:
      float32 [] three times, of all devices' tokens; with gradients, those by `x` and `head` as
      `reduce_gradients` returns them.
    """

    def body(carry: Any, arrays: Any) -> tuple[Any, Any]:
        sums, dhead = carry
        x, weights, *others = arrays
        terms, dlogits = block(x, *others)
        sums += jnp.where(weights != 0, weights * jnp.stack(terms), 0).sum(axis=1)
        if not gradients:
            return (sums, dhead), None
        dx, more = back_through_logits(weights[:, None] * dlogits, x, head)
        return (sums, dhead + more), dx

    dhead = jnp.zeros(head.shape, jnp.float32) if gradients else None
    start, arrays = (jnp.zeros(3, jnp.float32), dhead), (x, weights, *others)
    (sums, dhead), dx = in_blocks(body, start, arrays, block_size)
    sums = tuple(jax.lax.psum(sums, mesh_axes(layout, *TOKENS)))
    return (*sums, *reduce_gradients(dx, dhead, layout)) if gradients else sums


def _first(share: int, across: tuple[str, ...]) -> jax.Array | int:
    return jax.lax.axis_index(across) * share if across else 0
