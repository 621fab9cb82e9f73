"""Softmax attention as one function: at once, or block by block in memory linear in length.

Block by block it is the online softmax of FlashAttention (arXiv 2205.14135) in plain JAX: scores
exist for one block of queries and keys at a time, and the backward pass computes them again from
the log-sum-exp. That log-sum-exp is a result as well, by which attention over several sets of keys
merges into attention over their union.

Masks are described by slots and groups; no array [T, S] goes in, comes out or is kept.
"""

import enum
import functools
from collections.abc import Sequence
from typing import Any, Literal

import einops
import flax.struct
import jax
import jax.numpy as jnp

# The side of a square of scores in memory, for each head: large enough to keep the hardware busy.
_BLOCK = 512
# Up to so many queries, as in decoding, all of a row's scores are small.
_FEW_QUERIES = 16
# Stands for the logarithm of zero. Finite, so that a query that sees no key makes no NaN.
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Relation(enum.Enum):
    """Which groups of keys a group of queries sees: the smallest and largest group distance.

    The distance is the query's group less the key's; None means without limit.
    """

    SAME = (0, 0)
    PREVIOUS = (1, 1)
    OLDER = (2, None)


@flax.struct.dataclass
class Mask:
    """Which keys each query sees: all of those that no attribute takes away.

    Attributes:
      query_slots: int32 [B, T]; key s stands at slot s and is seen from slot s on.
      key_valid: bool [B, S], keys that are real; None for all.
      query_groups, key_groups: int32 [B, T] and [B, S], compared by `relation`; None without one.
      window: a query at slot t sees keys at slots above t - window; None for no limit. Static.
      relation: between the groups of queries and of the keys they see; None for any. Static.
    """

    query_slots: jax.Array
    key_valid: jax.Array | None = None
    query_groups: jax.Array | None = None
    key_groups: jax.Array | None = None
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    relation: Relation | None = flax.struct.field(pytree_node=False, default=None)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: jax.Array | float | None = None,
    method: Literal["auto", "plain", "blockwise"] = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention; scores and softmax are float32, weights have v's dtype.

    Args:
      q: [B, T, H, d].
      k: [B, S, K, d]; key head j serves query heads j * G to (j + 1) * G - 1.
      v: [B, S, K, dv].
      mask: which keys each query sees.
      scale: what scores are multiplied by, broadcast to [B, T]; None for d ** -0.5.
      method: "plain" holds all scores [B, H, T, S] at once; "blockwise" needs memory linear in
        T and S, for gradients too (of reverse mode only), and passes over blocks that no query
        sees; "auto" is plain where the scores are few.

    Returns:
      [B, T, H, dv] in q's dtype, and the log-sum-exp of each query's scores, float32 [B, T, H].
      A query that sees no key gets zeros, and float32's lowest number.

    Raises:
      ValueError: an unknown method, or a relation without groups or groups without a relation.
    """
    if method not in ("auto", "plain", "blockwise"):
        raise ValueError(f"method = {method!r}: give 'auto', 'plain' or 'blockwise'")
    groups = (mask.query_groups, mask.key_groups)
    if any((group is None) != (mask.relation is None) for group in groups):
        raise ValueError("mask: give relation, query_groups and key_groups together or not at all")
    T, S = q.shape[1], k.shape[1]
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), q.shape[:2])
    q = einops.rearrange(q, "B T (K G) d -> B T K G d", K=k.shape[2])
    if method == "auto":
        few = T <= _FEW_QUERIES or (T <= _BLOCK and S <= 8 * _BLOCK)
        method = "plain" if few else "blockwise"
    if method == "plain":
        out, lse = _plain(q, k, v, mask, scale)
    else:
        out, lse = _blockwise(_BLOCK, q, k, v, mask, scale)
    return einops.rearrange(out, "B T K G d -> B T (K G) d"), einops.rearrange(
        lse, "B T K G -> B T (K G)"
    )


def merge(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from attention over each.

    Args:
      outs: what `attend` returned for each set, [B, T, H, dv].
      lses: their log-sum-exps, float32 [B, T, H].

    Returns:
      The two for the union, as `attend` would return them.
    """
    lses = jnp.stack(lses)
    weights = jax.nn.softmax(lses, axis=0)
    parts = [weights[i, ..., None] * out for i, out in enumerate(outs)]
    return sum(parts).astype(outs[0].dtype), jax.nn.logsumexp(lses, axis=0)


