"""Dual Chunk Attention (arXiv 2402.17463): long texts without unseen relative positions.

The text is cut into chunks of c = chunk_size - local_size tokens. Keys are rotated by their place
in their chunk. Queries are rotated three times: for the keys of their own chunk, of the chunk
before, and of all older ones. Distances are exact within a chunk, and up to local_size across its
edge; none is larger than chunk_size. The three are branches of one softmax.

The scale that grows with the logarithm of the text's length is that of Qwen2.5-1M
(arXiv 2501.15383).
"""

import jax
import jax.numpy as jnp

from qwen_jax.config import DualChunkSpec
from qwen_jax.nn.attend import Branch, Mask, Relation, merge
from qwen_jax.nn.int8_vectors import Vectors
from qwen_jax.nn.kernels.choose import PLAIN, Kernels

# Which chunks of keys each rotation of a query is for, in order.
BRANCHES = tuple(Branch(r) for r in (Relation.SAME, Relation.PREVIOUS, Relation.OLDER))


def key_positions(spec: DualChunkSpec, positions: jax.Array) -> jax.Array:
    """Where keys at `positions` (int, any shape) are rotated to."""
    return positions % _chunk_length(spec)


def query_positions(
    spec: DualChunkSpec, positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where queries at `positions` (int, any shape) are rotated to, for keys of each distance.

    Returns:
      Three arrays of that shape: for keys of the query's chunk, of the chunk before, and of those
      before that.
    """
    length = _chunk_length(spec)
    intra = positions % length
    successive = jnp.minimum(intra + length, spec.chunk_size)
    inter = jnp.full_like(intra, min(2 * length - 1, spec.chunk_size))
    return intra, successive, inter


def chunks(spec: DualChunkSpec, positions: jax.Array) -> jax.Array:
    """The chunk of each of `positions`, counted from 0."""
    return positions // _chunk_length(spec)


def length_scale(spec: DualChunkSpec, lengths: jax.Array) -> jax.Array:
    """What keys, before they are cached, and the scale of scores are each multiplied by.

    Args:
      spec: with the length L0 up to which it is 1.
      lengths: int [B], tokens in each row's text, those of the call included. Keys that are
        cached keep the factor of the length at which they came.

    Returns:
      float32 [B], max(1, 0.1 ln(length / L0) + 1).
    """
    if spec.original_max_position_embeddings == 0:
        return jnp.ones(lengths.shape, jnp.float32)
    stretch = lengths.astype(jnp.float32) / spec.original_max_position_embeddings
    return 0.1 * jnp.log(jnp.maximum(stretch, 1)) + 1


def dual_chunk_attend(
    queries: tuple[jax.Array, jax.Array, jax.Array],
    k: Vectors,
    v: Vectors,
    query_slots: jax.Array,
    key_valid: jax.Array | None,
    query_chunks: jax.Array,
    key_chunks: jax.Array,
    scale: jax.Array | float | None = None,
    key_slots: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    kernels: Kernels = PLAIN,
) -> jax.Array:
    """One softmax over keys of all chunks, each scored by the query rotated for its distance.

    While all queries stand in chunk 0 this is `attend` with the first of `queries`, at its cost.

    Args:
      queries: each [B, T, H, d], rotated to the three arrays of `query_positions`.
      k, v: [B, S, K, d], keys rotated to `key_positions`; key head j serves query heads
        j * G to (j + 1) * G - 1.
      query_slots, key_valid, key_slots, query_segments, key_segments: as `Mask` has them.
      query_chunks, key_chunks: int32 [B, T] and [B, S], from `chunks`. A key that stands in a
        later chunk than the query is not seen, whatever its slot.
      scale: as for `attend`.
      kernels: what computes the branches.

    Returns:
      [B, T, H, d] in the queries' dtype.
    """

    mask = Mask(
        query_slots, key_valid, query_chunks, key_chunks, key_slots, query_segments, key_segments
    )

    def part(q: jax.Array, branch: Branch) -> tuple[jax.Array, jax.Array]:
        return kernels.attend(q, k, v, branch.mask(mask), scale)

    own = part(queries[0], BRANCHES[0])

    def with_earlier_chunks() -> jax.Array:
        parts = (own, *map(part, queries[1:], BRANCHES[1:]))
        return merge(*zip(*parts, strict=True))[0]

    return jax.lax.cond(jnp.any(query_chunks > 0), with_earlier_chunks, lambda: own[0])


def _chunk_length(spec: DualChunkSpec) -> int:
    return spec.chunk_size - spec.local_size
