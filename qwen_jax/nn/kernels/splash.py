"""Attention on TPU for many queries, by the splash kernels that come with JAX.

The kernels compute scores a block at a time, and skip the blocks in which nothing is seen. They are
told so by tables, which are made here from the mask as the program runs: rows of a batch may stand
at different slots, as in a cache. Which keys of a block are seen, they compute from each query's
last slot and from numbers of the query and the key that have to be equal.

For one device: under a mesh, inside `shard_map`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_info,
)

from qwen_jax.nn.attend import Mask, Relation, scale_of
from qwen_jax.nn.kernels.mosaic import LANES, kernel_precision, pad_axis

# Side of a block of scores, a multiple of a vector register's lanes.
_BLOCK = 512
# A block's entry in both tables takes three bytes of scalar memory, which holds about a megabyte.
_MOST_BLOCKS = 1 << 17
# Numbers of keys that are no tokens and of queries that fill up a block: equal to no other.
_NO_KEY, _NO_QUERY = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).min + 1
_MASKED = kernels.DEFAULT_MASK_VALUE
_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Options(NamedTuple):
    """What is fixed when a kernel is compiled."""

    window: int | None
    block_q: int
    block_kv: int
    interpret: bool


class _Seen(NamedTuple):
    """What the kernels compute a row's mask from; a key is at the slot of its index.

    Attributes:
      last: int32 [T], the last slot that each query sees.
      query_ids, key_ids: int32 [T] and [S], which have to be equal.
      useful: bool [T / block_q, S / block_kv], blocks in which something may be seen.
    """

    last: jax.Array
    query_ids: jax.Array
    key_ids: jax.Array
    useful: jax.Array


def why_not_splash(
    T: int, S: int, dtype: jnp.dtype, mask: Mask, keys_in_order: bool = False
) -> str | None:
    """Why `splash_attend` cannot be used for T queries and S keys, or None where it can."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype {jnp.dtype(dtype).name} is neither bfloat16 nor float32"
    if (-(-T // _BLOCK)) * (-(-S // _BLOCK)) > _MOST_BLOCKS:
        return f"{T} queries and {S} keys have more blocks than scalar memory has room for"
    if mask.key_slots is not None and not keys_in_order:
        return "keys stand at slots of their own, which may have gaps"
    if mask.relation is Relation.OLDER and not keys_in_order:
        return "older groups may not be the first ones"
    if mask.relation is not None and mask.query_segments is not None:
        return "groups and segments together are more than one number a key"
    if mask.relation is Relation.OLDER and mask.window is not None:
        return "with a window and older groups, a query's last slot is not where its window ends"
    return None


def splash_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: jax.Array | float | None = None,
    dtype: jnp.dtype | None = None,
    in_order: bool = False,
    keys_in_order: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`attend`, computed by the splash kernels; gradients, in reverse mode, too.

    16-bit queries are rounded once more, after they are scaled.

    Args:
      q, k, v, scale: as for `attend`, of this device.
      mask: as for `attend`.
      dtype: as for `attend`; what is summed in float32 is rounded to q's first.
      in_order: promises that in every row query t and key t stand at slot t, which lets one kernel
        take all rows.
      keys_in_order: promises that in every row each key's slot is one more than that of the key
        before. Where older groups are asked for, a query that may see a key of a smaller group
        than one before it gets NaN.
      interpret: run in Pallas's interpreter, as without a TPU.

    Returns:
      As `attend` does.

    Raises:
      ValueError: `why_not_splash` says why.
    """
    _check(q, k, mask, keys_in_order)
    in_order = in_order and mask.relation is None
    options, arrays, T = _prepare(q, k, v, mask, scale_of(q, scale), in_order, interpret)
    out, lse = _map_rows(functools.partial(_attend_row, options), arrays, in_order)
    out = einops.rearrange(out, "B H T d -> B T H d")[:, :T]
    lse = einops.rearrange(lse, "B H T -> B T H")[:, :T]
    if mask.relation is Relation.OLDER:
        out = jnp.where(_meets_falling_groups(mask)[..., None, None], jnp.nan, out)
    return out.astype(q.dtype if dtype is None else dtype), lse


def splash_gradients_of_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: jax.Array,
    results: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
    in_order: bool = False,
    keys_in_order: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`gradients_of_part`, computed by the splash kernels, which round to the inputs' dtypes."""
    _check(q, k, mask, keys_in_order)
    (out, lse), (d_out, d_lse) = results, cotangents
    in_order = in_order and mask.relation is None
    options, arrays, T = _prepare(q, k, v, mask, scale, in_order, interpret)
    lost = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1) - d_lse

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(pad_axis(x, 1, arrays[0].shape[2]), 1, 2)

    given = tuple(heads_first(x) for x in (d_out.astype(q.dtype), lse, lost))
    row = functools.partial(_gradients_of_row, options)
    d_q, d_k, d_v = _map_rows(row, (*arrays, *given), in_order)
    d_q, d_k, d_v = (
        einops.rearrange(x, "B H T d -> B T H d").astype(jnp.float32) for x in (d_q, d_k, d_v)
    )
    d_q, d_k, d_v = d_q[:, :T], d_k[:, : k.shape[1]], d_v[:, : k.shape[1]]
    d_scale = jnp.einsum("BTHd,BTHd->BT", d_q, q.astype(jnp.float32))
    return d_q * scale[:, :, None, None], d_scale, d_k, d_v


def _check(q, k, mask: Mask, keys_in_order: bool) -> None:
    reason = why_not_splash(q.shape[1], k.shape[1], q.dtype, mask, keys_in_order)
    if reason:
        raise ValueError(f"splash attention: {reason}")


def _prepare(q, k, v, mask: Mask, scale, in_order: bool, interpret: bool):
    """Options, arguments of the kernels for each row, and the number of queries."""
    T, S = q.shape[1], k.shape[1]
    block_q, block_kv = _block_size(T), _block_size(S)
    options = _Options(mask.window, block_q, block_kv, interpret)
    to_T, to_S = -(-T // block_q) * block_q, -(-S // block_kv) * block_kv
    scaled = (q * scale[:, :, None, None]).astype(q.dtype)
    arrays = (
        jnp.swapaxes(pad_axis(x, 1, to), 1, 2) for x, to in ((scaled, to_T), (k, to_S), (v, to_S))
    )
    seen = _describe(mask, T, S, in_order)
    seen = seen._replace(
        last=pad_axis(seen.last, -1, to_T, -1),
        query_ids=pad_axis(seen.query_ids, -1, to_T, _NO_QUERY),
        key_ids=pad_axis(seen.key_ids, -1, to_S, _NO_KEY),
    )
    # With tables of its own each row would need a kernel of its own.
    ids = None if in_order else (seen.query_ids, seen.key_ids)
    useful = _useful_blocks(options, seen.last, to_S, ids)
    return options, (*arrays, seen._replace(useful=useful)), T


def _describe(mask: Mask, T: int, S: int, in_order: bool) -> _Seen:
    """`last` [B, T], or [T] for queries in order, and the numbers, [B, T] and [B, S]."""
    B = mask.query_slots.shape[0]
    last = jnp.arange(T) if in_order else mask.query_slots
    if mask.key_slots is not None and not in_order:
        last = last - mask.key_slots[:, :1]
    query_ids, key_ids = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    if mask.query_segments is not None:
        query_ids, key_ids = mask.query_segments, mask.key_segments
    if mask.relation is Relation.SAME:
        query_ids, key_ids = mask.query_groups, mask.key_groups
    if mask.relation is Relation.PREVIOUS:
        query_ids, key_ids = mask.query_groups, mask.key_groups + 1
    if mask.relation is Relation.OLDER:
        nearest, _ = mask.relation.value
        find = jax.vmap(functools.partial(jnp.searchsorted, side="right"))
        so_far = jax.lax.cummax(mask.key_groups, axis=1)
        older = find(so_far, mask.query_groups - nearest)
        last = jnp.minimum(last, older - 1)
    if mask.key_valid is not None:
        key_ids = jnp.where(mask.key_valid, key_ids, _NO_KEY)
    return _Seen(last.astype(jnp.int32), query_ids, key_ids, None)


def _meets_falling_groups(mask: Mask) -> jax.Array:
    """bool [B, T], queries that may see a key with a smaller group than one before it."""
    falls = mask.key_groups < jax.lax.cummax(mask.key_groups, axis=1)
    if mask.key_valid is not None:
        falls &= mask.key_valid
    first = jnp.argmax(falls, axis=1, keepdims=True)
    first = jnp.where(falls.any(axis=1, keepdims=True), first, falls.shape[1])
    if mask.key_slots is not None:
        return (first < falls.shape[1]) & (mask.query_slots >= first + mask.key_slots[:, :1])
    # Slots past the end are padding, before which a cache has keys of nothing.
    return (mask.query_slots >= first) & (mask.query_slots < falls.shape[1])


def _useful_blocks(options: _Options, last: jax.Array, S: int, ids) -> jax.Array:
    """bool [..., query blocks, key blocks]: False only where no query of the block sees a key."""

    def ends(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        blocks = x.reshape(*x.shape[:-1], -1, size)
        return blocks.min(axis=-1), blocks.max(axis=-1)

    lowest, highest = (x[..., None] for x in ends(last, options.block_q))
    start = jnp.arange(0, S, options.block_kv)
    useful = start <= highest
    if options.window is not None:
        useful &= start + options.block_kv > lowest - options.window + 1
    if ids is not None:
        (q_low, q_high), (k_low, k_high) = (
            ends(ids[0], options.block_q),
            ends(ids[1], options.block_kv),
        )
        useful &= (q_low[..., None] <= k_high[..., None, :]) & (
            q_high[..., None] >= k_low[..., None, :]
        )
    return useful


def _map_rows(row: Callable, arrays, in_order: bool):
    """`row` for each row of the batch: all at once where they share their tables."""
    if not in_order:
        return jax.lax.map(lambda arrays: row(*arrays), arrays)
    axes = [_Seen(None, 0, 0, None) if isinstance(x, _Seen) else 0 for x in arrays]
    return jax.vmap(row, in_axes=axes)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_row(options: _Options, q, k, v, seen: _Seen) -> tuple[jax.Array, jax.Array]:
    """Out [H, T, d] and log-sum-exp [H, T] of q [H, T, d], k and v [K, S, d]."""
    size = kernels.BlockSizes(block_q=options.block_q, block_kv=options.block_kv)
    with kernel_precision(q.dtype):
        out, (lse,) = kernels._splash_attention_forward(
            _tables(seen, axis=-1),
            q,
            k,
            v,
            kernels.SegmentIds(seen.query_ids, seen.key_ids),
            sinks=None,
            mask_value=_MASKED,
            is_mqa=False,
            block_sizes=size,
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=_is_seen(options.window),
            interpret=options.interpret,
        )
    # Of a query that sees no key the kernel makes a mean of values, or not a number.
    sees = lse > _MASKED / 2
    return jnp.where(sees[..., None], out, 0), jnp.where(sees, lse, _LOWEST)


def _attend_row_forward(options: _Options, q, k, v, seen: _Seen):
    out, lse = _attend_row(options, q, k, v, seen)
    return (out, lse), (q, k, v, seen, out, lse)


def _attend_row_backward(options: _Options, residuals, cotangents):
    q, k, v, seen, out, lse = residuals
    d_out, d_lse = cotangents
    # The softmax's own term of a score's gradient: what the score gains, all others lose.
    lost = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1) - d_lse
    return *_gradients_of_row(options, q, k, v, seen, d_out, lse, lost), None


_attend_row.defvjp(_attend_row_forward, _attend_row_backward)


def _gradients_of_row(options: _Options, q, k, v, seen: _Seen, d_out, lse, lost):
    """Gradients of q (as scaled), k and v."""
    # Where no key is seen, so that the weights, e to the power of score less this, are zero.
    lse = jnp.where(lse > _MASKED / 2, lse, 0)
    common = {
        "segment_ids": kernels.SegmentIds(seen.query_ids, seen.key_ids),
        "sinks": None,
        "logsumexp": lse,
        "do": d_out,
        "di": lost,
        "bq": options.block_q,
        "bkv": options.block_kv,
        "is_mqa": False,
        "mask_value": _MASKED,
        "attn_logits_soft_cap": None,
        "q_layout": kernels.QKVLayout.HEAD_DIM_MINOR,
        "k_layout": kernels.QKVLayout.HEAD_DIM_MINOR,
        "v_layout": kernels.QKVLayout.HEAD_DIM_MINOR,
        "mask_function": _is_seen(options.window),
        "interpret": options.interpret,
    }
    with kernel_precision(q.dtype):
        d_q = kernels._splash_attention_bwd_dq(q, k, v, mask_info=_tables(seen, axis=-1), **common)
        _, d_k, d_v = kernels._splash_attention_bwd_dkv(
            q,
            k,
            v,
            mask_info=_tables(seen, axis=-2),
            bkv_compute=options.block_kv,
            use_fused_bwd_kernel=False,
            **common,
        )
    return d_q, d_k, d_v


def _tables(seen: _Seen, axis: int) -> mask_info.MaskInfo:
    """The tables for a kernel that walks along an axis of blocks: which to do, which to load."""
    useful = jnp.moveaxis(seen.useful, axis, -1)
    n = useful.shape[-1]
    index = jnp.where(useful, jnp.arange(n), n)
    following = jax.lax.cummin(index, axis=1, reverse=True)
    # After its last one, a walk has the first one again, for the next head.
    following = jnp.where(following < n, following, index.min(axis=-1, keepdims=True) % n)
    small = jnp.int8 if n <= jnp.iinfo(jnp.int8).max else jnp.int16
    return mask_info.MaskInfo(
        data_next=jnp.moveaxis(following.astype(small), -1, axis)[None],
        mask_next=None,
        block_mask=seen.useful.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=seen.last,
    )


@functools.cache
def _is_seen(window: int | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The test of a query's last slot and a key's slot; one object for each window."""

    def test(last: jax.Array, slot: jax.Array) -> jax.Array:
        seen = slot <= last
        return seen if window is None else seen & (slot > last - window)

    return test


def _block_size(length: int) -> int:
    """So that blocks are about equal, and few tokens fill up the last one."""
    blocks = -(-length // _BLOCK)
    return -(-length // (blocks * LANES)) * LANES