def _plain(q, k, v, mask: Mask, scale) -> tuple[jax.Array, jax.Array]:
    """Out and log-sum-exp of q [B, T, K, G, d], with K and G apart as well."""
    seen = _seen(mask, jnp.arange(k.shape[1]))
    scores = _scores(q, k, seen, scale)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKd->BTKGd", weights, v).astype(q.dtype)
    lse = einops.rearrange(jax.nn.logsumexp(scores, axis=-1), "B K G T -> B T K G")
    sees = jnp.any(seen, axis=-1)[:, :, None, None]
    return jnp.where(sees[..., None], out, 0), jnp.where(sees, lse, _LOWEST)


def _seen(mask: Mask, key_slots: jax.Array) -> jax.Array:
    """bool [B, T, S] for the keys at `key_slots` [S], whose validity and groups `mask` has."""
    query_slots = mask.query_slots[..., None]
    seen = key_slots <= query_slots
    if mask.window is not None:
        seen &= key_slots > query_slots - mask.window
    if mask.key_valid is not None:
        seen &= mask.key_valid[:, None, :]
    if mask.relation is not None:
        nearest, farthest = mask.relation.value
        distance = mask.query_groups[..., None] - mask.key_groups[:, None, :]
        seen &= distance >= nearest
        if farthest is not None:
            seen &= distance <= farthest
    return seen


def _scores(q, k, seen, scale) -> jax.Array:
    """float32 [B, K, G, T, S], the lowest number where a key is not seen."""
    scores = _product("BTKGd,BSKd->BKGTS", q, k) * scale[:, None, None, :, None]
    return jnp.where(seen[:, None, None], scores, _LOWEST)


@flax.struct.dataclass
class _Queries:
    """What belongs to queries, on axis 1: of a call, or of each of its blocks."""

    q: jax.Array
    slots: jax.Array
    groups: jax.Array | None
    scale: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(block: int, q, k, v, mask: Mask, scale) -> tuple[jax.Array, jax.Array]:
    """As `_plain`, in blocks of up to `block` queries and keys."""
    S, dv = k.shape[1], v.shape[-1]
    size = _block_size(S, block)

    def query_block(queries: _Queries) -> tuple[jax.Array, jax.Array]:
        B, T, K, G, _ = queries.q.shape

        def key_block(j, state):
            highest, total, out = state
            _, _, v_j, seen, scores = _tile(queries, k, v, mask, j, size)
            new_highest = jnp.maximum(highest, scores.max(axis=-1))
            # Where nothing was seen yet, the difference of two lowest numbers is not a weight.
            weights = jnp.where(seen, jnp.exp(scores - new_highest[..., None]), 0)
            keep = jnp.exp(highest - new_highest)
            product = _product("BKGTS,BSKd->BKGTd", weights.astype(v.dtype), v_j)
            total = total * keep + weights.sum(axis=-1)
            return new_highest, total, out * keep[..., None] + product

        first, end = _range_of_key_blocks(queries, mask, S, size)
        start = (
            jnp.full((B, K, G, T), _LOWEST, jnp.float32),
            jnp.zeros((B, K, G, T), jnp.float32),
            jnp.zeros((B, K, G, T, dv), jnp.float32),
        )
        highest, total, out = jax.lax.fori_loop(first, end, key_block, start)
        sees = total > 0
        total = jnp.where(sees, total, 1)
        lse = jnp.where(sees, highest + jnp.log(total), _LOWEST)
        return (
            einops.rearrange(out / total[..., None], "B K G T d -> B T K G d").astype(q.dtype),
            einops.rearrange(lse, "B K G T -> B T K G"),
        )

    queries = _Queries(q, mask.query_slots, mask.query_groups, scale)
    return _join(jax.lax.map(query_block, _split(queries, block)), q.shape[1])


def _blockwise_forward(block, q, k, v, mask, scale):
    out, lse = _blockwise(block, q, k, v, mask, scale)
    return (out, lse), (q, k, v, mask, scale, out, lse)


