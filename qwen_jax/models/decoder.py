"""The decoder-only language model: embedding, layers, final norm, output head."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.config import HeadKind, LayerKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.nn import dual_chunk
from qwen_jax.nn.attention import Attention, DualChunk, Tokens
from qwen_jax.nn.cache import Cache, KeyValues, init_cache, write_slots
from qwen_jax.nn.delta_rule import DeltaState, GatedDeltaNet
from qwen_jax.nn.linear import Linear, fetch_param, linear
from qwen_jax.nn.mlp import SwiGLU
from qwen_jax.nn.moe import Dispatch, Routing, SparseMoe
from qwen_jax.nn.norms import RMSNorm
from qwen_jax.nn.rope import inverse_frequencies, logn_scale, rotation

LogitsAt = Literal["all", "last"] | jax.Array
LayerCache = KeyValues | DeltaState


@flax.struct.dataclass
class DecoderOutput:
    """What `Decoder` returns. Under `jit`, what the caller does not return costs nothing.

    Attributes:
      logits: float32 [B, T, V], or [B, P, V] for the P positions asked for; of a scoring head, with
        its labels for V, and of a guard with those of `GuardSpec.widths`, one after another. None
        where the checkpoint has no output head.
      cache: the cache with this call's tokens in it; None if none was given.
      hidden_states: L + 1 arrays [B, T, D]: the embeddings, each layer's output, and in the last
        place the last layer's output after the final norm, as transformers counts them.
      router: for each layer where its experts' tokens went, None for a dense layer.
    """

    logits: jax.Array | None
    cache: Cache | None
    hidden_states: tuple[jax.Array, ...]
    router: tuple[Routing | None, ...]


class DecoderLayer(nn.Module):
    """Pre-norm residual block: token mixer, then feed-forward.

    Attributes:
      config: of the model.
      kind: of the mixer.
      is_sparse: whether the feed-forward block is a mixture of experts.
      dispatch, capacity_factor: as `SparseMoe` has them.
    """

    config: ModelConfig
    kind: LayerKind
    is_sparse: bool
    dispatch: Dispatch | None = None
    capacity_factor: float | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, tokens: Tokens, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None, Routing | None]:
        """[B, T, D] -> [B, T, D], the layer's new cache, and where its tokens were routed."""
        config = self.config
        normed = _norm(config, RMSNorm, name="input_layernorm")(x)
        if self.kind is LayerKind.LINEAR_ATTENTION:
            mixer = GatedDeltaNet(config, name="linear_attn")
            mixed, cache = mixer(normed, tokens.real, cache)
        else:
            mixer = Attention(config, self.kind, name="self_attn")
            mixed, cache = mixer(normed, tokens, cache)
        x = x + mixed
        normed = _norm(config, RMSNorm, name="post_attention_layernorm")(x)
        if self.is_sparse:
            experts = SparseMoe(config, self.dispatch, self.capacity_factor, name="mlp")
            y, routing = experts(normed, tokens.real)
        else:
            y, routing = SwiGLU(config, name="mlp")(normed), None
        return x + y, cache, routing


def _norm(config: ModelConfig, kind: type[nn.Module], **options: Any) -> nn.Module:
    return kind(config.rms_norm_eps, config.zero_centered_norm, **options)


# Outside of `jit`, a forward pass runs a handful of compiled programs, one for all layers of a
# kind, so that the first pass compiles a layer and not the model. Inside of `jit`, layers share
# their trace and XLA inlines the calls.
_CompiledLayer = nn.jit(DecoderLayer)
_CompiledNorm = nn.jit(RMSNorm)
_CompiledLinear = nn.jit(Linear)
_compiled_linear = jax.jit(linear, static_argnames="out_dtype")


