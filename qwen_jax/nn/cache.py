"""What a decoder remembers of the tokens so far: an explicit pytree, in and out of `apply`."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.config import LayerKind, ModelConfig
from qwen_jax.nn.delta_rule import DeltaState, init_delta_state
from qwen_jax.nn.kernels.choose import kernels_on
from qwen_jax.nn.kernels.paged import PAGE, PagedKeyValues, init_pages, why_not_paged
from qwen_jax.sharding.axes import Layout, num_shards, repeats


@flax.struct.dataclass
class KeyValues:
    """One layer's keys, rotated, and values, each [B, S, K, d]."""

    keys: jax.Array
    values: jax.Array


AttentionCache = KeyValues | PagedKeyValues
LayerCache = AttentionCache | DeltaState


@flax.struct.dataclass
class Cache:
    """What a decoder keeps between calls. Rows are independent: each has its own length.

    Only real tokens take a slot, first to last without gaps, whatever the padding of the calls.

    Attributes:
      layers: `KeyValues` of each attention layer, or `PagedKeyValues` on TPUs where their kernel
        can read them; `DeltaState` of each linear-attention layer.
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


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, mesh: Mesh | None = None
) -> Cache:
    """An empty cache of `batch` rows with `capacity` slots, keys and values of `dtype`.

    On a mesh there are as many rows and slots as divide, and each key head is there as often as
    `sharding.axes.repeats` says, so that every device holds its own part. Pages are whole.
    """
    if mesh is None:
        return _zeros(config, None, batch, capacity, dtype)
    batch += -batch % num_shards(mesh, "batch")
    capacity += -capacity % num_shards(mesh, "slots")
    zeros = functools.partial(_zeros, config, Layout.of(config, mesh), batch, capacity, dtype)
    return jax.jit(zeros, out_shardings=cache_shardings(config, mesh, jax.eval_shape(zeros)))()


def _zeros(
    config: ModelConfig, layout: Layout | None, batch: int, capacity: int, dtype: jnp.dtype
) -> Cache:
    has_pages = _has_pages(config, layout, batch, capacity, dtype)
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
        return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

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
    if kernels_on(layout).platform != "tpu" or config.dual_chunk is not None:
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
    """The logical axes of a layer's arrays; heads are those that are there, repeated or not."""
    if isinstance(layer, PagedKeyValues):
        return ("batch", None, None, "heads", None)
    return ("batch", "slots", "heads", None)


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
        if isinstance(layer, DeltaState):
            return layer
        if isinstance(layer, PagedKeyValues):
            return PagedKeyValues(pad(layer.pages, extra // PAGE))
        return jax.tree.map(pad, layer)

    layers = tuple(map(grown, cache.layers))
    return cache.replace(layers=layers, positions=pad(cache.positions), ids=pad(cache.ids))


def rewind_cache(cache: Cache, length: int) -> Cache:
    """The cache with only the first `length` tokens of each row, at positions 0 to length - 1.

    Raises:
      ValueError: the cache cannot be rewound.
    """
    if not cache.can_rewind:
        raise ValueError("a cache with linear-attention states cannot be rewound")
    # Two arrays, since the cache is donated and a buffer can be given away once only.
    lengths, next_positions = (jnp.full_like(cache.lengths, length) for _ in range(2))
    return cache.replace(lengths=lengths, next_positions=next_positions)


def write_slots(buffer: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """`buffer` [B, S, ...] with `new` [B, T, ...] at `slots` [B, T]; slots from S on drop."""
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, slots].set(new.astype(buffer.dtype), mode="drop")
