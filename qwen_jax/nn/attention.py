"""Grouped-query attention with causal, windowed and padded masks that are described, not stored."""

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.config import LayerKind, ModelConfig
from qwen_jax.nn.cache import KeyValues, write_slots
from qwen_jax.nn.linear import Linear
from qwen_jax.nn.norms import RMSNorm
from qwen_jax.nn.rope import Rotation, rotate

# Queries that are scored at once: bounds the scores in memory at [B, H, block, S].
_QUERY_BLOCK = 512


@flax.struct.dataclass
class Tokens:
    """Where the tokens of a call stand, the same for every layer.

    Attributes:
      slots: int32 [B, T], each token's place in the row's key order; a key at slot s is seen by
        queries at slot s and later. With a cache, padding has a slot past its end.
      key_valid: bool [B, S], keys that are real tokens; None when slots alone decide.
      rotation: of the call's tokens.
    """

    slots: jax.Array
    key_valid: jax.Array | None
    rotation: Rotation


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    key_valid: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Softmax attention of queries over the keys at their slot and before.

    Args:
      q: [B, T, H, d].
      k, v: [B, S, K, d]; key head j serves query heads j * G to (j + 1) * G - 1.
      slots: int32 [B, T], the slot of each query; key s stands at slot s.
      key_valid: bool [B, S] or None for all.
      window: a query at slot t sees keys at slots above t - window; None for no limit.

    Returns:
      [B, T, H, d], in q's dtype; scores and softmax are float32.
    """
    T = q.shape[1]
    if T <= _QUERY_BLOCK:
        return _attend_block(q, k, v, slots, key_valid, window)
    blocks = -(-T // _QUERY_BLOCK)
    padding = blocks * _QUERY_BLOCK - T
    q_blocks, slot_blocks = (
        einops.rearrange(
            jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)),
            "B (n t) ... -> n B t ...",
            n=blocks,
        )
        for x in (q, slots)
    )
    out = jax.lax.map(
        lambda block: _attend_block(block[0], k, v, block[1], key_valid, window),
        (q_blocks, slot_blocks),
    )
    return einops.rearrange(out, "n B t H d -> B (n t) H d")[:, :T]


def _attend_block(q, k, v, slots, key_valid, window) -> jax.Array:
    K, d = k.shape[2:]
    q = einops.rearrange(q, "B T (K G) d -> B T K G d", K=K)
    scores = jnp.einsum("BTKGd,BSKd->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = scores * d**-0.5
    key_slots = jnp.arange(k.shape[1])
    seen = key_slots <= slots[..., None]
    if window is not None:
        seen &= key_slots > slots[..., None] - window
    if key_valid is not None:
        seen &= key_valid[:, None, :]
    # The lowest number, not -inf: a padding query that sees no key must not become NaN.
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKd->BTKGd", weights, v)
    return einops.rearrange(out, "B T K G d -> B T (K G) d")


class Attention(nn.Module):
    """Self-attention: projections, optional QK-norm before rotation, cache, output projection."""

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
            q = RMSNorm(config.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(config.rms_norm_eps, name="k_norm")(k)
        q = rotate(q, tokens.rotation)
        k = rotate(k, tokens.rotation)
        if cache is not None:
            cache = KeyValues(
                keys=write_slots(cache.keys, tokens.slots, k),
                values=write_slots(cache.values, tokens.slots, v),
            )
            k, v = cache.keys, cache.values
        window = config.sliding_window if self.kind is LayerKind.SLIDING_ATTENTION else None
        out = attend(
            q, k.astype(q.dtype), v.astype(q.dtype), tokens.slots, tokens.key_valid, window
        )
        out = einops.rearrange(out, "B T H d -> B T (H d)")
        output = Linear(
            config.hidden_size, config.output_bias, config.initializer_range, name="o_proj"
        )
        return output(out), cache
