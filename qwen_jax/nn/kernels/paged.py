"""A cache in pages, and attention on TPU that reads only those that are filled.

The kernel is the ragged paged attention that comes with JAX. It wants a slot's keys and values side
by side, so that one copy from memory brings both, and no array of keys alone could be handed to it
without a copy of the cache. So here the cache has that layout, and writing is a scatter of slots.

A row's pages lie one after another, so that the array is [B, S, ...] but for its shape. For one
device: under a mesh, inside `shard_map`, with the batch and the heads cut.
"""

import einops
import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from qwen_jax.nn.kernels.mosaic import LANES, kernel_precision, pad_axis

# Slots a page: one copy from memory each, large enough to pay for its start.
PAGE = 128
# Keys and queries that the kernel takes at a time.
_KEYS, _QUERIES = 512, 32
# Entries of the table of pages, in a scalar memory of about a megabyte.
_MOST_PAGES = 1 << 17


@flax.struct.dataclass
class PagedKeyValues:
    """One layer's keys, rotated, and values.

    Attributes:
      pages: [B, P, page, 2 K', d'], keys and values of a slot by turns: head 0's key, its value,
        head 1's key. K' and d' are K and d, filled up with zeros to what the kernel takes.
    """

    pages: jax.Array

    @property
    def capacity(self) -> int:
        """S, the number of slots in a row."""
        return self.pages.shape[1] * self.pages.shape[2]


def why_not_paged(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    rows: int = 1,
    capacity: int = PAGE,
) -> str | None:
    """Why the cache of a layer cannot have pages on this device, or None where it can.

    Args:
      num_heads, num_kv_heads: of queries and of keys, on this device.
      head_dim: of both.
      dtype: of all.
      rows, capacity: of the cache, on this device.
    """
    if capacity % PAGE:
        return f"a capacity of {capacity} slots is no multiple of {PAGE}"
    if rows * (capacity // PAGE) > _MOST_PAGES:
        return f"{rows} rows of {capacity} slots have more pages than scalar memory has room for"
    if head_dim > LANES:
        return f"head_dim is {head_dim}, and the kernel loads heads of up to {LANES} numbers"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"the cache is {jnp.dtype(dtype).name}, and should be bfloat16 or float32"
    heads, group = kernel_heads(num_kv_heads, dtype), num_heads // num_kv_heads
    if dtype == jnp.float32 and heads > 4 and group % 2:
        # It would take 4 of them at a time, and their queries are to fill registers of 8 rows.
        return f"{group} query heads to each of {heads} key heads are odd, in float32"
    return None


def kernel_heads(num_kv_heads: int, dtype: jnp.dtype) -> int:
    """K', the smallest number of heads from K on whose keys and values fill registers."""
    # Rows of 32 bits: a key and its value are one of bfloat16, two of float32.
    rows_a_head = 2 * jnp.dtype(dtype).itemsize // 4
    heads = num_kv_heads
    while heads * rows_a_head not in (1, 2, 4) and heads * rows_a_head % 8:
        heads += 1
    return heads


def init_pages(
    batch: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    head_shards: int = 1,
) -> PagedKeyValues:
    """An empty cache for a layer.

    Args:
      batch, num_kv_heads: of all devices.
      capacity, head_dim, dtype: such that `why_not_paged` has no reason.
      head_shards: devices that share the heads out; each fills up its own.
    """
    heads = head_shards * kernel_heads(num_kv_heads // head_shards, dtype)
    return PagedKeyValues(jnp.zeros((batch, capacity // PAGE, PAGE, 2 * heads, LANES), dtype))


def write_pages(
    cache: PagedKeyValues, slots: jax.Array, k: jax.Array, v: jax.Array
) -> PagedKeyValues:
    """The cache with k and v [B, T, K, d] at `slots` int32 [B, T]; slots from S on drop."""
    pages = cache.pages
    *_, page, combined, d = pages.shape
    new = einops.rearrange(jnp.stack([k, v], axis=3), "B T K two d -> B T (K two) d")
    new = pad_axis(pad_axis(new, 2, combined), 3, d).astype(pages.dtype)
    rows = jnp.arange(pages.shape[0])[:, None]
    return PagedKeyValues(pages.at[rows, slots // page, slots % page].set(new, mode="drop"))


def read_pages(
    cache: PagedKeyValues, num_kv_heads: int, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Keys and values as [B, S, K, d]: a copy, for attention without the kernel."""
    keys_and_values = einops.rearrange(
        cache.pages, "B P page (K two) d -> two B (P page) K d", two=2
    )
    keys, values = keys_and_values[..., :num_kv_heads, :head_dim]
    return keys, values


def paged_attend(
    q: jax.Array,
    cache: PagedKeyValues,
    query_slots: jax.Array,
    num_kv_heads: int,
    window: int | None = None,
    scale: jax.Array | float | None = None,
) -> jax.Array:
    """Attention over a cache that has this call's keys and values in it already.

    Args:
      q: [B, T, H, d], in the cache's dtype.
      cache: K' heads for `num_kv_heads`, of this device.
      query_slots: int32 [B, T]. In a row, the queries with slots below S follow each other, and so
        do their slots; others are padding.
      num_kv_heads: K.
      window: as in `Mask`.
      scale: as for `attend`; 16-bit queries are rounded once more when it is an array.

    Returns:
      [B, T, H, d] in q's dtype, zeros for padding.
    """
    B, T, _, d = q.shape
    _, P, page, combined, kernel_d = cache.pages.shape
    heads = combined // 2
    if isinstance(scale, jax.Array):
        q, scale = (q * jnp.broadcast_to(scale, (B, T))[..., None, None]).astype(q.dtype), 1.0
    grouped = einops.rearrange(q, "B T (K G) d -> B T K G d", K=num_kv_heads)
    grouped = pad_axis(pad_axis(grouped, 2, heads), 4, kernel_d)
    # The kernel takes a row's last query to be its last slot's. With padding after the last, which
    # sees more than there is and is dropped, that is still so; and a row of padding has one key.
    real = query_slots < P * page
    ends = jnp.where(real, query_slots + T - jnp.arange(T), 1).max(axis=1)
    with kernel_precision(q.dtype):
        out = kernel.ragged_paged_attention(
            einops.rearrange(grouped, "B T K G d -> (B T) (K G) d"),
            cache.pages.reshape(B * P, page, combined, kernel_d),
            ends.astype(jnp.int32),
            jnp.arange(B * P, dtype=jnp.int32).reshape(B, P),
            jnp.arange(B + 1, dtype=jnp.int32) * T,
            jnp.array([B], jnp.int32),
            sm_scale=d**-0.5 if scale is None else scale,
            sliding_window=window,
            num_kv_pages_per_block=min(P, max(_KEYS // page, 1)),
            num_queries_per_block=min(B * T, _QUERIES),
        )
    out = einops.rearrange(out, "(B T) (K G) d -> B T K G d", B=B, K=heads)
    out = einops.rearrange(out[:, :, :num_kv_heads, :, :d], "B T K G d -> B T (K G) d")
    return jnp.where(real[..., None, None], out, 0)
