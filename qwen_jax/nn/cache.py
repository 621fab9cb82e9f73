"""What a decoder remembers of the tokens so far: an explicit pytree, in and out of `apply`."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.config import LayerKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.nn.delta_rule import (
    DeltaState,
    DeltaTrail,
    init_delta_state,
    lengthen,
    open_delta_state,
    settle,
)
from qwen_jax.nn.int8_vectors import Int8Vectors, Vectors, round_vectors, zero_vectors
from qwen_jax.nn.kernels.choose import kernels_on
from qwen_jax.nn.kernels.paged import PAGE, PagedKeyValues, init_pages, why_not_paged
from qwen_jax.sharding.axes import Layout, num_shards, repeats


@flax.struct.dataclass
class KeyValues:
    """One layer's keys, rotated, and values, each [B, S, K, d]."""

    keys: Vectors
    values: Vectors


AttentionCache = KeyValues | PagedKeyValues
LayerCache = AttentionCache | DeltaState | DeltaTrail

# What keys and values can be kept in besides the dtype that they are computed in.
CacheDtype = Literal["int8"]


@flax.struct.dataclass
class Cache:
    """What a decoder keeps between calls. Rows are independent: each has its own length.

    Only real tokens take a slot, first to last without gaps, whatever the padding of the calls.

    Attributes:
      layers: `KeyValues` of each attention layer, or `PagedKeyValues` on TPUs where their kernel
        can read them, which are floats; `DeltaState` of each linear-attention layer, `DeltaTrail`
        where the last call's tokens can be taken off again.
      lengths: int32 [B], filled slots.
      next_positions: int32 [B], one past the largest position that a row has seen.
      frequencies_for: int32 [B], the length of text whose rotary frequencies the keys have.
      positions, ids: int32 [B, S], each slot's token, for running it again when a RoPE that
        depends on the length of the text changes what the layers made of it.
    """

    layers: tuple[LayerCache, ...]
    lengths: jax.Array
    next_positions: jax.Array
    frequencies_for: jax.Array
    positions: jax.Array
    ids: jax.Array

    @property
    def capacity(self) -> int:
        """S, the number of slots in a row."""
        return self.positions.shape[1]

    @property
    def can_rewind(self) -> bool:
        """Whether tokens can be taken off again; a state that sums them up keeps them."""
        return all(isinstance(layer, AttentionCache) for layer in self.layers)

    @property
    def is_int8(self) -> bool:
        """Whether all keys and values are."""
        layers = [layer for layer in self.layers if isinstance(layer, AttentionCache)]
        return all(isinstance(layer, KeyValues) and _is_int8(layer) for layer in layers)


def _is_int8(layer: KeyValues) -> bool:
    return isinstance(layer.keys, Int8Vectors)


def check_cache_dtype(cache_dtype: str | None, cache: Cache | None = None) -> None:
    """Refuses what keys and values cannot be kept in.

    Args:
      cache_dtype: as for `init_cache`.
      cache: that is to be gone on with; None for a new one.

    Raises:
      UserError: an unknown name, or a cache that keeps them in something else.
    """
    known = get_args(CacheDtype)
    if cache_dtype is not None and cache_dtype not in known:
        raise UserError(f"cache_dtype = {cache_dtype!r}: give {' or '.join(known)}, or None")
    if cache_dtype is not None and cache is not None and not cache.is_int8:
        raise UserError(
            f"cache_dtype = {cache_dtype!r}, but the cache given has other keys and values; "
            "give init_cache the cache_dtype"
        )


def init_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    cache_dtype: CacheDtype | None = None,
) -> Cache:
    """An empty cache of `batch` rows with `capacity` slots.

    On a mesh there are as many rows and slots as divide, and each key head is there as often as
    `sharding.axes.repeats` says, so that every device holds its own part. Pages are whole.

    Args:
      config: of the model.
      batch, capacity: B and S.
      dtype: that keys and values are computed in.
      mesh: of the model; None for one device.
      cache_dtype: "int8" to keep them so (`nn.int8_vectors`), d + 4 bytes a head in place of d
        times the dtype's; None for `dtype`. Linear-attention states stay as they are. There are no
        pages of int8: on TPUs each token then reads all slots, filled or not. Where
        scores are few, as in decoding, and for kernels, there may be a float copy of one layer's
        keys and values at a time; all else goes block by block.

    Raises:
      UserError: an unknown `cache_dtype`.
    """
    check_cache_dtype(cache_dtype)
    if mesh is None:
        return _zeros(config, None, batch, capacity, dtype, cache_dtype)
    batch += -batch % num_shards(mesh, "batch")
    capacity += -capacity % num_shards(mesh, "slots")
    layout = Layout.of(config, mesh)
    zeros = functools.partial(_zeros, config, layout, batch, capacity, dtype, cache_dtype)
    return jax.jit(zeros, out_shardings=cache_shardings(config, mesh, jax.eval_shape(zeros)))()


