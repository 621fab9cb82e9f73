"""Softmax attention as one function: at once, or block by block in memory linear in length.

Block by block it is the online softmax of FlashAttention (arXiv 2205.14135) in plain JAX: scores
exist for one block of queries and keys at a time, and the backward pass computes them again from
the log-sum-exp. That log-sum-exp is a result as well, by which attention over several sets of keys
merges into attention over their union.

Masks are described by slots and groups; no array [T, S] goes in, comes out or is kept.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import einops
import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.nn.int8_vectors import Vectors, factors, times_scales

# The side of a square of scores in memory, for each head: large enough to keep the hardware busy,
# and small enough for a core's own cache.
_BLOCK = 256
# The same of keys where queries are few.
_BLOCK_OF_FEW = 512
# Queries whose scores are computed at once where it is known that they see no key behind them.
_ROWS = 128
# Up to so many queries, as in decoding, all of a row's scores are small.
FEW_QUERIES = 16
# Up to so many queries of a key head, a CPU sums products number by number, as keys and values lie:
# reading them is what takes time, and XLA would transpose them before products of matrices.
_FEW_PAIRS = 8
# Numbers that such sums run over side by side; XLA keeps the order of a sum, and so does not by
# itself turn a long one into sums of vectors.
_LANES = 16
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
      query_slots: int32 [B, T]; a key is seen from its own slot on.
      key_valid: bool [B, S], keys that are real; None for all.
      query_groups, key_groups: int32 [B, T] and [B, S], compared by `relation`; None without one.
      key_slots: int32 [B, S]; None where key s stands at slot s.
      query_segments, key_segments: int32 [B, T] and [B, S], the text of several in a row that each
        belongs to; a query sees keys of its own. None for one text a row.
      window: a query at slot t sees keys at slots above t - window; None for no limit. Static.
      relation: between the groups of queries and of the keys they see; None for any. Static.
    """

    query_slots: jax.Array
    key_valid: jax.Array | None = None
    query_groups: jax.Array | None = None
    key_groups: jax.Array | None = None
    key_slots: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    relation: Relation | None = flax.struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True)
class Branch:
    """One of several branches of a softmax over the same keys, no key in two of them.

    Attributes:
      relation: of the groups of queries to those of the keys that it has; None for any.
      beyond: whether it has the keys that the mask's window leaves out, in place of those within.
    """

    relation: Relation | None = None
    beyond: bool = False

    def mask(self, mask: Mask) -> Mask:
        """Of its keys, from a mask of all branches: with a window, and groups of queries and keys.

        Groups are looked at by a relation only.
        """
        if self.beyond:
            mask = mask.replace(query_slots=mask.query_slots - mask.window, window=None)
        if self.relation is None:
            return mask.replace(query_groups=None, key_groups=None)
        return mask.replace(relation=self.relation)


