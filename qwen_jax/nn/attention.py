"""Self-attention as the models have it: projections, norms, rotation, cache, gate, output."""

import dataclasses
import functools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.config import LayerKind, ModelConfig
from qwen_jax.nn import dual_chunk
from qwen_jax.nn import far as far_keys
from qwen_jax.nn.attend import Branch, Mask
from qwen_jax.nn.cache import AttentionCache, key_value_axes, write_key_values, write_slots
from qwen_jax.nn.kernels.choose import Kernels, kernels_on
from qwen_jax.nn.kernels.paged import PagedKeyValues, paged_attend, read_pages, write_pages
from qwen_jax.nn.linear import Linear, as_rows
from qwen_jax.nn.norms import RMSNorm
from qwen_jax.nn.ring import (
    cache_attend,
    context_attend,
    first_slot,
    write_own_slots,
    write_travelling_slots,
)
from qwen_jax.nn.rope import Rotation, rotate
from qwen_jax.nn.tokens import Parts, Tokens, over_parts
from qwen_jax.sharding.axes import CONTEXT, TOKENS, is_cut, on_shards, repeat_heads


class Attention(nn.Module):
    """Self-attention with what the config asks for; its parameters are named as published.

    Queries and keys may be normed before they are rotated, and the output multiplied by the
    sigmoid of a projection (`gate_proj`) before it is projected.
    """

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: jax.Array, tokens: Tokens | Parts, cache: AttentionCache | None
    ) -> tuple[jax.Array, AttentionCache | None]:
        """[B, T, D] -> [B, T, D], and the cache with this call's tokens in it."""
        config, d, shape = self.config, self.config.head_dim, x.shape
        rows = as_rows(x, tokens.layout)

        def project(name: str, heads: int) -> jax.Array:
            layer = Linear(heads * d, config.qkv_bias, config.initializer_range, name=name)
            return layer(rows).reshape(*shape[:2], heads, d)

        q = project("q_proj", config.num_attention_heads)
        k = project("k_proj", config.num_key_value_heads)
        v = project("v_proj", config.num_key_value_heads)
        if config.qk_norm:
            centered = config.zero_centered_norm
            q = RMSNorm(config.rms_norm_eps, centered, name="q_norm")(q)
            k = RMSNorm(config.rms_norm_eps, centered, name="k_norm")(k)
        k, v = (repeat_heads(x, tokens.layout, "kv_heads") for x in (k, v))
        out, cache = over_parts(self._attend, (q, k, v), tokens, cache)
        if config.output_gate:
            out = out * nn.sigmoid(project("gate_proj", config.num_attention_heads))
        out = einops.rearrange(out, "B T H d -> B T (H d)")
        output = Linear(
            config.hidden_size, config.output_bias, config.initializer_range, name="o_proj"
        )
        return output(as_rows(out, tokens.layout)).reshape(shape), cache

    def _attend(self, q, k, v, tokens: Tokens, cache: AttentionCache | None):
        """Rotates and attends, each device on its own rows and heads."""
        config = self.config
        dual = tokens.dual_chunk if self.kind is LayerKind.FULL_ATTENTION else None
        k = rotate(k, tokens.rotation)
        rotations, chunks, scale = (tokens.rotation,), None, None
        if dual is not None:
            k = k * dual.scale[:, None, None, None].astype(k.dtype)
            rotations += (dual.successive, dual.inter)
            chunks = (dual.query_chunks, dual.key_chunks)
            scale = jnp.broadcast_to(dual.scale[:, None] * config.head_dim**-0.5, q.shape[:2])
        window = config.sliding_window if self.kind is LayerKind.SLIDING_ATTENTION else None
        far = tokens.far if self.kind is LayerKind.FULL_ATTENTION else None
        if far is not None:
            rotations += (far.queries,)
            window, far = far.window, (far.turn, far.key_groups)
        queries = tuple(rotate(q, rotation) for rotation in rotations)
        if tokens.query_scale is not None:
            by = tokens.query_scale[..., None, None].astype(q.dtype)
            queries = tuple(q * by for q in queries)
        layout = tokens.layout
        heads = (*TOKENS, "heads", None)
        caches = None if cache is None else key_value_axes(cache)
        keys = TOKENS if cache is None else ("batch", "slots")
        kernels = dataclasses.replace(
            kernels_on(layout), in_order=cache is None and tokens.places is None, keys_in_order=True
        )
        attention = functools.partial(
            _enter_and_attend, kernels, window, is_cut(layout), is_cut(layout, "slots")
        )
        attend_on_shards = on_shards(
            attention,
            layout,
            (
                heads,
                heads,
                heads,
                TOKENS,
                keys,
                TOKENS,
                chunks and (TOKENS, keys),
                far and (keys, keys),
                TOKENS,
                caches,
            ),
            (heads, caches),
        )
        segments = tokens.segments
        return attend_on_shards(
            queries, k, v, tokens.slots, tokens.key_valid, segments, chunks, far, scale, cache
        )