def _zeros(
    config: ModelConfig,
    layout: Layout | None,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    cache_dtype: CacheDtype | None,
) -> Cache:
    has_pages = cache_dtype is None and _has_pages(config, layout, batch, capacity, dtype)
    if has_pages:
        capacity += -capacity % PAGE
    num_heads = config.num_key_value_heads
    num_heads *= repeats(layout, num_heads, "kv_heads")
    shape = (batch, capacity, num_heads, config.head_dim)

    def layer(kind: LayerKind) -> LayerCache:
        if kind is LayerKind.LINEAR_ATTENTION:
            return init_delta_state(config, batch, dtype)
        if has_pages:
            return init_pages(*shape, dtype, _shards(layout, "heads"))
        zeros = jnp.zeros if cache_dtype is None else zero_vectors
        return KeyValues(zeros(shape, dtype), zeros(shape, dtype))

    return Cache(
        layers=tuple(map(layer, config.layer_types)),
        lengths=jnp.zeros(batch, jnp.int32),
        next_positions=jnp.zeros(batch, jnp.int32),
        frequencies_for=jnp.zeros(batch, jnp.int32),
        positions=jnp.zeros((batch, capacity), jnp.int32),
        ids=jnp.zeros((batch, capacity), jnp.int32),
    )


def _has_pages(
    config: ModelConfig, layout: Layout | None, batch: int, capacity: int, dtype: jnp.dtype
) -> bool:
    """Whether the kernel of a TPU reads the cache: over whole texts, with no groups of keys."""
    in_branches = config.dual_chunk is not None or config.far is not None
    if kernels_on(layout).platform != "tpu" or in_branches:
        return False
    if _shards(layout, "slots") > 1:
        return False
    num_heads = config.num_key_value_heads
    num_heads *= repeats(layout, num_heads, "kv_heads")
    return not why_not_paged(
        config.num_attention_heads // _shards(layout, "heads"),
        num_heads // _shards(layout, "kv_heads"),
        config.head_dim,
        dtype,
        batch // _shards(layout, "batch"),
        capacity + -capacity % PAGE,
    )


def _shards(layout: Layout | None, logical: str) -> int:
    return 1 if layout is None else num_shards(layout.mesh, logical)


def key_value_axes(layer: AttentionCache) -> tuple[str | None, ...]:
    """The first logical axes of a layer's arrays; heads are those there, repeated or not."""
    if isinstance(layer, PagedKeyValues):
        return ("batch", None, None, "heads", None)
    # Of scales, which have no more, too.
    return ("batch", "slots", "heads")


def cache_shardings(config: ModelConfig, mesh: Mesh, cache: Cache) -> Cache:
    """Where the arrays of a cache, or of its shapes, lie: `NamedSharding`s in place of them."""
    place = Layout.of(config, mesh).sharding

    def of(layer: LayerCache) -> LayerCache:
        if isinstance(layer, DeltaState):
            return DeltaState(
                state=place("batch", "value_heads", None, None),
                conv_q=place("batch", None, "key_heads"),
                conv_k=place("batch", None, "key_heads"),
                conv_v=place("batch", None, "value_heads"),
            )
        return jax.tree.map(lambda _: place(*key_value_axes(layer)), layer)

    row, slots = place("batch"), place("batch", "slots")
    return Cache(
        layers=tuple(map(of, cache.layers)),
        lengths=row,
        next_positions=row,
        frequencies_for=row,
        positions=slots,
        ids=slots,
    )