def _blockwise_backward(block: int, residuals, cotangents):
    """Gradients of q, k, v and scale; the scores are computed again, one block at a time."""
    q, k, v, mask, scale, out, lse = residuals
    d_out, d_lse = cotangents
    S = k.shape[1]
    size = _block_size(S, block)
    # The softmax's own term of a score's gradient: what the score gains, all others lose.
    lost = _product("BTKGd,BTKGd->BTKG", d_out, out) - d_lse

    def query_block(d_keys, xs):
        queries, *rest = xs
        d_out_i, lse_i, lost_i = rest
        lse_i, lost_i = (
            einops.rearrange(x, "B T K G -> B K G T")[..., None] for x in (lse_i, lost_i)
        )
        scaled_q = (queries.q * queries.scale[:, :, None, None, None]).astype(q.dtype)

        def key_block(j, state):
            d_q, (d_k, d_v) = state
            start, k_j, v_j, seen, scores = _tile(queries, k, v, mask, j, size)
            weights = jnp.where(seen, jnp.exp(scores - lse_i), 0)
            d_weights = _product("BTKGd,BSKd->BKGTS", d_out_i, v_j)
            d_scores = (weights * (d_weights - lost_i)).astype(q.dtype)
            d_q = d_q + _product("BKGTS,BSKd->BTKGd", d_scores, k_j)
            d_k = _add_at(d_k, start, _product("BKGTS,BTKGd->BSKd", d_scores, scaled_q))
            d_v_j = _product("BKGTS,BTKGd->BSKd", weights.astype(d_out_i.dtype), d_out_i)
            return d_q, (d_k, _add_at(d_v, start, d_v_j))

        first, end = _range_of_key_blocks(queries, mask, S, size)
        d_q = jnp.zeros(queries.q.shape, jnp.float32)
        d_q, d_keys = jax.lax.fori_loop(first, end, key_block, (d_q, d_keys))
        d_scale = jnp.einsum("BTKGd,BTKGd->BT", d_q, queries.q.astype(jnp.float32))
        return d_keys, ((d_q * queries.scale[:, :, None, None, None]).astype(q.dtype), d_scale)

    queries = _Queries(q, mask.query_slots, mask.query_groups, scale)
    d_keys = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (d_k, d_v), blocks = jax.lax.scan(
        query_block, d_keys, _split((queries, d_out, lse, lost), block)
    )
    d_q, d_scale = _join(blocks, q.shape[1])
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, d_scale


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum, summed and returned in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _add_at(x: jax.Array, start: jax.Array, new: jax.Array) -> jax.Array:
    """`x` [B, S, ...] with `new` added from `start` on axis 1."""
    old = jax.lax.dynamic_slice_in_dim(x, start, new.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, old + new, start, axis=1)


def _block_size(length: int, block: int) -> int:
    """Up to `block`, so that blocks are about equal: 513 tokens are not two blocks of 512."""
    blocks, unit = -(-length // block), max(block // 4, 1)
    return min(length, -(-length // (blocks * unit)) * unit)


def _split(tree: Any, block: int) -> Any:
    """Arrays [B, T, ...] as blocks [n, B, t, ...], the last one filled up."""

    def split(x: jax.Array) -> jax.Array:
        T = x.shape[1]
        size = _block_size(T, block)
        padding = [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2)
        # Numbers fill up with zeros, which add nothing to a gradient; slots and groups with the
        # last one, which widens no block's range of keys.
        x = jnp.pad(x, padding, mode="edge" if jnp.issubdtype(x.dtype, jnp.integer) else "constant")
        return einops.rearrange(x, "B (n t) ... -> n B t ...", t=size)

    return jax.tree.map(split, tree)


def _join(tree: Any, T: int) -> Any:
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: einops.rearrange(x, "n B t ... -> B (n t) ...")[:, :T], tree)


def _tile(queries: _Queries, k, v, mask: Mask, j, size: int):
    """Start of the j-th key block, its keys and values, and `seen` and `scores` [B, K, G, T, S].

    The last block starts early enough to be full, and its keys of the block before are not seen.
    """
    S = k.shape[1]
    start = jnp.minimum(j * size, S - size)

    def take(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    key_slots = start + jnp.arange(size)
    mask = mask.replace(
        query_slots=queries.slots,
        query_groups=queries.groups,
        key_valid=jax.tree.map(take, mask.key_valid),
        key_groups=jax.tree.map(take, mask.key_groups),
    )
    seen = _seen(mask, key_slots) & (key_slots >= j * size)
    k_j, v_j = take(k), take(v)
    scores = _scores(queries.q, k_j, seen, queries.scale)
    return start, k_j, v_j, seen[:, None, None], scores


def _range_of_key_blocks(queries: _Queries, mask: Mask, S: int, size: int):
    """The first key block that one of the queries may see, and the one after the last."""
    blocks = jnp.arange(-(-S // size))
    useful = blocks * size <= queries.slots.max()
    if mask.window is not None:
        useful &= (blocks + 1) * size > queries.slots.min() - mask.window + 1
    if mask.relation is not None:
        nearest, farthest = mask.relation.value
        groups = jnp.pad(mask.key_groups, [(0, 0), (0, -S % size)], mode="edge")
        groups = einops.rearrange(groups, "B (n s) -> n (B s)", s=size)
        useful &= queries.groups.max() - groups.min(axis=1) >= nearest
        if farthest is not None:
            useful &= queries.groups.min() - groups.max(axis=1) <= farthest
    first = jnp.where(useful, blocks, blocks.size).min()
    end = jnp.where(useful, blocks + 1, 0).max()
    return first, end