def _enter_and_attend(
    kernels: Kernels,
    window: int | None,
    length_cut: bool,
    slots_cut: bool,
    queries: tuple[jax.Array, ...],
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    key_valid: jax.Array | None,
    segments: jax.Array | None,
    chunks: tuple[jax.Array, jax.Array] | None,
    far: tuple[Rotation | None, jax.Array | None] | None,
    scale: jax.Array | None,
    cache: AttentionCache | None,
) -> tuple[jax.Array, AttentionCache | None]:
    """Enters keys and values into the cache, if there is one, and attends over what is there.

    Args:
      kernels: what computes attention, with its promises.
      window: of a sliding layer, or that other keys are beyond; None for no limit.
      length_cut, slots_cut: whether these are a shard's part of the texts, and of the cache.
      queries: rotated, [B, T, H, d]; three of them where there are chunks, two with far keys.
      k, v: [B, T, K, d].
      slots, key_valid, segments: as `Tokens` has them.
      chunks: of the queries and of the keys.
      far: of the keys, how they are turned on beyond the window, and their groups, 0 for those
        that are seen there; None each for nothing, and for all.
      scale: float32 [B, T]; None for the default one.
      cache: with [B, S, K, d] of floats or int8; or pages, of which one token reads those filled.
    """
    q = queries[0]
    # Where no mesh cuts the texts key s stands at slot s.
    key_slots = slots if length_cut else None
    if isinstance(cache, PagedKeyValues):
        cache = write_pages(cache, slots, k, v)
        if slots.shape[1] == 1 and q.dtype == cache.pages.dtype:
            return paged_attend(q, cache, slots, k.shape[2], window, scale), cache
        k, v = (x.astype(q.dtype) for x in read_pages(cache, *k.shape[2:]))
    elif cache is not None:
        write = write_slots
        if slots_cut:
            write = write_travelling_slots if length_cut else write_own_slots
            write = functools.partial(write, axis_name=CONTEXT)
        cache = write_key_values(cache, slots, k, v, write)
        k, v = (x.astype(q.dtype) for x in (cache.keys, cache.values))
        if length_cut:
            own = first_slot(k, CONTEXT) + jnp.arange(k.shape[1], dtype=jnp.int32)
            key_slots = jnp.broadcast_to(own, k.shape[:2])
        elif not slots_cut:
            # Padding stands behind the last slot, from where it would see them all.
            slots = jnp.where(slots < k.shape[1], slots, 0)
    turn, groups, branches = None, (None, None), (Branch(),)
    if chunks is not None:
        groups, branches = chunks, dual_chunk.BRANCHES
    elif far is not None:
        turn, key_groups = far
        groups = (None if key_groups is None else jnp.zeros_like(slots), key_groups)
    mask = Mask(
        slots,
        key_valid,
        *groups,
        key_slots=key_slots,
        query_segments=segments,
        key_segments=segments,
        window=window,
    )
    if far is not None:
        branches = far_keys.branches(mask)
    if length_cut:
        out = context_attend(
            queries,
            k,
            v,
            mask,
            scale,
            axis_name=CONTEXT,
            branches=branches,
            turn=turn,
            zigzag_keys=cache is None,
            kernels=kernels,
        )
    elif slots_cut and cache is not None:
        out = cache_attend(
            queries, k, v, mask, scale, axis_name=CONTEXT, branches=branches, turn=turn
        )
    elif chunks is not None:
        out = dual_chunk.dual_chunk_attend(
            queries,
            k,
            v,
            slots,
            key_valid,
            *chunks,
            scale,
            query_segments=segments,
            key_segments=segments,
            kernels=kernels,
        )
    elif far is not None:
        out = far_keys.far_attend(queries, k, v, mask, turn, kernels)
    else:
        out, _ = kernels.attend(*queries, k, v, mask, scale, needs_lse=False)
    return out, cache