def attend(
    q: jax.Array,
    k: Vectors,
    v: Vectors,
    mask: Mask,
    scale: jax.Array | float | None = None,
    method: Literal["auto", "plain", "blockwise"] = "auto",
    dtype: jnp.dtype | None = None,
    in_order: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention; scores and softmax are float32, weights have v's dtype.

    Args:
      q: [B, T, H, d].
      k: [B, S, K, d]; key head j serves query heads j * G to (j + 1) * G - 1.
      v: [B, S, K, dv]. In int8, which has no gradient, both are read in q's dtype: block by block
        where that is the method, else all at once.
      mask: which keys each query sees.
      scale: what scores are multiplied by, broadcast to [B, T]; None for d ** -0.5.
      method: "plain" holds all scores [B, H, T, S] at once; "blockwise" needs memory linear in
        T and S, for gradients too (of reverse mode only), and passes over blocks that no query
        sees; "auto" is plain where the scores are few.
      dtype: of the first result, such as float32 for one that is merged with others; None for q's.
      in_order: a promise that in every row query t and key t stand at slot t. Plain attention then
        has no scores of blocks of keys that are behind all of a block of queries.

    Returns:
      [B, T, H, dv], and the log-sum-exp of each query's scores, float32 [B, T, H].
      A query that sees no key gets zeros, and float32's lowest number.

    Raises:
      ValueError: an unknown method, a relation without groups or groups without a relation, or
        segments of only the queries or only the keys.
    """
    if method not in ("auto", "plain", "blockwise"):
        raise ValueError(f"method = {method!r}: give 'auto', 'plain' or 'blockwise'")
    groups = (mask.query_groups, mask.key_groups)
    if any((group is None) != (mask.relation is None) for group in groups):
        raise ValueError("mask: give relation, query_groups and key_groups together or not at all")
    if (mask.query_segments is None) != (mask.key_segments is None):
        raise ValueError("mask: give query_segments and key_segments together or not at all")
    T, S = q.shape[1], k.shape[1]
    scale = scale_of(q, scale)
    dtype = jnp.dtype(q.dtype if dtype is None else dtype)
    q = _grouped(q, k)
    if method == "auto":
        few = T <= FEW_QUERIES or (T <= 2 * _BLOCK and S <= 16 * _BLOCK)
        method = "plain" if few else "blockwise"
    if method == "plain":
        plain = _plain_in_order if in_order else _plain
        out, lse = plain(dtype, q, k, v, mask, scale)
    else:
        block = _BLOCK_OF_FEW if T <= FEW_QUERIES else _BLOCK
        out, lse = _blockwise(block, dtype, q, k, v, mask, scale)
    return _ungrouped(out), _ungrouped(lse)


def scale_of(q: jax.Array, scale: jax.Array | float | None) -> jax.Array:
    """float32 [B, T], what the scores of q [B, T, H, d] are multiplied by, as `attend` takes it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return jnp.broadcast_to(jnp.asarray(scale, jnp.float32), q.shape[:2])


def gradients_of_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: jax.Array,
    results: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What some of the keys give to the gradients of attention over more of them.

    Args:
      q, k, v, mask: as `attend` has them for these keys.
      scale: float32 [B, T].
      results: out and log-sum-exp of attention over all keys.
      cotangents: theirs.

    Returns:
      float32 gradients of q and scale, whose sum over the parts is the whole, and of k and v.
    """
    out, lse, d_out, d_lse = (_grouped(x, k) for x in (*results, *cotangents))
    q = _grouped(q, k)
    lost = _lost(out, d_out, d_lse)
    gradients = _gradients(_BLOCK, jnp.float32, q, k, v, mask, scale, d_out, lse, lost)
    d_q, d_k, d_v, d_scale = gradients
    return _ungrouped(d_q), d_scale, d_k, d_v


def _grouped(x: jax.Array, k: Vectors) -> jax.Array:
    """[B, T, H, ...] by the heads of k [B, S, K, d]."""
    return einops.rearrange(x, "B T (K G) ... -> B T K G ...", K=k.shape[2])


def _ungrouped(x: jax.Array) -> jax.Array:
    return einops.rearrange(x, "B T K G ... -> B T (K G) ...")


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


def _plain(dtype, q, k, v, mask: Mask, scale) -> tuple[jax.Array, jax.Array]:
    """Out and log-sum-exp of q [B, T, K, G, d], with K and G apart as well."""
    seen = _seen(mask, k.shape[1])
    scores = _scores(q, k, seen, scale)
    weights = times_scales(jax.nn.softmax(scores, axis=-1), v).astype(v.dtype)
    out = _by_query(weights, factors(v), jnp.promote_types(v.dtype, dtype))
    out = einops.rearrange(out, "B K G T d -> B T K G d")
    lse = einops.rearrange(jax.nn.logsumexp(scores, axis=-1), "B K G T -> B T K G")
    sees = jnp.any(seen, axis=-1)[:, :, None, None]
    return jnp.where(sees[..., None], out.astype(dtype), 0), jnp.where(sees, lse, _LOWEST)


def _plain_in_order(dtype, q, k, v, mask: Mask, scale) -> tuple[jax.Array, jax.Array]:
    """As `_plain`, a block of queries after another, each with the keys up to its end."""
    parts = []
    for start in range(0, q.shape[1], _ROWS):
        stop = start + _ROWS
        rows = functools.partial(jax.tree.map, lambda x, start=start, stop=stop: x[:, start:stop])
        keys = functools.partial(jax.tree.map, lambda x, stop=stop: x[:, :stop])
        queries = rows(_queries(q, mask, scale))
        part = mask.replace(
            query_slots=queries.slots,
            query_groups=queries.groups,
            query_segments=queries.segments,
            key_valid=keys(mask.key_valid),
            key_groups=keys(mask.key_groups),
            key_slots=keys(mask.key_slots),
            key_segments=keys(mask.key_segments),
        )
        parts.append(_plain(dtype, queries.q, keys(k), keys(v), part, queries.scale))
    out, lse = zip(*parts, strict=True)
    return jnp.concatenate(out, axis=1), jnp.concatenate(lse, axis=1)


def _seen(mask: Mask, S: int) -> jax.Array:
    """bool [B, T, S] for S keys."""
    query_slots = mask.query_slots[..., None]
    key_slots = jnp.arange(S) if mask.key_slots is None else mask.key_slots[:, None, :]
    seen = key_slots <= query_slots
    if mask.window is not None:
        seen &= key_slots > query_slots - mask.window
    if mask.key_valid is not None:
        seen &= mask.key_valid[:, None, :]
    if mask.query_segments is not None:
        seen &= mask.query_segments[..., None] == mask.key_segments[:, None, :]
    if mask.relation is not None:
        nearest, farthest = mask.relation.value
        distance = mask.query_groups[..., None] - mask.key_groups[:, None, :]
        seen &= distance >= nearest
        if farthest is not None:
            seen &= distance <= farthest
    return seen


def _scores(q, k, seen, scale) -> jax.Array:
    """float32 [B, K, G, T, S], the lowest number where a key is not seen."""
    scores = _by_pair(q, factors(k)) * scale[:, None, None, :, None]
    scores = times_scales(scores, k)
    return jnp.where(seen[:, None, None], scores, _LOWEST)


@flax.struct.dataclass
class _Queries:
    """What belongs to queries, on axis 1: of a call, or of each of its blocks."""

    q: jax.Array
    slots: jax.Array
    groups: jax.Array | None
    segments: jax.Array | None
    scale: jax.Array


def _queries(q, mask: Mask, scale) -> _Queries:
    return _Queries(q, mask.query_slots, mask.query_groups, mask.query_segments, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise(block: int, dtype, q, k, v, mask: Mask, scale) -> tuple[jax.Array, jax.Array]:
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
            total = total * keep + weights.sum(axis=-1)
            weights = times_scales(weights, v_j).astype(v.dtype)
            product = _by_query(weights, factors(v_j))
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
            einops.rearrange(out / total[..., None], "B K G T d -> B T K G d").astype(dtype),
            einops.rearrange(lse, "B K G T -> B T K G"),
        )

    queries = _queries(q, mask, scale)
    return _join(jax.lax.map(query_block, _split(queries, block)), q.shape[1])


def _blockwise_forward(block, dtype, q, k, v, mask, scale):
    out, lse = _blockwise(block, dtype, q, k, v, mask, scale)
    return (out, lse), (q, k, v, mask, scale, out, lse)


def _blockwise_backward(block, dtype, residuals, cotangents):
    q, k, v, mask, scale, out, lse = residuals
    d_out, d_lse = cotangents
    lost = _lost(out, d_out, d_lse)
    gradients = _gradients(block, q.dtype, q, k, v, mask, scale, d_out, lse, lost)
    d_q, d_k, d_v, d_scale = gradients
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, d_scale


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _lost(out, d_out, d_lse) -> jax.Array:
    """The softmax's own term of a score's gradient: what the score gains, all others lose."""
    return _product("BTKGd,BTKGd->BTKG", d_out, out) - d_lse


def _gradients(block: int, dtype, q, k, v, mask: Mask, scale, d_out, lse, lost):
    """Of q, in `dtype`, and of k, v and scale; the scores are computed again, a block at a time."""
    S = k.shape[1]
    size = _block_size(S, block)

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
            d_weights = _by_pair(d_out_i, v_j)
            d_scores = (weights * (d_weights - lost_i)).astype(q.dtype)
            d_q = d_q + einops.rearrange(_by_query(d_scores, k_j), "B K G T d -> B T K G d")
            d_k = _add_at(d_k, start, _by_key(d_scores, scaled_q))
            d_v_j = _by_key(weights.astype(d_out_i.dtype), d_out_i)
            return d_q, (d_k, _add_at(d_v, start, d_v_j))

        first, end = _range_of_key_blocks(queries, mask, S, size)
        d_q = jnp.zeros(queries.q.shape, jnp.float32)
        d_q, d_keys = jax.lax.fori_loop(first, end, key_block, (d_q, d_keys))
        d_scale = jnp.einsum("BTKGd,BTKGd->BT", d_q, queries.q.astype(jnp.float32))
        return d_keys, ((d_q * queries.scale[:, :, None, None, None]).astype(dtype), d_scale)

    queries = _queries(q, mask, scale)
    d_keys = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (d_k, d_v), blocks = jax.lax.scan(
        query_block, d_keys, _split((queries, d_out, lse, lost), block)
    )
    d_q, d_scale = _join(blocks, q.shape[1])
    return d_q, d_k, d_v, d_scale


def _by_pair(x: jax.Array, y: jax.Array) -> jax.Array:
    """Products of queries [B, T, K, G, d] with keys [B, S, K, d]: float32 [B, K, G, T, S]."""
    _, T, _, G, _ = x.shape
    if T > FEW_QUERIES:
        products = _product("BKRd,BKSd->BKRS", _rows_of(x), _heads_first(y))
        return einops.rearrange(products, "B K (G T) S -> B K G T S", T=T)
    by_head = functools.partial(_product, "BTKGd,BSKd->BKGTS")
    if T * G > _FEW_PAIRS:
        return by_head(x, y)

    def by_number(x: jax.Array, y: jax.Array) -> jax.Array:
        lanes = math.gcd(x.shape[-1], _LANES)
        x = einops.rearrange(_two_or_more(x, axis=3), "B T K G (n l) -> B 1 T K G n l", l=lanes)
        y = einops.rearrange(y, "B S K (n l) -> B S 1 K 1 n l", l=lanes)
        products = jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-2).sum(axis=-1)
        return einops.rearrange(products, "B S T K G -> B K G T S")[:, :, :G]

    return jax.lax.platform_dependent(x, y, cpu=by_number, default=by_head)


def _by_query(weights: jax.Array, y: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Sums of y [B, S, K, d] by weights [B, K, G, T, S]: [B, K, G, T, d]."""
    _, _, G, T, _ = weights.shape
    if T > FEW_QUERIES:
        weights = einops.rearrange(weights, "B K G T S -> B K (G T) S")
        sums = _product("BKRS,BKSd->BKRd", weights, _heads_first(y), dtype)
        return einops.rearrange(sums, "B K (G T) d -> B K G T d", T=T)
    by_head = functools.partial(_product, "BKGTS,BSKd->BKGTd", dtype=dtype)
    if T * G > _FEW_PAIRS:
        return by_head(weights, y)

    def by_number(weights: jax.Array, y: jax.Array) -> jax.Array:
        weights = einops.rearrange(_two_or_more(weights, axis=2), "B K G T S -> B S K G T 1")
        return jnp.sum(weights.astype(dtype) * y[:, :, :, None, None].astype(dtype), axis=1)[
            :, :, :G
        ]

    return jax.lax.platform_dependent(weights, y, cpu=by_number, default=by_head)


def _two_or_more(x: jax.Array, axis: int) -> jax.Array:
    """`x`, twice along an axis of one: without that axis XLA's CPU compiler sums far slower."""
    if x.shape[axis] > 1:
        return x
    return jax.lax.optimization_barrier(jnp.concatenate([x, x], axis=axis))


def _by_key(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Sums of x [B, T, K, G, d] by weights [B, K, G, T, S]: float32 [B, S, K, d]."""
    weights = einops.rearrange(weights, "B K G T S -> B K (G T) S")
    return _product("BKRS,BKRd->BSKd", weights, _rows_of(x))


def _rows_of(x: jax.Array) -> jax.Array:
    """Queries by key head, [B, K, G * T, d]: products of one matrix with another a head.

    XLA's CPU compiler multiplies them several times faster than with the axes of G and T apart. A
    few queries stay as they are, since keys would be transposed for them.
    """
    return einops.rearrange(x, "B T K G d -> B K (G T) d")


def _heads_first(y: jax.Array) -> jax.Array:
    return einops.rearrange(y, "B S K d -> B K S d")


def _product(equation: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype = jnp.float32):
    """An einsum, summed and returned in float32, or in `dtype`."""
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


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

    places = start + jnp.arange(size)
    mask = mask.replace(
        query_slots=queries.slots,
        query_groups=queries.groups,
        query_segments=queries.segments,
        key_valid=jax.tree.map(take, mask.key_valid),
        key_groups=jax.tree.map(take, mask.key_groups),
        key_slots=places[None] if mask.key_slots is None else take(mask.key_slots),
        key_segments=jax.tree.map(take, mask.key_segments),
    )
    seen = _seen(mask, size) & (places >= j * size)
    k_j, v_j = jax.tree.map(take, (k, v))
    scores = _scores(queries.q, k_j, seen, queries.scale)
    return start, k_j, v_j, seen[:, None, None], scores


def _range_of_key_blocks(queries: _Queries, mask: Mask, S: int, size: int):
    """The first key block that one of the queries may see, and the one after the last."""
    blocks = jnp.arange(-(-S // size))

    def ends(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The smallest and the largest in each key block of x [B, S]."""
        x = jnp.pad(x, [(0, 0), (0, -S % size)], mode="edge")
        x = einops.rearrange(x, "B (n s) -> n (B s)", s=size)
        return x.min(axis=1), x.max(axis=1)

    if mask.key_slots is None:
        first_slot, last_slot = blocks * size, (blocks + 1) * size - 1
    else:
        first_slot, last_slot = ends(mask.key_slots)
    useful = first_slot <= queries.slots.max()
    if mask.window is not None:
        useful &= last_slot > queries.slots.min() - mask.window
    if mask.query_segments is not None:
        lowest, highest = ends(mask.key_segments)
        useful &= (lowest <= queries.segments.max()) & (highest >= queries.segments.min())
    if mask.relation is not None:
        nearest, farthest = mask.relation.value
        lowest, highest = ends(mask.key_groups)
        useful &= queries.groups.max() - lowest >= nearest
        if farthest is not None:
            useful &= queries.groups.min() - highest <= farthest
    first = jnp.where(useful, blocks, blocks.size).min()
    end = jnp.where(useful, blocks + 1, 0).max()
    return first, end