class Decoder(nn.Module):
    """A decoder-only language model described by `config`.

    Usage: `out = model.apply({"params": params}, input_ids)`.

    Attributes:
      config: of the model.
      dispatch: how experts run; None for `nn.moe.choose_dispatch`'s choice in each call.
      capacity_factor: of `Dispatch.CAPACITY`, and only of it; what was dropped is in the output's
        `router`.
    """

    config: ModelConfig
    dispatch: Dispatch | None = None
    capacity_factor: float | None = None

    def setup(self):
        """Declares the blocks; their names are the paths in the parameter tree."""
        config = self.config
        sparse = config.moe.layers if config.moe else ()
        self.embed_tokens = _Embedding(config)
        self.layers = [
            _CompiledLayer(config, kind, i in sparse, self.dispatch, self.capacity_factor)
            for i, kind in enumerate(config.layer_types)
        ]
        self.norm = _norm(config, _CompiledNorm)
        match config.head:
            case HeadKind.VOCABULARY if not config.tie_word_embeddings:
                self.lm_head = _Embedding(config)
            case HeadKind.SCORE | HeadKind.SCORE_WITH_BIAS:
                biased = config.head is HeadKind.SCORE_WITH_BIAS
                self.score = _CompiledLinear(config.num_labels, biased)
            case HeadKind.TWO_LAYER_SCORE:
                self.score_0 = _CompiledLinear(config.hidden_size, True)
                self.score_2 = _CompiledLinear(config.num_labels, True)
            case HeadKind.GUARD:
                self.answer_guard = _Guard(config, config.guard.widths[:2])
                self.query_guard = _Guard(config, config.guard.widths[2:])
        if config.mtp_layers:
            self.mtp = _MtpHead(config, self.dispatch, self.capacity_factor)

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
        ids, mask, positions = _checked(input_ids, attention_mask, positions)
        if cache is None:
            warn_if_longer(config, ids.shape[1])
            cache_after = None
            tokens = _place(config, ids, mask, positions)
            layers = (None,) * config.num_hidden_layers
        else:
            tokens, cache_after = _place_after(config, ids, mask, positions, cache)
            if config.rope.depends_on_length:
                cache = self._follow_length(cache, cache_after.frequencies_for)
            layers = cache.layers
        x = _embed(self.embed_tokens(), ids)
        hidden_states, layers, router = self._run_layers(x, tokens, layers)
        x = self.norm(hidden_states[-1])
        if config.mtp_layers and self.is_initializing():
            self.predict_next(x, ids)
        return DecoderOutput(
            logits=_of_those_that_fit(self._read(_select(x, logits_at, mask)), cache_after),
            cache=None if cache is None else cache_after.replace(layers=layers),
            hidden_states=(*hidden_states[:-1], x),
            router=router,
        )

    def predict_next(
        self,
        hidden_states: jax.Array,
        next_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        logits_at: LogitsAt = "all",
        step: int = 0,
    ) -> DecoderOutput:
        """Predicts the token after the next with the multi-token-prediction head.

        Usage: `model.apply({"params": params}, hidden, next_ids, method="predict_next")`.

        Args:
          hidden_states: [B, T, D], the main pass's last (`out.hidden_states[-1]`), or to look
            further ahead this head's own. That the head reads them behind the final norm is
            believed, from what other engines hand over, not confirmed.
          next_ids: int [B, T], at each place the token that follows it.
          attention_mask, positions, logits_at: as for a pass, and by the same places.
          cache: from `init_mtp_cache`, apart from the main one.
          step: how many tokens further than the first; heads with several layers take them in turn.

        Returns:
          `logits` of the token after `next_ids`; `hidden_states` holds the head's one.

        Raises:
          ValueError: the model has no such head, or arguments of another shape than these.
        """
        config = self.config
        if not config.mtp_layers:
            raise ValueError("the model has no head for the token after the next (mtp_layers = 0)")
        ids, mask, positions = _checked(next_ids, attention_mask, positions)
        if jnp.shape(hidden_states) != (*ids.shape, config.hidden_size):
            raise ValueError(
                f"hidden_states has shape {jnp.shape(hidden_states)}, where next_ids of shape "
                f"{ids.shape} need {(*ids.shape, config.hidden_size)}"
            )
        if cache is None:
            cache_after, layer_cache = None, None
            tokens = _place(config, ids, mask, positions)
        else:
            tokens, cache_after = _place_after(config, ids, mask, positions, cache)
            (layer_cache,) = cache.layers
        embedded = _embed(self.embed_tokens(), ids)
        x, layer_cache, routing = self.mtp(embedded, hidden_states, tokens, layer_cache, step)
        return DecoderOutput(
            logits=_of_those_that_fit(self._read(_select(x, logits_at, mask)), cache_after),
            cache=None if cache is None else cache_after.replace(layers=(layer_cache,)),
            hidden_states=(x,),
            router=(routing,),
        )

    def _read(self, x: jax.Array) -> jax.Array | None:
        """What the output head makes of hidden states [B, P, D], in float32."""
        config = self.config
        match config.head:
            case HeadKind.NONE:
                return None
            case HeadKind.VOCABULARY:
                head = self.embed_tokens() if config.tie_word_embeddings else self.lm_head()
                return _compiled_linear(x, head, out_dtype=jnp.float32)
            case HeadKind.TWO_LAYER_SCORE:
                return self.score_2(nn.relu(self.score_0(x))).astype(jnp.float32)
            case HeadKind.GUARD:
                parts = (*self.answer_guard(x), *self.query_guard(x))
                return jnp.concatenate(parts, axis=-1).astype(jnp.float32)
            case _:
                return self.score(x).astype(jnp.float32)

    def _run_layers(
        self, x: jax.Array, tokens: Tokens, caches: tuple[LayerCache | None, ...]
    ) -> tuple[list[jax.Array], tuple[LayerCache | None, ...], tuple[Routing | None, ...]]:
        """The input and every layer's output, the layers' new caches, and their routing."""
        hidden_states, new_caches, router = [x], [], []
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                x, cache, routing = layer(x, tokens, cache)
            hidden_states.append(x)
            new_caches.append(cache)
            router.append(routing)
        return hidden_states, tuple(new_caches), tuple(router)

    def _follow_length(self, cache: Cache, longest: jax.Array) -> Cache:
        """`cache` as a text of `longest` tokens would have it.

        Other frequencies change not only the rotation of cached keys but, from the second layer
        on, what they were computed from, so the cached tokens run through the layers again.
        """
        config = self.config
        before = inverse_frequencies(config.rope, config.rotary_dim, cache.frequencies_for)
        after = inverse_frequencies(config.rope, config.rotary_dim, longest)
        stale = jnp.any(after != before) & jnp.any(cache.lengths)

        def rebuild(decoder: "Decoder", cache: Cache) -> Cache:
            slots = jnp.broadcast_to(jnp.arange(cache.capacity), cache.ids.shape)
            real = slots < cache.lengths[:, None]
            tokens = _tokens(
                config, slots, real, None, cache.positions, longest, cache.positions, cache.lengths
            )
            x = _embed(decoder.embed_tokens(), cache.ids)
            layers = tuple(
                layer if isinstance(layer, KeyValues) else jax.tree.map(jnp.zeros_like, layer)
                for layer in cache.layers
            )
            return cache.replace(layers=decoder._run_layers(x, tokens, layers)[1])

        return nn.cond(stale, rebuild, lambda decoder, cache: cache, self, cache)


