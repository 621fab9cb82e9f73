"""The decoder-only language model: embedding, layers, final norm, output head."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.config import LayerKind, ModelConfig
from qwen_jax.nn.attention import Attention, Tokens
from qwen_jax.nn.cache import Cache, KeyValues, write_slots
from qwen_jax.nn.linear import fetch_param, linear
from qwen_jax.nn.mlp import SwiGLU
from qwen_jax.nn.norms import RMSNorm
from qwen_jax.nn.rope import inverse_frequencies, rotation

LogitsAt = Literal["all", "last"] | jax.Array


@flax.struct.dataclass
class DecoderOutput:
    """What `Decoder` returns. Under `jit`, what the caller does not return costs nothing.

    Attributes:
      logits: float32 [B, T, V], or [B, P, V] for the P positions asked for.
      cache: the cache with this call's tokens in it; None if none was given.
      hidden_states: L + 1 arrays [B, T, D]: the embeddings, each layer's output, and in the last
        place the last layer's output after the final norm, as transformers counts them.
      router: None, since no layer routes.
    """

    logits: jax.Array
    cache: Cache | None
    hidden_states: tuple[jax.Array, ...]
    router: Any = None


class DecoderLayer(nn.Module):
    """Pre-norm residual block: token mixer, then feed-forward."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: jax.Array, tokens: Tokens, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues | None]:
        """[B, T, D] -> [B, T, D], and the layer's new cache."""
        eps = self.config.rms_norm_eps
        normed = RMSNorm(eps, name="input_layernorm")(x)
        mixed, cache = Attention(self.config, self.kind, name="self_attn")(normed, tokens, cache)
        x = x + mixed
        normed = RMSNorm(eps, name="post_attention_layernorm")(x)
        return x + SwiGLU(self.config, name="mlp")(normed), cache


# Outside of `jit`, a forward pass runs a handful of compiled programs, one for all layers of a
# kind, so that the first pass compiles a layer and not the model. Inside of `jit`, layers share
# their trace and XLA inlines the calls.
_CompiledLayer = nn.jit(DecoderLayer)
_CompiledNorm = nn.jit(RMSNorm)
_compiled_linear = jax.jit(linear, static_argnames="out_dtype")


class Decoder(nn.Module):
    """A decoder-only language model described by `config`.

    Usage: `out = model.apply({"params": params}, input_ids)`.
    """

    config: ModelConfig

    def setup(self):
        """Declares the blocks; their names are the paths in the parameter tree."""
        config = self.config
        self.embed_tokens = _Embedding(config)
        self.layers = [_CompiledLayer(config, kind) for kind in config.layer_types]
        self.norm = _CompiledNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = _Embedding(config)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        logits_at: LogitsAt = "all",
    ) -> DecoderOutput:
        """Runs the tokens of one call.

        Args:
          input_ids: int [B, T].
          attention_mask: [B, T], 1 for real tokens, padding on either side; None for all real.
          positions: int [B, T]; None means 0..T-1, or with a cache what follows its positions,
            padding counted.
          cache: the tokens before these; `nn.cache.init_cache` makes an empty one. `grow_cache`
            before it is full: a row with more tokens than slots gets NaN for logits.
          logits_at: "all", "last" (each row's last real token), or int [P] or [B, P] indices
            into the T tokens of this call. A string is static under `jit`.

        Raises:
          ValueError: arguments of another shape than these.
        """
        config = self.config
        ids = jnp.asarray(input_ids, jnp.int32)
        if ids.ndim != 2:
            raise ValueError(f"input_ids has {ids.ndim} axes; give token ids [batch, length]")
        if positions is not None:
            positions = jnp.asarray(positions, jnp.int32)
        mask = None if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
        if cache is None:
            warn_if_longer(config, ids.shape[1])
            tokens = _place(config, ids, mask, positions)
            layers = (None,) * config.num_hidden_layers
        else:
            tokens, cache_after = _place_after(config, ids, mask, positions, cache)
            if config.rope.depends_on_length:
                cache = self._follow_length(cache, cache_after.frequencies_for)
            layers = cache.layers
        x = _embed(self.embed_tokens(), ids)
        hidden_states, layers = self._run_layers(x, tokens, layers)
        x = self.norm(hidden_states[-1])
        head = self.embed_tokens() if config.tie_word_embeddings else self.lm_head()
        logits = _compiled_linear(_select(x, logits_at, mask), head, out_dtype=jnp.float32)
        if cache is not None:
            # A row that has outgrown its cache has lost tokens: better no numbers than wrong ones.
            fits = cache_after.lengths <= cache_after.capacity
            logits = jnp.where(fits[:, None, None], logits, jnp.nan)
        return DecoderOutput(
            logits=logits,
            cache=None if cache is None else cache_after.replace(layers=layers),
            hidden_states=(*hidden_states[:-1], x),
        )

    def _run_layers(
        self, x: jax.Array, tokens: Tokens, caches: tuple[KeyValues | None, ...]
    ) -> tuple[list[jax.Array], tuple[KeyValues | None, ...]]:
        """The input and every layer's output, and the layers' new caches."""
        hidden_states, new_caches = [x], []
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                x, cache = layer(x, tokens, cache)
            hidden_states.append(x)
            new_caches.append(cache)
        return hidden_states, tuple(new_caches)

    def _follow_length(self, cache: Cache, longest: jax.Array) -> Cache:
        """`cache` as a text of `longest` tokens would have it.

        Other frequencies change not only the rotation of cached keys but, from the second layer
        on, what they were computed from, so the cached tokens run through the layers again.
        """
        spec, d = self.config.rope, self.config.head_dim
        before = inverse_frequencies(spec, d, cache.frequencies_for)
        stale = jnp.any(inverse_frequencies(spec, d, longest) != before) & jnp.any(cache.lengths)

        def rebuild(decoder: "Decoder", cache: Cache) -> Cache:
            tokens = Tokens(
                slots=jnp.broadcast_to(jnp.arange(cache.capacity), cache.ids.shape),
                key_valid=None,
                rotation=rotation(spec, d, cache.positions, longest),
            )
            x = _embed(decoder.embed_tokens(), cache.ids)
            return cache.replace(layers=decoder._run_layers(x, tokens, cache.layers)[1])

        return nn.cond(stale, rebuild, lambda decoder, cache: cache, self, cache)


