"""Where the tokens of a call stand: in their texts, in the cache, and on a mesh.

A mesh may want more rows and columns than a call has, and, where it cuts texts, the tokens in
another order. Both happen here, to token ids, and are undone on what comes out.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.nn import dual_chunk, far
from qwen_jax.nn.cache import Cache, write_slots
from qwen_jax.nn.ring import zigzag
from qwen_jax.nn.rope import logn_scale, rotation
from qwen_jax.nn.tokens import DualChunk, Far, Part, Parts, Tokens
from qwen_jax.sharding.axes import (
    CONTEXT,
    HIDDEN,
    TOKENS,
    Layout,
    constrain,
    is_cut,
    num_shards,
    on_shards,
)

LogitsAt = Literal["all", "last"] | jax.Array

# Up to so many tokens behind a cache are on all devices that share a text: a step of decoding.
_FEW = 16


@flax.struct.dataclass
class Call:
    """The tokens of a call, as its caller orders them.

    Attributes:
      ids: int32 [B, T].
      mask: bool [B, T], False at padding; None for all real.
      positions: int32 [B, T]; None for those that follow from the order.
      segments: int32 [B, T], the text of several in a row that each token belongs to; None for one.
    """

    ids: jax.Array
    mask: jax.Array | None = None
    positions: jax.Array | None = None
    segments: jax.Array | None = None


def check_call(
    input_ids: Any, attention_mask: Any = None, positions: Any = None, segment_ids: Any = None
) -> Call:
    """The arguments of a call in the dtypes that are computed with.

    Raises:
      ValueError: their shapes or dtypes are not those of `Decoder.__call__`.
    """
    try:
        ids = jnp.asarray(input_ids)
    except ValueError:
        raise ValueError(
            "input_ids has rows of different lengths; pad them and give a mask"
        ) from None
    if ids.ndim != 2 or not ids.size:
        raise ValueError(f"input_ids has shape {ids.shape}; give token ids [batch, length]")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"input_ids are {ids.dtype}; give integers, the ids of tokens")
    ids = ids.astype(jnp.int32)
    mask = None if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
    positions = None if positions is None else jnp.asarray(positions, jnp.int32)
    segments = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    named = (("attention_mask", mask), ("positions", positions), ("segment_ids", segments))
    for name, array in named:
        if array is not None and array.shape != ids.shape:
            raise ValueError(f"{name} has shape {array.shape}, the token ids {ids.shape}")
    return Call(ids, mask, positions, segments)


def place(
    config: ModelConfig, mesh: Mesh | None, call: Call, cache: Cache | None
) -> tuple[jax.Array, Tokens, Cache | None]:
    """The call as the layers run it.

    Returns:
      Token ids [B', T'], with what the mesh needs beyond the call's; where they stand; and the
      cache's books with the call's tokens entered.

    Raises:
      UserError: a RoPE that depends on the length, with a cache that a mesh cuts.
      ValueError: a cache of other rows than the mesh makes of the call's, or segments with one.
    """
    if cache is not None and call.segments is not None:
        raise ValueError("segment_ids with a cache: run each text in a row of its own")
    (rows, length), layout = call.ids.shape, None
    if mesh is not None:
        few = cache is not None and length <= _FEW
        layout = Layout.of(config, mesh, *(["length"] if few else []))
        if cache is not None and is_cut(layout, "slots") and config.rope.depends_on_length:
            raise UserError(
                f"rope_type = {config.rope.kind.value} changes what is cached as the text grows, "
                f"which a cache that is cut along {CONTEXT} does not follow; use another mesh"
            )
        call = _fill_up(layout, call, cache)
    if cache is None:
        ids, tokens = _place(config, layout, length, call)
    else:
        ids, tokens, cache = _place_after(config, layout, length, call, cache)
    return ids, tokens.replace(num_tokens=rows * length), cache


def _fill_up(layout: Layout, call: Call, cache: Cache | None) -> Call:
    """The call with as many rows and columns as the mesh needs, those added being padding."""
    B, T = call.ids.shape
    rows = -B % num_shards(layout.mesh, "batch")
    columns = -T % (2 * layout.mesh.shape[CONTEXT]) if is_cut(layout) else 0
    if cache is not None and len(cache.lengths) != B + rows:
        raise ValueError(
            f"the cache has {len(cache.lengths)} rows, where {B} rows of tokens on this mesh need "
            f"{B + rows}; give init_cache the mesh"
        )
    if rows or columns:
        if call.mask is None:
            call = call.replace(mask=jnp.ones((B, T), bool))
        call = jax.tree.map(lambda x: jnp.pad(x, [(0, rows), (0, columns)]), call)
    # Rows on their devices, texts whole: their tokens are still to be put in order.
    return constrain(call, Layout(layout.mesh, layout.whole | {"length"}), *TOKENS)


def _order(layout: Layout | None, mask: jax.Array | None, shape: tuple[int, int]):
    """int32 [B, T], the columns in the order of the mesh; None where it is their own.

    Padding goes behind all tokens, since the delta rule's states pass from chunk to chunk.
    """
    if not is_cut(layout):
        return None
    order = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if mask is not None:
        order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    return order[:, zigzag(shape[1], layout.mesh.shape[CONTEXT])]


def _in_order(places: jax.Array | None, x: Any) -> Any:
    """Arrays [B, T] in the order of `places`."""
    if places is None:
        return x
    return jax.tree.map(lambda a: jnp.take_along_axis(a, places, axis=1), x)


def _tokens(
    config: ModelConfig,
    layout: Layout | None,
    slots: jax.Array,
    real: jax.Array | None,
    key_valid: jax.Array | None,
    positions: jax.Array,
    frequencies_for: jax.Array,
    key_positions: jax.Array,
    lengths: jax.Array,
    segments: jax.Array | None = None,
    places: jax.Array | None = None,
) -> Tokens:
    """Tokens at `positions`; `lengths` [B] are those of the rows with this call's tokens."""

    def rotated(positions: jax.Array, scaled: bool = True):
        return rotation(config.rope, config.rotary_dim, positions, frequencies_for, scaled)

    spec, dual, distant = config.dual_chunk, None, None
    place = positions
    if spec is not None:
        place, successive, inter = dual_chunk.query_positions(spec, positions)
        dual = DualChunk(
            successive=rotated(successive),
            inter=rotated(inter),
            query_chunks=dual_chunk.chunks(spec, positions),
            key_chunks=dual_chunk.chunks(spec, key_positions),
            scale=dual_chunk.length_scale(spec, lengths),
        )
    if config.far is not None:
        turn = key_groups = None
        if config.far.sinks:
            key_groups = (key_positions >= config.far.sinks).astype(jnp.int32)
        else:
            turn = far.key_places(config.far, key_positions) - key_positions
            turn = rotated(turn, scaled=False)
        queries = rotated(far.query_places(config.far, positions))
        distant = Far(queries, turn, key_groups, config.far.window)
    return Tokens(
        slots=slots,
        real=real,
        key_valid=key_valid,
        rotation=rotated(place),
        query_scale=config.logn_length and logn_scale(positions, config.logn_length),
        segments=segments,
        places=places,
        dual_chunk=dual,
        far=distant,
        layout=layout,
    )


