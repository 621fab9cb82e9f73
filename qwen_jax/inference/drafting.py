"""Who guesses the next tokens of a text: the text itself, a smaller model, or a head of the model.

A drafter is a frozen dataclass with `tokens`, how many it guesses at once. One that looks at the
text alone guesses on the host, row by row (`find`); one that computes is a pytree with a cache of
its own and guesses inside the step that verifies (`propose`). Any guess will do, since the model
decides; good ones save passes.

Letters here: n guesses of a row, W tokens that the last pass may have given it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.inference.checks import check_integer, check_writes_text
from qwen_jax.inference.sampling import SamplingRule
from qwen_jax.inference.verification import draw_draft
from qwen_jax.models.decoder import Decoder, DecoderOutput
from qwen_jax.models.heads import init_mtp_cache
from qwen_jax.nn.cache import Cache, init_cache, without_newer


@flax.struct.dataclass
class News:
    """What a drafter has not read yet, and what its guesses follow.

    Attributes:
      ids: int32 [B, W], the last tokens of each row.
      mask: bool [B, W], how many of them count, from the first on.
      hidden: [B, W, D], the model's last hidden state of the token before each.
      has_hidden: bool [B, W], where there is such a token.
    """

    ids: jax.Array
    mask: jax.Array
    hidden: jax.Array
    has_hidden: jax.Array


class TextDrafter(Protocol):
    """One that looks at the text alone."""

    tokens: int

    def find(self, text: np.ndarray) -> Sequence[int]:
        """At most `tokens` ids to follow `text` [S], the prompt and what was written; or none."""


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Repeats what followed the last time that the text had its last few tokens.

    Attributes:
      max_ngram: so many of them if they stand there earlier, else fewer, down to 1.
      tokens: of a guess; where less follows, it goes on as it began, as a repetition would.

    Raises:
      UserError: a number below 1.
    """

    max_ngram: int = 3
    tokens: int = 8

    def __post_init__(self):
        check_integer("max_ngram", self.max_ngram, 1)
        check_integer("tokens", self.tokens, 1)

    def find(self, text: np.ndarray) -> Sequence[int]:
        """See `TextDrafter`."""
        # Ends of the occurrences of the last token, the text's own end left out; then of longer
        # grams among them.
        ends = np.flatnonzero(text[:-1] == text[-1]) + 1
        for size in range(2, self.max_ngram + 1):
            longer = ends[ends >= size]
            longer = longer[text[longer - size] == text[-size]] if len(longer) else longer
            if not len(longer):
                break
            ends = longer
        return np.resize(text[ends[-1] :], self.tokens).tolist() if len(ends) else []


class Ahead(NamedTuple):
    """How far a drafter that computes has come.

    Attributes:
      logits: float32 [B, V], of the next token.
      hidden: [B, D], what its next step reads beside the token; None for nothing.
      cache: its own, with all that it has read.
    """

    logits: jax.Array
    hidden: jax.Array | None
    cache: Cache