class _Guard(nn.Module):
    """What a guard makes of a token as part of an answer, or as part of a query.

    Attributes:
      config: with `guard`.
      widths: levels of risk, categories.
    """

    config: ModelConfig
    widths: tuple[int, int]

    def setup(self):
        """Declares the blocks."""
        self.project = _CompiledLinear(self.config.guard.inner_size)
        self.norm = _norm(self.config, _CompiledNorm)
        self.risk, self.category = (_CompiledLinear(width) for width in self.widths)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, P, D] -> the logits of risk and of category, [B, P, width] each."""
        x = self.norm(self.project(x))
        return self.risk(x), self.category(x)


class _MtpHead(nn.Module):
    """Joins the next token's embedding to the hidden state and runs a layer of its own on both.

    Within the joint vector the embedding comes first, then the hidden state, as other engines read
    the published `fc`.
    """

    config: ModelConfig
    dispatch: Dispatch | None = None
    capacity_factor: float | None = None

    def setup(self):
        """Declares the blocks."""
        config = mtp_config(self.config)
        self.pre_fc_norm_embedding = _norm(config, _CompiledNorm)
        self.pre_fc_norm_hidden = _norm(config, _CompiledNorm)
        self.fc = _CompiledLinear(config.hidden_size, stddev=config.initializer_range)
        (kind,) = config.layer_types
        self.layers = [
            _CompiledLayer(
                config, kind, config.moe is not None, self.dispatch, self.capacity_factor
            )
            for _ in range(self.config.mtp_layers)
        ]
        self.norm = _norm(config, _CompiledNorm)

    def __call__(
        self,
        embedded: jax.Array,
        hidden: jax.Array,
        tokens: Tokens,
        cache: KeyValues | None,
        step: int,
    ) -> tuple[jax.Array, KeyValues | None, Routing | None]:
        """[B, T, D] twice -> [B, T, D], the layer's new cache and its routing."""
        both = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(jnp.concatenate(both, axis=-1))
        layers = range(len(self.layers)) if self.is_initializing() else (step % len(self.layers),)
        for i in layers:
            x, cache, routing = self.layers[i](x, tokens, cache)
        return self.norm(x), cache, routing


