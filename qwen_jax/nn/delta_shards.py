"""The gated delta rule and its convolutions over texts that are shared out over a mesh axis.

Everything here runs inside `jax.shard_map`; of c shards, shard i holds chunks i and 2c - 1 - i of
each text, as `nn.ring.zigzag` lays them out. What a chunk does to the state is affine,
S <- A S + b: each shard finds A and b of its chunks, all shards learn of all of them, and combine
them in the order of the text.

Rows are texts with what padding they have at the end, where `log_decay` and `beta` are 0.
Letters are those of `nn.delta_rule`, and m the tokens of a chunk.
"""

import einops
import jax
import jax.numpy as jnp

from qwen_jax.nn.delta_rule import causal_conv, einsum, gated_delta_rule, segment_starts


def sharded_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    segments: jax.Array | None = None,
    *,
    axis_name: str,
) -> tuple[jax.Array, jax.Array]:
    """`gated_delta_rule` of a text of which each shard has two chunks, T = 2m tokens.

    Args:
      q, k, v, log_decay, beta: as there, of the shard's tokens.
      state: float32 [B, H, d, e] before the text's first token, the same on all shards.
      segments: int32 [B, T], the text of several in a row that each token belongs to; the state is
        emptied where another begins. None for one.
      axis_name: the mesh axis.

    Returns:
      [B, T, H, e] in v's dtype, and the state after the text's last token, on all shards.
    """
    B, d, e = q.shape[0], q.shape[-1], v.shape[-1]
    H = v.shape[2]
    starts = None
    if segments is not None:
        starts = segment_starts(_fold(segments), _segments_before(segments, 1, axis_name))

    # A state of [0, I] becomes [b, A], and values of [v, 0] are read as what an empty state gives
    # and what reads the real one: one pass for both.
    values = jnp.pad(v.astype(jnp.float32), [(0, 0)] * 3 + [(0, d)])
    start = jnp.broadcast_to(jnp.eye(d, d + e, e, dtype=jnp.float32), (2 * B, H, d, d + e))
    tokens = (_fold(x) for x in (q, k, values, log_decay, beta))
    out, end = gated_delta_rule(*tokens, start, starts)

    effects = _in_text_order(einops.rearrange(end, "(B p) ... -> p B ...", p=2), axis_name)

    def through_chunk(state, effect):
        after = einsum("BHdk,BHke->BHde", effect[..., e:], state) + effect[..., :e]
        return after, state

    final, before = jax.lax.scan(through_chunk, state, effects)
    mine = einops.rearrange(before[_own_chunks(axis_name)], "p B ... -> (B p) ...")
    out = out[..., :e] + einsum("BTHd,BHde->BTHe", out[..., e:], mine)
    return _unfold(out).astype(v.dtype), final


def sharded_causal_conv(
    x: jax.Array,
    weight: jax.Array,
    state: jax.Array,
    lengths: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    axis_name: str,
) -> tuple[jax.Array, jax.Array]:
    """`causal_conv` of a text of which each shard has two chunks, T = 2m tokens.

    Args:
      x: [B, T, C], the shard's.
      weight: [C, taps].
      state: [B, taps - 1, C], the inputs before the text, the same on all shards.
      lengths: int [B], how many tokens of the whole row are real; None for all.
      segments: int32 [B, T], of the shard's tokens; None for one text a row.
      axis_name: the mesh axis.

    Returns:
      [B, T, C] in x's dtype, and the state after the row's last real token, on all shards.
    """
    before = _inputs_before(x, state.astype(x.dtype), axis_name)
    owners = segments_before = None
    if segments is not None:
        owners = _fold(segments)
        segments_before = _segments_before(segments, state.shape[1], axis_name)
    y, _ = causal_conv(_fold(x), weight, _fold_pairs(before), None, owners, segments_before)
    return _unfold(y), _last_inputs(x, state, lengths, axis_name)