def grow_cache(cache: Cache, capacity: int, mesh: Mesh | None = None) -> Cache:
    """The same cache with room for `capacity` slots a row (at least what it has)."""
    has_pages = any(isinstance(layer, PagedKeyValues) for layer in cache.layers)
    if has_pages:
        capacity += -capacity % PAGE
    if mesh is not None:
        capacity += -capacity % num_shards(mesh, "slots")
    extra = max(capacity - cache.capacity, 0)

    def pad(x: jax.Array, extra: int = extra) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
        return padded if mesh is None else jax.device_put(padded, x.sharding)

    def grown(layer: LayerCache) -> LayerCache:
        if isinstance(layer, DeltaState | DeltaTrail):
            return layer
        if isinstance(layer, PagedKeyValues):
            return PagedKeyValues(pad(layer.pages, extra // PAGE))
        return jax.tree.map(pad, layer)

    layers = tuple(map(grown, cache.layers))
    return cache.replace(layers=layers, positions=pad(cache.positions), ids=pad(cache.ids))


def rewind_cache(cache: Cache, lengths: int | jax.Array) -> Cache:
    """The cache with only the first `lengths` tokens of each row, at positions from 0 on.

    Args:
      cache: its tokens stand at positions 0, 1, 2, ... of their rows.
      lengths: of all rows, or int32 [B]. Of an open cache, no less than before the last call, which
        had no padding; it comes back settled.

    Raises:
      ValueError: the cache cannot be rewound.
    """
    if any(isinstance(layer, DeltaState) for layer in cache.layers):
        raise ValueError("a cache with linear-attention states cannot be rewound")
    # Two arrays, since the cache is donated and a buffer can be given away once only.
    kept, next_positions = (jnp.zeros_like(cache.lengths) + lengths for _ in range(2))

    def settled(layer: LayerCache) -> LayerCache:
        if not isinstance(layer, DeltaTrail):
            return layer
        length = layer.inputs.beta.shape[1]
        return settle(layer, kept - (cache.lengths - length))

    layers = tuple(map(settled, cache.layers))
    return cache.replace(layers=layers, lengths=kept, next_positions=next_positions)


def open_cache(config: ModelConfig, cache: Cache) -> Cache:
    """`cache` such that `rewind_cache` can take the tokens of the next call off again.

    Args:
      config: of the model.
      cache: settled, and on no mesh.
    """

    def opened(layer: LayerCache) -> LayerCache:
        return open_delta_state(config, layer) if isinstance(layer, DeltaState) else layer

    return cache.replace(layers=tuple(map(opened, cache.layers)))


def pad_open(cache: Cache, length: int) -> Cache:
    """An open cache as if its last call had had `length` more tokens, which are to be taken off.

    So that it has the same shapes however many tokens a call has.
    """
    layers = tuple(
        lengthen(layer, length) if isinstance(layer, DeltaTrail) else layer
        for layer in cache.layers
    )
    lengths, next_positions = cache.lengths + length, cache.next_positions + length
    return cache.replace(layers=layers, lengths=lengths, next_positions=next_positions)


def without_newer(cache: Cache, older: Cache) -> Cache:
    """`cache` with the tokens of `older` alone, which it was before some more were run.

    Keys and values stay in their arrays, so that none are copied; states are the older ones.
    """

    def layer(new: LayerCache, old: LayerCache) -> LayerCache:
        return old if isinstance(old, DeltaState) else new

    return cache.replace(
        layers=tuple(map(layer, cache.layers, older.layers)),
        lengths=older.lengths,
        next_positions=older.next_positions,
        frequencies_for=older.frequencies_for,
    )


def write_key_values(
    cache: KeyValues,
    slots: jax.Array,
    k: jax.Array,
    v: jax.Array,
    write: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> KeyValues:
    """The cache with k and v [B, T, K, d] at `slots` [B, T], rounded where it is int8.

    Args:
      cache: of a layer.
      slots, k, v: of the call's tokens.
      write: `write_slots`, or what does as much on a mesh.
    """
    new = KeyValues(k, v)
    if _is_int8(cache):
        # Before they travel round a ring, where fewer bytes do.
        new = KeyValues(round_vectors(k, cache.keys.dtype), round_vectors(v, cache.values.dtype))
    return jax.tree.map(lambda buffer, x: write(buffer, slots, x), cache, new)


def write_slots(buffer: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """`buffer` [B, S, ...] with `new` [B, T, ...] at `slots` [B, T]; slots from S on drop."""
    if slots.size > 1:
        return _scatter(buffer, slots, new)

    def twice(buffer: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
        return _scatter(buffer, *(jnp.concatenate([x, x], axis=1) for x in (slots, new)))

    # The scatter of one token becomes an update in place, which XLA's CPU compiler fuses with each
    # reader, so that it copies the buffer for every one of them.
    return jax.lax.platform_dependent(buffer, slots, new, cpu=twice, default=_scatter)


def _scatter(buffer: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, slots].set(new.astype(buffer.dtype), mode="drop")