@functools.partial(jax.jit, static_argnames=("config", "layout", "length"))
def _place(
    config: ModelConfig, layout: Layout | None, length: int, call: Call
) -> tuple[jax.Array, Tokens]:
    """A call without a cache, its first `length` columns the caller's, padding counted."""
    mask, shape = call.mask, call.ids.shape
    order = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    positions = call.positions
    if positions is None:
        positions = jnp.where(order < length, order, 0)
    lengths = jnp.full(shape[0], shape[1]) if mask is None else mask.sum(axis=1)
    frequencies_for = lengths if config.rope.depends_on_prompt else positions.max() + 1
    places = _order(layout, mask, shape)
    ids, mask, positions, segments = _in_order(places, (call.ids, mask, positions, call.segments))
    slots = order
    if places is not None:
        # Without the gaps that padding leaves: the slots of a run of keys follow each other.
        slots = order[:, zigzag(shape[1], layout.mesh.shape[CONTEXT])]
    tokens = _tokens(
        config,
        layout,
        slots,
        mask,
        mask,
        positions,
        frequencies_for,
        positions,
        lengths,
        segments,
        places,
    )
    return ids, tokens


@functools.partial(jax.jit, static_argnames=("config", "layout", "length"))
def _place_after(
    config: ModelConfig, layout: Layout | None, length: int, call: Call, cache: Cache
) -> tuple[jax.Array, Tokens, Cache]:
    """A call after the tokens of `cache`, its first `length` columns the caller's."""
    ids, mask, positions = call.ids, call.mask, call.positions
    columns = jnp.arange(ids.shape[1], dtype=jnp.int32)
    if positions is None:
        positions, counted = cache.next_positions[:, None] + columns, columns < length
    else:
        # Where a caller says what stands where, padding stands nowhere.
        counted = True if mask is None else mask
    last = jnp.where(counted, positions, -1).max(axis=1)
    next_positions = jnp.maximum(cache.next_positions, last + 1)
    real = jnp.ones_like(ids) if mask is None else mask.astype(jnp.int32)
    order = jnp.cumsum(real, axis=1)
    lengths = cache.lengths + order[:, -1]
    if config.rope.depends_on_prompt:
        frequencies_for = jnp.where(cache.lengths == 0, lengths, cache.frequencies_for)
    else:
        # The longest row sets the frequencies of the whole batch, as in transformers.
        frequencies_for = jnp.full_like(cache.frequencies_for, next_positions.max())
    slots = jnp.where(real, cache.lengths[:, None] + order - 1, cache.capacity)
    cache = cache.replace(
        lengths=lengths,
        next_positions=next_positions,
        frequencies_for=frequencies_for,
        positions=write_slots(cache.positions, slots, positions),
        ids=write_slots(cache.ids, slots, ids),
    )
    places = _order(layout, mask, ids.shape)
    ids, slots, mask, positions = _in_order(places, (ids, slots, mask, positions))
    tokens = _tokens(
        config,
        layout,
        slots,
        mask,
        None,
        positions,
        frequencies_for,
        cache.positions,
        lengths,
        None,
        places,
    )
    return ids, tokens, cache