def _inputs_before(x: jax.Array, state: jax.Array, axis_name: str) -> jax.Array:
    """[2, B, n, C], the n inputs before each of the shard's chunks.

    Args:
      x: [B, T, C], the shard's inputs.
      state: [B, n, C], the inputs before the text.
      axis_name: the mesh axis.
    """
    n = state.shape[1]
    chunks = einops.rearrange(x, "B (p m) C -> p B m C", p=2)
    ends = _in_text_order(chunks[:, :, max(chunks.shape[2] - n, 0) :], axis_name)
    size = ends.shape[2]
    # Without what no chunk needs, the ends of chunks follow one another as the text itself does:
    # where chunks are shorter than n they are all of it.
    line = jnp.concatenate([state, einops.rearrange(ends, "j B s C -> B (j s) C")], axis=1)
    return jnp.stack(
        [
            jax.lax.dynamic_slice_in_dim(line, chunk * size, n, axis=1)
            for chunk in _own_chunks(axis_name)
        ]
    )


def _segments_before(segments: jax.Array, n: int, axis_name: str) -> jax.Array:
    """[2B, n], of the n tokens before each of the shard's chunks."""
    # What stands before the row goes on in its first token, which is on shard 0.
    first = jax.lax.all_gather(segments[:, :1], axis_name)[0]
    before = _inputs_before(segments[..., None], jnp.repeat(first, n, axis=1)[..., None], axis_name)
    return _fold_pairs(before)[..., 0]


def _last_inputs(
    x: jax.Array, state: jax.Array, lengths: jax.Array | None, axis_name: str
) -> jax.Array:
    """[B, n, C], the inputs of each row's last real tokens, whichever shard has them."""
    n, m = state.shape[1], x.shape[1] // 2
    if lengths is None:
        lengths = jnp.full(x.shape[0], 2 * m * jax.lax.axis_size(axis_name))
    places = lengths[:, None] + jnp.arange(-n, 0)

    def take(inputs: jax.Array, first: jax.Array | int, on_shard: jax.Array | bool) -> jax.Array:
        """Of `inputs`, which stand at `first` and following; zeros for other places."""
        here = places - first
        found = on_shard & (here >= 0) & (here < inputs.shape[1])
        here = jnp.where(found, here, inputs.shape[1])[..., None]
        return jnp.take_along_axis(inputs, here, axis=1, mode="fill", fill_value=0)

    taken = take(state.astype(x.dtype), -n, jax.lax.axis_index(axis_name) == 0)
    for part, chunk in zip(jnp.split(x, 2, axis=1), _own_chunks(axis_name), strict=True):
        taken = taken + take(part, chunk * m, True)
    return jax.lax.psum(taken, axis_name).astype(state.dtype)


def _own_chunks(axis_name: str) -> jax.Array:
    """int32 [2], the shard's chunks, counted in the order of the text."""
    i = jax.lax.axis_index(axis_name)
    return jnp.stack([i, 2 * jax.lax.axis_size(axis_name) - 1 - i])


def _in_text_order(x: jax.Array, axis_name: str) -> jax.Array:
    """[2c, ...] of all chunks, from [2, ...] of each shard's."""
    x = jax.lax.all_gather(x, axis_name)
    return jnp.concatenate([x[:, 0], x[::-1, 1]])


def _fold(x: jax.Array) -> jax.Array:
    """[B, 2m, ...] -> [2B, m, ...]: a shard's chunks as rows of their own."""
    return einops.rearrange(x, "B (p m) ... -> (B p) m ...", p=2)


def _fold_pairs(x: jax.Array) -> jax.Array:
    """[2, B, ...] -> [2B, ...], in the order of `_fold`."""
    return einops.rearrange(x, "p B ... -> (B p) ...")


def _unfold(x: jax.Array) -> jax.Array:
    """The inverse of `_fold`."""
    return einops.rearrange(x, "(B p) m ... -> B (p m) ...", p=2)
