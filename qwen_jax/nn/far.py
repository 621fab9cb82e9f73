"""Attention that counts distances exactly within a window only: two branches of one softmax.

Beyond the window distances stand still (ReRoPE), grow more slowly (leaky ReRoPE; Self-Extend,
arXiv 2401.01325), or only the first tokens of a text are seen at all, as if all between them and
the window were not there (StreamingLLM, arXiv 2309.17453). So no relative position is larger than
those that a model has learned.

Keys lie in the cache rotated by their own positions. Rotations add up: for the branch of far keys
they are turned on from there.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qwen_jax.config import FarSpec
from qwen_jax.nn.attend import Branch, Mask, Relation, merge
from qwen_jax.nn.int8_vectors import Vectors, dense
from qwen_jax.nn.kernels.choose import Kernels
from qwen_jax.nn.rope import Rotation, rotate


def query_places(spec: FarSpec, positions: jax.Array) -> jax.Array:
    """Where queries at `positions` (int, any shape) are rotated to for far keys; float32."""
    if spec.sinks:
        # Where the window follows the first tokens at once, as it does while nothing is left out.
        return jnp.minimum(positions, spec.sinks + spec.window - 1).astype(jnp.float32)
    return key_places(spec, positions) + spec.window - key_places(spec, jnp.array(spec.window))


def key_places(spec: FarSpec, positions: jax.Array) -> jax.Array:
    """Where far keys at `positions` (int, any shape) are rotated to; float32."""
    positions = positions.astype(jnp.float32)
    if spec.sinks:
        return positions
    if spec.stretch is None:
        return jnp.zeros_like(positions)
    places = positions / spec.stretch
    return jnp.floor(places) if spec.whole else places


def branches(mask: Mask) -> tuple[Branch, Branch]:
    """Of the keys within a mask's window and beyond it; there of group 0 only, if it has groups."""
    relation = None if mask.key_groups is None else Relation.SAME
    return Branch(), Branch(relation, beyond=True)


def turned(k: Vectors, turn: Rotation | None) -> Vectors:
    """Keys for queries that they are far from."""
    return k if turn is None else rotate(dense(k), turn)


def far_attend(
    queries: tuple[jax.Array, jax.Array],
    k: Vectors,
    v: Vectors,
    mask: Mask,
    turn: Rotation | None,
    kernels: Kernels,
) -> jax.Array:
    """One softmax over the keys of a window and those beyond it.

    While no text is longer than the window this is attention with the first of `queries`, at its
    cost.

    Args:
      queries: rotated to their positions, and to `query_places`, each [B, T, H, d].
      k, v: [B, S, K, d], keys rotated to their positions.
      mask: with a window; and with groups where beyond it only some keys are seen, those of the
        queries' group.
      turn: from the keys' positions to `key_places`, [B, S, r/2]; None where those are the same.
      kernels: what computes the branches.

    Returns:
      [B, T, H, d] in the queries' dtype.
    """
    within, beyond = branches(mask)
    own = kernels.attend(queries[0], k, v, within.mask(mask))
    mask = beyond.mask(mask)

    def with_far() -> jax.Array:
        # Queries stand a window before their own slots.
        out_of_order = dataclasses.replace(kernels, in_order=False)
        far = out_of_order.attend(queries[1], turned(k, turn), v, mask)
        return merge(*zip(own, far, strict=True))[0]

    return jax.lax.cond(jnp.any(mask.query_slots >= 0), with_far, lambda: own[0])