@flax.struct.dataclass
class DraftModel:
    """A smaller model of the same vocabulary.

    Attributes:
      params: of it.
      model: it.
      tokens: of a guess; each costs a pass of it.
      num_ids: of the vocabulary that both share, where their tables are padded to different sizes;
        None where they are not.
    """

    params: Any
    model: Decoder = flax.struct.field(pytree_node=False)
    tokens: int = flax.struct.field(pytree_node=False, default=4)
    num_ids: int | None = flax.struct.field(pytree_node=False, default=None)

    reads_hidden: ClassVar[bool] = False

    def check(self, target: Decoder) -> None:
        """Raises `UserError` where it cannot draft for `target`."""
        check_integer("tokens", self.tokens, 1)
        config = self.model.config
        check_writes_text(config)
        if why := why_not_speculate(self.model):
            raise UserError(f"the draft model: {why}")
        sizes = (config.vocab_size, target.config.vocab_size)
        if self.num_ids is not None:
            check_integer("num_ids", self.num_ids, 1, min(sizes))
        elif sizes[0] != sizes[1]:
            raise UserError(
                f"the draft model has vocab_size = {sizes[0]}, the model {sizes[1]}; draft with a "
                "model of the same vocabulary, and give num_ids if only their tables differ"
            )

    def init_cache(self, target: Decoder, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
        """An empty cache, in the dtype of its own parameters."""
        dtype = self.params["embed_tokens"]["weight"].dtype
        return init_cache(self.model.config, batch, capacity, dtype)

    def read(self, target: Decoder, target_params: Any, cache: Cache, news: News) -> Ahead:
        """What follows `news`."""
        places = _places(cache, news.mask)
        out = self.model.apply({"params": self.params}, news.ids, news.mask, places, cache, "last")
        return self._ahead(target, out)

    def step(self, target: Decoder, target_params: Any, ahead: Ahead, tokens: jax.Array) -> Ahead:
        """What follows one guess [B] more."""
        out = self.model.apply({"params": self.params}, tokens[:, None], cache=ahead.cache)
        return self._ahead(target, out)

    def _ahead(self, target: Decoder, out: DecoderOutput) -> Ahead:
        logits, V = out.logits[:, 0], target.config.vocab_size
        if self.num_ids is not None:
            logits = logits[:, : self.num_ids]
            padding = [(0, 0), (0, V - self.num_ids)]
            logits = jnp.pad(logits, padding, constant_values=-jnp.inf)
        return Ahead(logits, None, out.cache)


@flax.struct.dataclass
class MtpDraft:
    """The model's own head that predicts the token after the next.

    Attributes:
      tokens: of a guess; behind the first, the head reads its own hidden states.
    """

    tokens: int = flax.struct.field(pytree_node=False, default=2)

    reads_hidden: ClassVar[bool] = True

    def check(self, target: Decoder) -> None:
        """Raises `UserError` where `target` has no such head."""
        check_integer("tokens", self.tokens, 1)
        layers = target.config.mtp_layers
        if layers == 0:
            raise UserError(
                "the model has no head for the token after the next (mtp_layers = 0); look drafts "
                "up, or draft with a model"
            )
        if layers > 1 and self.tokens > 1:
            raise UserError(
                f"mtp_layers = {layers}: a head of several layers drafts 1 token, not {self.tokens}"
            )

    def init_cache(self, target: Decoder, batch: int, capacity: int, dtype: jnp.dtype) -> Cache:
        """An empty cache of the head."""
        return init_mtp_cache(target.config, batch, capacity, dtype)

    def read(self, target: Decoder, target_params: Any, cache: Cache, news: News) -> Ahead:
        """What follows `news`; a text's first token has no hidden state before it, and no place."""
        mask = news.mask & news.has_hidden
        out = target.apply(
            {"params": target_params},
            news.hidden,
            news.ids,
            mask,
            _places(cache, mask),
            cache,
            "last",
            method="predict_next",
        )
        (hidden,) = out.hidden_states
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return Ahead(out.logits[:, 0], hidden, out.cache)

    def step(self, target: Decoder, target_params: Any, ahead: Ahead, tokens: jax.Array) -> Ahead:
        """What follows one guess [B] more."""
        out = target.apply(
            {"params": target_params},
            ahead.hidden[:, None],
            tokens[:, None],
            cache=ahead.cache,
            method="predict_next",
        )
        (hidden,) = out.hidden_states
        return Ahead(out.logits[:, 0], hidden[:, 0], out.cache)


Computing = DraftModel | MtpDraft
Drafter = TextDrafter | Computing


def why_not_speculate(model: Decoder) -> str | None:
    """Why a model's tokens cannot be run several at once and taken back; None where they can."""
    config = model.config
    if model.mesh is not None:
        return "there is no speculation on a mesh; load the model without one"
    if config.rope.depends_on_length or config.rope.depends_on_prompt:
        return (
            f"rope_type = {config.rope.kind.value} changes with the length of the text, which "
            "speculation does not know in advance; decode without it"
        )
    dual = config.dual_chunk
    if dual is not None and dual.original_max_position_embeddings:
        return (
            "dual chunk attention with original_max_position_embeddings scales keys by the length "
            "of the text, which speculation does not know in advance; decode without it"
        )
    return None


def propose(
    drafter: Computing,
    target: Decoder,
    target_params: Any,
    cache: Cache,
    news: News,
    keys: jax.Array,
    forced: jax.Array,
    rule: SamplingRule,
) -> tuple[jax.Array, jax.Array | None, Cache]:
    """The guesses of a drafter that computes.

    Args:
      drafter: it.
      target, target_params: the model that decides.
      cache: the drafter's, of all before `news`.
      news: what it reads first.
      keys: [B, T] of `token_keys`.
      forced: int32 [B, T], what stands in place of a guess, -1 where it may guess.
      rule: how tokens are chosen.

    Returns:
      int32 [B, n]; the probabilities [B, n, V] that they were drawn with, None when greedy; and the
      cache with `news` in it, the guesses not.
    """
    n = drafter.tokens
    ahead = drafter.read(target, target_params, cache, news)
    read = ahead.cache

    def guess(logits: jax.Array, keys: jax.Array, forced: jax.Array):
        tokens, probabilities = draw_draft(logits, keys, rule)
        return jnp.where(forced >= 0, forced, tokens), probabilities

    def another(carry, place):
        ahead, tokens = carry
        ahead = drafter.step(target, target_params, ahead, tokens)
        tokens, probabilities = guess(ahead.logits, *place)
        return (ahead, tokens), (tokens, probabilities)

    first = guess(ahead.logits, keys[:, 0], forced[:, 0])
    places = (keys[:, 1:n].swapaxes(0, 1), forced[:, 1:n].swapaxes(0, 1))
    (ahead, _), others = jax.lax.scan(another, (ahead, first[0]), places)
    guesses = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, others)
    drafts, probabilities = jax.tree.map(lambda a: a.swapaxes(0, 1), guesses)
    return drafts, probabilities, without_newer(ahead.cache, read)


def _places(cache: Cache, mask: jax.Array) -> jax.Array:
    """int32 [B, W], the positions that follow the cache's, of what `mask` has."""
    return jnp.where(mask, cache.next_positions[:, None] + jnp.cumsum(mask, axis=1) - 1, 0)
