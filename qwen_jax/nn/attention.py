"""Self-attention as the models have it: projections, norms, rotation, cache, gate, output."""

import einops
import flax.linen as nn
import flax.struct
import jax

from qwen_jax.config import LayerKind, ModelConfig
from qwen_jax.nn.attend import Mask, attend
from qwen_jax.nn.cache import KeyValues, write_slots
from qwen_jax.nn.dual_chunk import dual_chunk_attend
from qwen_jax.nn.linear import Linear
from qwen_jax.nn.norms import RMSNorm
from qwen_jax.nn.rope import Rotation, rotate


@flax.struct.dataclass
class DualChunk:
    """Where the tokens of a call stand in Dual Chunk Attention.

    Attributes:
      successive, inter: rotations of queries for keys of the chunk before and of older chunks; the
        call's own rotation is for keys, and for queries of the same chunk.
      query_chunks, key_chunks: int32 [B, T] and [B, S].
      scale: float32 [B], of the call's keys and of its scores.
    """

    successive: Rotation
    inter: Rotation
    query_chunks: jax.Array
    key_chunks: jax.Array
    scale: jax.Array


@flax.struct.dataclass
class Tokens:
    """Where the tokens of a call stand, the same for every layer.

    Attributes:
      slots: int32 [B, T], each token's place in the row's key order; a key at slot s is seen by
        queries at slot s and later. With a cache, padding has a slot past its end.
      real: bool [B, T], tokens that are not padding; None when all are real.
      key_valid: bool [B, S], keys that are real tokens; None when slots alone decide.
      rotation: of the call's tokens.
      query_scale: float32 [B, T], what queries are multiplied by; None for nothing.
      dual_chunk: in models with Dual Chunk Attention.
    """

    slots: jax.Array
    real: jax.Array | None
    key_valid: jax.Array | None
    rotation: Rotation
    query_scale: jax.Array | None = None
    dual_chunk: DualChunk | None = None


class Attention(nn.Module):
    """Self-attention with what the config asks for; its parameters are named as published.

    Queries and keys may be normed before they are rotated, and the output multiplied by the
    sigmoid of a projection (`gate_proj`) before it is projected.
    """

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: jax.Array, tokens: Tokens, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues | None]:
        """[B, T, D] -> [B, T, D], and the cache with this call's tokens in it."""
        config, d = self.config, self.config.head_dim

        def project(name: str, heads: int) -> jax.Array:
            layer = Linear(heads * d, config.qkv_bias, config.initializer_range, name=name)
            return einops.rearrange(layer(x), "B T (h d) -> B T h d", d=d)

        q = project("q_proj", config.num_attention_heads)
        k = project("k_proj", config.num_key_value_heads)
        v = project("v_proj", config.num_key_value_heads)
        if config.qk_norm:
            centered = config.zero_centered_norm
            q = RMSNorm(config.rms_norm_eps, centered, name="q_norm")(q)
            k = RMSNorm(config.rms_norm_eps, centered, name="k_norm")(k)
        out, cache = self._attend(q, k, v, tokens, cache)
        if config.output_gate:
            out = out * nn.sigmoid(project("gate_proj", config.num_attention_heads))
        out = einops.rearrange(out, "B T H d -> B T (H d)")
        output = Linear(
            config.hidden_size, config.output_bias, config.initializer_range, name="o_proj"
        )
        return output(out), cache

    def _attend(self, q, k, v, tokens: Tokens, cache: KeyValues | None):
        """Rotates, enters keys and values into the cache, and attends over what is there."""
        config = self.config
        dual = tokens.dual_chunk if self.kind is LayerKind.FULL_ATTENTION else None
        k = rotate(k, tokens.rotation)
        if dual is not None:
            k = k * dual.scale[:, None, None, None].astype(k.dtype)
        if cache is not None:
            cache = KeyValues(
                keys=write_slots(cache.keys, tokens.slots, k),
                values=write_slots(cache.values, tokens.slots, v),
            )
            k, v = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)
        if dual is not None:
            rotations = (tokens.rotation, dual.successive, dual.inter)
            out = dual_chunk_attend(
                tuple(rotate(q, rotation) for rotation in rotations),
                k,
                v,
                tokens.slots,
                tokens.key_valid,
                dual.query_chunks,
                dual.key_chunks,
                dual.scale[:, None] * config.head_dim**-0.5,
            )
            return out, cache
        q = rotate(q, tokens.rotation)
        if tokens.query_scale is not None:
            q = q * tokens.query_scale[..., None, None].astype(q.dtype)
        window = config.sliding_window if self.kind is LayerKind.SLIDING_ATTENTION else None
        out, _ = attend(q, k, v, Mask(tokens.slots, tokens.key_valid, window=window))
        return out, cache