def place_parts(
    config: ModelConfig, calls: Sequence[tuple[Call, jax.Array | None]], cache: Cache
) -> tuple[jax.Array, Parts, Cache]:
    """Several calls after the tokens of one cache, as the layers run them at once.

    Args:
      config: of the model, whose RoPE does not depend on the length of the text.
      calls: each with its rows of the cache, int32 [b], None for all.
      cache: before all of them.

    Returns:
      Token ids [1, N], where they stand, and the cache's books with the tokens entered.
    """
    ids, parts = [], []
    # Layers are not the books: what they hold is not to be copied for a row of it.
    layers, cache = cache.layers, cache.replace(layers=())
    for call, rows in calls:
        length = call.ids.shape[1]
        place = Part(Tokens(call.ids, None, None, None), rows)
        before = place.of_cache(cache)
        if call.mask is not None and call.positions is None:
            # Where nothing is said padding counts, and a row that rests would move on.
            order = jnp.cumsum(call.mask, axis=1) - 1
            positions = jnp.where(call.mask, before.next_positions[:, None] + order, 0)
            call = call.replace(positions=positions.astype(jnp.int32))
        own, tokens, after = _place_after(config, None, length, call, before)
        cache = place.put_back(cache, after)
        parts.append(Part(tokens, rows))
        ids.append(own.reshape(1, -1))
    return jnp.concatenate(ids, axis=1), Parts(tuple(parts)), cache.replace(layers=layers)