def mtp_config(config: ModelConfig) -> ModelConfig:
    """What a layer of the MTP head of `config` is: one of full attention, sparse if any is."""
    moe = config.moe
    return dataclasses.replace(
        config,
        layer_types=(LayerKind.FULL_ATTENTION,),
        delta=None,
        moe=None if moe is None else dataclasses.replace(moe, layers=(0,)),
        mtp_layers=0,
    )


def init_mtp_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """An empty cache for `Decoder.predict_next`, as `nn.cache.init_cache`.

    Raises:
      UserError: the model's RoPE depends on the length of the text. What the head has cached would
        have to be computed again when it grows, from hidden states that no cache keeps.
    """
    if config.rope.depends_on_length:
        raise UserError(
            f"rope_type = {config.rope.kind.value} changes what the head has cached as the text "
            "grows; run predict_next without a cache"
        )
    return init_cache(mtp_config(config), batch, capacity, dtype)


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


def _checked(
    input_ids: jax.Array, attention_mask: jax.Array | None, positions: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Token ids, mask and positions of a call in the dtypes that are computed with."""
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
    for name, array in (("attention_mask", mask), ("positions", positions)):
        if array is not None and array.shape != ids.shape:
            raise ValueError(f"{name} has shape {array.shape}, the token ids {ids.shape}")
    return ids, mask, positions


def _tokens(
    config: ModelConfig,
    slots: jax.Array,
    real: jax.Array | None,
    key_valid: jax.Array | None,
    positions: jax.Array,
    frequencies_for: jax.Array,
    key_positions: jax.Array,
    lengths: jax.Array,
) -> Tokens:
    """Tokens at `positions`; `lengths` [B] are those of the rows with this call's tokens."""

    def rotated(positions: jax.Array):
        return rotation(config.rope, config.rotary_dim, positions, frequencies_for)

    spec, dual = config.dual_chunk, None
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
    return Tokens(
        slots=slots,
        real=real,
        key_valid=key_valid,
        rotation=rotated(place),
        query_scale=config.logn_length and logn_scale(positions, config.logn_length),
        dual_chunk=dual,
    )


@functools.partial(jax.jit, static_argnames="config")
def _place(
    config: ModelConfig, ids: jax.Array, mask: jax.Array | None, positions: jax.Array | None
) -> Tokens:
    """Where the tokens of a call without a cache stand: in order, padding included."""
    order = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    positions = order if positions is None else jnp.broadcast_to(positions, ids.shape)
    lengths = jnp.full(ids.shape[0], ids.shape[1]) if mask is None else mask.sum(axis=1)
    frequencies_for = lengths if config.rope.depends_on_prompt else positions.max() + 1
    return _tokens(config, order, mask, mask, positions, frequencies_for, positions, lengths)


@functools.partial(jax.jit, static_argnames="config")
def _place_after(
    config: ModelConfig,
    ids: jax.Array,
    mask: jax.Array | None,
    positions: jax.Array | None,
    cache: Cache,
) -> tuple[Tokens, Cache]:
    """Where the tokens of a call stand after those of `cache`, and its books with them entered."""
    counted = True
    if positions is None:
        positions = cache.next_positions[:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32)
    elif mask is not None:
        # Where a caller says what stands where, padding stands nowhere.
        counted = mask
    positions = jnp.broadcast_to(positions, ids.shape)
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
    tokens = _tokens(
        config, slots, mask, None, positions, frequencies_for, cache.positions, lengths
    )
    return tokens, cache


def _of_those_that_fit(logits: jax.Array | None, cache: Cache | None) -> jax.Array | None:
    """`logits`, NaN in rows that have outgrown their cache.

    Such a row has lost tokens: better no numbers than wrong ones.
    """
    if logits is None or cache is None:
        return logits
    return jnp.where((cache.lengths <= cache.capacity)[:, None, None], logits, jnp.nan)


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
