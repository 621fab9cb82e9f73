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
from qwen_jax.nn.attend import Mask, Relation, merge
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


def far_attend(
    queries: tuple[jax.Array, jax.Array],
    k: Vectors,
    v: Vectors,
    mask: Mask,
    turn: Rotation | None,
    key_groups: jax.Array | None,
    kernels: Kernels,
) -> jax.Array:
    """One softmax over the keys of a window and those beyond it.

    While no text is longer than the window this is attention with the first of `queries`, at its
    cost.

    Args:
      queries: rotated to their positions, and to `query_places`, each [B, T, H, d].
      k, v: [B, S, K, d], keys rotated to their positions.
      mask: of the keys within the window, which it has.
      turn: from the keys' positions to `key_places`, [B, S, r/2]; None where those are the same.
      key_groups: int32 [B, S], 0 for keys that are seen beyond the window; None for all.
      kernels: what computes the branches.

    Returns:
      [B, T, H, d] in the queries' dtype.
    """
    own = kernels.attend(queries[0], k, v, mask)
    beyond = mask.replace(query_slots=mask.query_slots - mask.window, window=None)
    if key_groups is not None:
        beyond = beyond.replace(
            query_groups=jnp.zeros_like(mask.query_slots),
            key_groups=key_groups,
            relation=Relation.SAME,
        )

    def with_far() -> jax.Array:
        keys = k if turn is None else rotate(dense(k), turn)
        # Queries stand a window before their own slots.
        out_of_order = dataclasses.replace(kernels, in_order=False)
        far = out_of_order.attend(queries[1], keys, v, beyond)
        return merge(*zip(own, far, strict=True))[0]

    return jax.lax.cond(jnp.any(beyond.query_slots >= 0), with_far, lambda: own[0])