def tokens_of_cache(config: ModelConfig, layout: Layout | None, cache: Cache, frequencies_for):
    """The tokens that `cache` holds, one a slot, as a call that runs all of them again."""
    slots = jnp.broadcast_to(jnp.arange(cache.capacity), cache.ids.shape)
    real = slots < cache.lengths[:, None]
    return _tokens(
        config,
        layout,
        slots,
        real,
        None,
        cache.positions,
        frequencies_for,
        cache.positions,
        cache.lengths,
    )


def arrange(tokens: Tokens, x: jax.Array) -> jax.Array:
    """What belongs to a call's tokens, [B, T, ...], as the layers have them; zeros at padding."""
    x = jnp.pad(x, [(0, len(tokens.slots) - len(x))] + [(0, 0)] * (x.ndim - 1))
    if tokens.places is None:
        return x
    places = tokens.places.reshape(*tokens.places.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, places, axis=1, mode="fill", fill_value=0)


def restore(tokens: Tokens, x: jax.Array) -> jax.Array:
    """Arrays of the layers, [B', T', ...], in the order of the call, padding of the mesh last."""
    if tokens.places is None:
        return x
    back = jnp.argsort(tokens.places, axis=1)
    x = jnp.take_along_axis(x, back.reshape(*back.shape, *(1,) * (x.ndim - 2)), axis=1)
    return constrain(x, tokens.layout, *TOKENS, *(None,) * (x.ndim - 2))


def select(x: jax.Array, logits_at: LogitsAt, call: Call, tokens: Tokens) -> jax.Array:
    """The hidden states that logits are wanted for.

    Args:
      x: of the layers, [B', T', D].
      logits_at: as for a pass.
      call, tokens: of the pass.

    Returns:
      [B', T', D] in the order of the call for "all", else [B', P, D].

    Raises:
      ValueError: `logits_at` is none of those.
    """
    T = call.ids.shape[1]
    if isinstance(logits_at, str):
        if logits_at == "all":
            return restore(tokens, x)
        if logits_at != "last":
            raise ValueError(f"logits_at = {logits_at!r}: give 'all', 'last' or indices")
        if call.mask is None:
            indices = jnp.full(1, T - 1)
        else:
            indices = T - 1 - jnp.argmax(call.mask[:, ::-1], axis=1)[:, None]
    else:
        indices = jnp.asarray(logits_at)
        if indices.ndim not in (1, 2):
            raise ValueError(f"logits_at has {indices.ndim} axes; give indices [P] or [B, P]")
        # Beyond the call's tokens there is no hidden state: those logits become NaN.
        indices = jnp.where((indices < 0) | (indices >= T), x.shape[1], indices)
    if indices.ndim == 2:
        indices = jnp.pad(indices, [(0, len(x) - len(indices)), (0, 0)])
    elif tokens.places is None:
        return jnp.take(x, indices, axis=1, mode="fill")
    indices = jnp.broadcast_to(indices, (len(x), indices.shape[-1]))
    if tokens.places is not None:
        back = jnp.argsort(tokens.places, axis=1)
        indices = jnp.take_along_axis(back, indices, axis=1, mode="fill", fill_value=x.shape[1])
    axes_in, axes_out = (HIDDEN, ("batch", None)), ("batch", None, None)
    return on_shards(functools.partial(_pick, tokens.layout), tokens.layout, axes_in, axes_out)(
        x, indices
    )


def _pick(layout: Layout | None, x: jax.Array, indices: jax.Array) -> jax.Array:
    """`x` [B, T, D] at `indices` [B, P], NaN beyond the end; of a shard, T is its part."""
    if not is_cut(layout):
        return jnp.take_along_axis(x, indices[..., None], axis=1, mode="fill")
    size, shards = x.shape[1], layout.mesh.shape[CONTEXT]
    mine = indices - size * jax.lax.axis_index(CONTEXT)
    found = jnp.take_along_axis(x, mine[..., None], axis=1, mode="clip")
    found = jnp.where(((mine >= 0) & (mine < size))[..., None], found, 0)
    known = (indices < size * shards)[..., None]
    return jnp.where(known, jax.lax.psum(found, CONTEXT), jnp.nan)
