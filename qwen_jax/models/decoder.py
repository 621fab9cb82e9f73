"""The decoder-only language model: embedding, layers, final norm, output head."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.config import HeadKind, ModelConfig
from qwen_jax.models.heads import GuardHead, MtpHead, mtp_config
from qwen_jax.models.layer import (
    CompiledLinear,
    CompiledNorm,
    compiled_layer,
    norm_of,
)
from qwen_jax.models.placement import (
    Call,
    LogitsAt,
    arrange,
    check_call,
    place,
    place_parts,
    restore,
    select,
    tokens_of_cache,
)
from qwen_jax.nn.cache import Cache, LayerCache, cache_shardings
from qwen_jax.nn.delta_rule import DeltaState
from qwen_jax.nn.linear import fetch_param, linear
from qwen_jax.nn.moe import Dispatch
from qwen_jax.nn.rope import inverse_frequencies
from qwen_jax.nn.router import RouterOptions, Routing
from qwen_jax.nn.tokens import Parts, Tokens
from qwen_jax.sharding.axes import (
    HIDDEN,
    TOKENS,
    Layout,
    constrain,
    gather,
    on_shards,
)


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


_compiled_linear = jax.jit(linear, static_argnames="out_dtype")


class Decoder(nn.Module):
    """A decoder-only language model described by `config`.

    Usage: `out = model.apply({"params": params}, input_ids)`.

    Attributes:
      config: of the model.
      dispatch: how experts run; None for `nn.moe.choose_dispatch`'s choice in each call.
      router: what training does to the routers; what it dropped is in the output's `router`.
      mesh: of the devices that share the work, from `sharding.axes.as_mesh`; None for one device.
    """

    config: ModelConfig
    dispatch: Dispatch | None = None
    router: RouterOptions = RouterOptions()
    mesh: Mesh | None = None

    def setup(self):
        """Declares the blocks; their names are the paths in the parameter tree."""
        config = self.config
        sparse = config.moe.layers if config.moe else ()
        self.embed_tokens = _Embedding(config)
        layer = compiled_layer(config, None if self.is_initializing() else self.mesh)
        self.layers = [
            layer(config, kind, i in sparse, self.dispatch, self.router)
            for i, kind in enumerate(config.layer_types)
        ]
        self.norm = norm_of(config, CompiledNorm)
        match config.head:
            case HeadKind.VOCABULARY if not config.tie_word_embeddings:
                self.lm_head = _Embedding(config)
            case HeadKind.SCORE | HeadKind.SCORE_WITH_BIAS:
                biased = config.head is HeadKind.SCORE_WITH_BIAS
                self.score = CompiledLinear(config.num_labels, biased)
            case HeadKind.TWO_LAYER_SCORE:
                self.score_0 = CompiledLinear(config.hidden_size, True)
                self.score_2 = CompiledLinear(config.num_labels, True)
            case HeadKind.GUARD:
                self.answer_guard = GuardHead(config, config.guard.widths[:2])
                self.query_guard = GuardHead(config, config.guard.widths[2:])
        if config.mtp_layers:
            self.mtp = MtpHead(config, layer, self.dispatch, self.router)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        logits_at: LogitsAt = "all",
        segment_ids: jax.Array | None = None,
    ) -> DecoderOutput:
        """Runs the tokens of one call.

        Args:
          input_ids: int [B, T].
          attention_mask: [B, T], 1 for real tokens, padding on either side; None for all real. What
            comes out at padding has no meaning, and on a mesh is something else.
          positions: int [B, T]; None means 0..T-1, or with a cache what follows its positions,
            padding counted.
          cache: the tokens before these; `nn.cache.init_cache` makes an empty one. `grow_cache`
            before it is full: a row with more tokens than slots gets NaN for logits.
          logits_at: "all", "last" (each row's last real token), or int [P] or [B, P] indices
            into the T tokens of this call. A string is static under `jit`.
          segment_ids: int [B, T], for several texts in a row one after another: the number of each
            token's text, counted up from 0 or more. A token sees its own text only; give positions
            that start again with each as well. Not with a cache.

        Raises:
          ValueError: arguments of another shape than these, or segments with a cache.
        """
        config = self.config
        call = check_call(input_ids, attention_mask, positions, segment_ids)
        if cache is None:
            warn_if_longer(config, call.ids.shape[1])
            layers = (None,) * config.num_hidden_layers
        ids, tokens, cache_after = place(config, self.mesh, call, cache)
        if cache is not None:
            if config.rope.depends_on_length:
                cache = self._follow_length(cache, cache_after.frequencies_for)
            layers = cache.layers
        x = _embed(self.embed_tokens(), ids, tokens.layout)
        hidden_states, layers, router = self._run_layers(x, tokens, layers)
        x = self.norm(hidden_states[-1])
        if config.mtp_layers and self.is_initializing():
            self.predict_next(x, ids)
        return self._output(
            config, call, tokens, cache_after, layers, (*hidden_states[:-1], x), router, logits_at
        )

    def run_parts(
        self,
        calls: Sequence[tuple[jax.Array, jax.Array | None, jax.Array | None]],
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Runs several calls after one cache in one pass: a step of all rows, prompts of some.

        Usage: `model.apply({"params": params}, calls, cache, method="run_parts")`. Each weight is
        read once for all of them, and no row is filled up to the length of another.

        Args:
          calls: each its ids [b, t], its mask [b, t] with False at padding or None, and its rows
            of the cache, int32 [b], or None where b is all of them. Rows are distinct, but for
            those past the cache's end, which stand for none: their tokens are all padding. A row of
            the cache whose tokens are all padding stays as it is.
          cache: the tokens before these; on no mesh.

        Returns:
          Logits of each row's last real token, float32 [R, V], R the rows of all calls; and the
          cache with the tokens in it.

        Raises:
          ValueError: the model is on a mesh, its RoPE depends on the length of the text, or it has
            no head of a vocabulary.
        """
        config = self.config
        if self.mesh is not None or config.rope.depends_on_length:
            raise ValueError(
                "calls in parts: neither on a mesh nor where lengths change frequencies"
            )
        if config.head is not HeadKind.VOCABULARY:
            raise ValueError(
                f"calls in parts are for language models, not a {config.head.value} head"
            )
        calls = [(check_call(ids, mask), rows) for ids, mask, rows in calls]
        ids, tokens, after = place_parts(config, calls, cache)
        x = _embed(self.embed_tokens(), ids, None)
        hidden_states, layers, _ = self._run_layers(x, tokens, cache.layers)
        last = [
            select(own, "last", call, part.tokens)
            for own, (call, _), part in zip(
                tokens.split(hidden_states[-1]), calls, tokens.parts, strict=True
            )
        ]
        # Norms are token by token, so that the others need none.
        logits = self.read(self.norm(jnp.concatenate(last)))
        fits = after.lengths <= after.capacity
        fits = jnp.concatenate([part.of_cache(fits) for part in tokens.parts])
        return jnp.where(fits[:, None], logits[:, 0], jnp.nan), after.replace(layers=layers)

    def begin(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Tokens]:
        """The embeddings [B', T', D] of a call without a cache, and where its tokens stand.

        With `layer` and `finish` it is a pass in parts, for callers that run the layers in their
        own way. Arguments as for a pass; what belongs to its tokens goes through
        `placement.arrange`.
        """
        call = check_call(input_ids, attention_mask, positions, segment_ids)
        ids, tokens, _ = place(self.config, self.mesh, call, None)
        return _embed(self.embed_tokens(), ids, tokens.layout), tokens

    def finish(self, x: jax.Array) -> jax.Array:
        """The last layer's output [B', T', D] behind the final norm."""
        return self.norm(x)

    def look_ahead(
        self, x: jax.Array, next_ids: jax.Array, tokens: Tokens, step: int = 0
    ) -> tuple[jax.Array, Routing | None]:
        """What the MTP head makes of `finish`'s output, before the output head: [B', T', D].

        Args:
          x: [B', T', D], of `finish`, or of this with the step before.
          next_ids: int [B', T'], the token that follows each, through `placement.arrange`.
          tokens: as `begin` returns them.
          step: how many tokens further than the first.

        Returns:
          [B', T', D], and the routing of the head's layer; None for a dense one.
        """
        embedded = _embed(self.embed_tokens(), next_ids, tokens.layout)
        x, _, routing = self.mtp(embedded, x, tokens, None, step)
        return x, routing

    @nn.nowrap
    def layer(self, i: int) -> nn.Module:
        """The i-th layer by itself.

        Usage: `model.layer(i).apply({"params": params[f"layers_{i}"]}, x, tokens, None)`.
        """
        config = self.config
        is_sparse = config.moe is not None and i in config.moe.layers
        return compiled_layer(config, self.mesh)(
            config, config.layer_types[i], is_sparse, self.dispatch, self.router
        )

    def _table(self, name: str) -> jax.Array:
        """The weight [V, D] of the output head, put together."""
        weight = getattr(self, name)()
        if self.mesh is None or self.is_initializing():
            return weight
        return gather(self.config, self.mesh, {name: {"weight": weight}})[name]["weight"]

    def _output(
        self,
        config: ModelConfig,
        call: Call,
        tokens: Tokens,
        cache: Cache | None,
        layers: tuple[LayerCache | None, ...],
        hidden_states: tuple[jax.Array, ...],
        router: tuple[Routing | None, ...],
        logits_at: LogitsAt,
    ) -> DecoderOutput:
        """What the caller gets of a pass: its own rows and columns, in its own order."""
        B, T = call.ids.shape
        wants_all = isinstance(logits_at, str) and logits_at == "all"
        logits = self.read(select(hidden_states[-1], logits_at, call, tokens))
        if logits is not None:
            if config.head is HeadKind.VOCABULARY:
                along = "length" if wants_all else None
                logits = constrain(logits, tokens.layout, "batch", along, "vocabulary")
            logits = _of_those_that_fit(logits, cache)
            logits = logits[:B, :T] if wants_all else logits[:B]
        if cache is not None:
            cache = cache.replace(layers=layers)
            if self.mesh is not None:
                places = cache_shardings(config, self.mesh, cache)
                cache = jax.lax.with_sharding_constraint(cache, places)

        def own(x: jax.Array) -> jax.Array:
            return restore(tokens, x)[:B, :T]

        def own_routing(routing: Routing | None) -> Routing | None:
            if routing is None:
                return None
            names = ("logits", "experts", "weights", "wanted")
            fields = {name: getattr(routing, name) for name in names}
            return routing.replace(**jax.tree.map(own, fields))

        return DecoderOutput(
            logits=logits,
            cache=cache,
            hidden_states=tuple(map(own, hidden_states)),
            router=tuple(map(own_routing, router)),
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
        call = check_call(next_ids, attention_mask, positions)
        expected = (*call.ids.shape, config.hidden_size)
        if jnp.shape(hidden_states) != expected:
            raise ValueError(
                f"hidden_states has shape {jnp.shape(hidden_states)}, where next_ids of shape "
                f"{call.ids.shape} need {expected}"
            )
        ids, tokens, cache_after = place(config, self.mesh, call, cache)
        embedded = _embed(self.embed_tokens(), ids, tokens.layout)
        hidden_states = arrange(tokens, hidden_states)
        layer_cache = None if cache is None else cache.layers[0]
        x, layer_cache, routing = self.mtp(embedded, hidden_states, tokens, layer_cache, step)
        return self._output(
            mtp_config(config),
            call,
            tokens,
            cache_after,
            (layer_cache,),
            (x,),
            (routing,),
            logits_at,
        )

    def read(self, x: jax.Array) -> jax.Array | None:
        """What the output head makes of hidden states [B, P, D], in float32; None without one.

        For callers that read a pass's last hidden states a part at a time:
        `model.apply({"params": params}, x, method="read")`.
        """
        config = self.config
        match config.head:
            case HeadKind.NONE:
                return None
            case HeadKind.VOCABULARY:
                head = self._table("embed_tokens" if config.tie_word_embeddings else "lm_head")
                return _compiled_linear(x, head, out_dtype=jnp.float32)
            case HeadKind.TWO_LAYER_SCORE:
                return self.score_2(nn.relu(self.score_0(x))).astype(jnp.float32)
            case HeadKind.GUARD:
                parts = (*self.answer_guard(x), *self.query_guard(x))
                return jnp.concatenate(parts, axis=-1).astype(jnp.float32)
            case _:
                return self.score(x).astype(jnp.float32)

    def _run_layers(
        self, x: jax.Array, tokens: Tokens | Parts, caches: tuple[LayerCache | None, ...]
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

        layout = self.mesh and Layout.of(config, self.mesh)

        def rebuild(decoder: "Decoder", cache: Cache) -> Cache:
            tokens = tokens_of_cache(config, layout, cache, longest)
            x = _embed(decoder.embed_tokens(), cache.ids, layout)
            layers = tuple(
                jax.tree.map(jnp.zeros_like, layer) if isinstance(layer, DeltaState) else layer
                for layer in cache.layers
            )
            return cache.replace(layers=decoder._run_layers(x, tokens, layers)[1])

        return nn.cond(stale, rebuild, lambda decoder, cache: cache, self, cache)


class _Embedding(nn.Module):
    """Declares `weight` [V, D], for the input table and the output head alike."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        return fetch_param(self, "weight", init, (self.config.vocab_size, self.config.hidden_size))


@functools.partial(jax.jit, static_argnames="layout")
def _embed(table: jax.Array, ids: jax.Array, layout: Layout | None) -> jax.Array:
    parts = layout.axes_of("vocabulary") if layout else ()
    columns = layout.axes_of("hidden") if layout else ()

    def shard(table: jax.Array, ids: jax.Array) -> jax.Array:
        if columns:
            # Here, so that the gradient is summed to where the table is stored, and not everywhere.
            table = jax.lax.all_gather(table, columns, axis=1, tiled=True)
        rows = table.shape[0]
        # Ids outside the table, below 0 too, become NaN instead of some other token's embedding.
        if not parts:
            return jnp.take(table, jnp.where(ids < 0, rows, ids), axis=0, mode="fill")
        mine = ids - rows * jax.lax.axis_index(parts)
        found = jnp.take(table, mine, axis=0, mode="clip")
        found = jnp.where(((mine >= 0) & (mine < rows))[..., None], found, 0)
        known = (ids >= 0) & (ids < rows * jax.lax.axis_size(parts))
        return jnp.where(known[..., None], jax.lax.psum(found, parts), jnp.nan)

    return on_shards(shard, layout, (("vocabulary", "hidden"), TOKENS), HIDDEN)(table, ids)


def _of_those_that_fit(logits: jax.Array | None, cache: Cache | None) -> jax.Array | None:
    """`logits`, NaN in rows that have outgrown their cache.

    Such a row has lost tokens: better no numbers than wrong ones.
    """
    if logits is None or cache is None:
        return logits
    return jnp.where((cache.lengths <= cache.capacity)[:, None, None], logits, jnp.nan)


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