class _Embedding(nn.Module):
    """Declares `weight` [V, D], for the input table and the output head alike."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        return fetch_param(self, "weight", init, (self.config.vocab_size, self.config.hidden_size))


@jax.jit
def _embed(table: jax.Array, ids: jax.Array) -> jax.Array:
    # Ids outside the table, below 0 too, become NaN instead of some other token's embedding.
    return jnp.take(table, jnp.where(ids < 0, table.shape[0], ids), axis=0, mode="fill")


@functools.partial(jax.jit, static_argnames="config")
def _place(
    config: ModelConfig, ids: jax.Array, mask: jax.Array | None, positions: jax.Array | None
) -> Tokens:
    """Where the tokens of a call without a cache stand: in order, padding included."""
    order = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    positions = order if positions is None else jnp.broadcast_to(positions, ids.shape)
    rotated = rotation(config.rope, config.head_dim, positions, positions.max() + 1)
    return Tokens(slots=order, key_valid=mask, rotation=rotated)


@functools.partial(jax.jit, static_argnames="config")
def _place_after(
    config: ModelConfig,
    ids: jax.Array,
    mask: jax.Array | None,
    positions: jax.Array | None,
    cache: Cache,
) -> tuple[Tokens, Cache]:
    """Where the tokens of a call stand after those of `cache`, and its books with them entered."""
    if positions is None:
        positions = cache.next_positions[:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(positions, ids.shape)
    next_positions = jnp.maximum(cache.next_positions, positions.max(axis=1) + 1)
    # The longest row sets the frequencies of the whole batch, as in transformers.
    longest = next_positions.max()
    real = jnp.ones_like(ids) if mask is None else mask.astype(jnp.int32)
    order = jnp.cumsum(real, axis=1)
    slots = jnp.where(real, cache.lengths[:, None] + order - 1, cache.capacity)
    cache = cache.replace(
        lengths=cache.lengths + order[:, -1],
        next_positions=next_positions,
        frequencies_for=longest,
        positions=write_slots(cache.positions, slots, positions),
        ids=write_slots(cache.ids, slots, ids),
    )
    rotated = rotation(config.rope, config.head_dim, positions, longest)
    return Tokens(slots=slots, key_valid=None, rotation=rotated), cache


def _select(x: jax.Array, logits_at: LogitsAt, mask: jax.Array | None) -> jax.Array:
    """The hidden states [B, P, D] of `x` [B, T, D] that logits are wanted for."""
    if isinstance(logits_at, str):
        if logits_at == "all":
            return x
        if logits_at != "last":
            raise ValueError(f"logits_at = {logits_at!r}: give 'all', 'last' or indices")
        if mask is None:
            return x[:, -1:]
        last = x.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)
    indices = jnp.asarray(logits_at)
    if indices.ndim not in (1, 2):
        raise ValueError(f"logits_at has {indices.ndim} axes; give indices [P] or [B, P]")
    # Beyond the call's tokens there is no hidden state: those logits become NaN.
    indices = jnp.where(indices < 0, x.shape[1], indices)
    if indices.ndim == 1:
        return jnp.take(x, indices, axis=1, mode="fill")
    return jnp.take_along_axis(x, indices[..., None], axis=1, mode="fill")


def warn_if_longer(config: ModelConfig, length: int) -> None:
    """Warns, once for a limit, of `length` tokens beyond the model's positions, RoPE unscaled."""
    if config.exceeds_positions(length):
        _warn_once(config.max_position_embeddings)


@functools.cache
def _warn_once(limit: int) -> None:
    warnings.warn(
        f"the text is longer than the model's {limit} positions (max_position_embeddings) and "
        "RoPE is not scaled: expect the output to degrade",
        stacklevel=2,
    )


def parameter_shapes(config: ModelConfig) -> Mapping[str, Any]:
    """The parameter tree of `Decoder(config)` with a `jax.ShapeDtypeStruct` at each leaf."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(Decoder(config).init, key, ids)["params"]
