"""From logits to the next token."""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; the defaults are greedy and change nothing.

    Applied in transformers' order: penalties, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the smallest set of most likely tokens that holds this probability.
      min_p: keeps tokens at least this fraction as likely as the most likely one.
      repetition_penalty: divides positive and multiplies negative logits of tokens that the
        prompt or the output holds (arXiv 1909.05858).
      presence_penalty: subtracted from the logits of tokens that the output holds.
      frequency_penalty: subtracted once for each time that the output holds a token.

    Raises:
      UserError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self):
        ranges = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0 and self.top_k == int(self.top_k), "an integer, 0 for off"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "presence_penalty": (True, ""),
            "frequency_penalty": (True, ""),
        }
        for name, (valid, range_) in ranges.items():
            value = getattr(self, name)
            if not math.isfinite(value):
                raise UserError(f"{name} = {value} should be a finite number")
            if not valid:
                raise UserError(f"{name} = {value} should be {range_}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether the choice depends on the tokens before it."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@flax.struct.dataclass
class Seen:
    """What penalties know of each row.

    Attributes:
      in_prompt: bool [B, V].
      counts: int32 [B, V], how often the output holds each token.
    """

    in_prompt: jax.Array
    counts: jax.Array


def init_seen(prompt_ids: jax.Array, mask: jax.Array, vocab_size: int) -> Seen:
    """What is known before the first new token; padding, where `mask` [B, T] is 0, is not seen."""
    rows = jnp.arange(prompt_ids.shape[0])[:, None]
    ids = jnp.where(mask.astype(bool), prompt_ids, vocab_size)
    shape = (prompt_ids.shape[0], vocab_size)
    return Seen(
        in_prompt=jnp.zeros(shape, bool).at[rows, ids].set(True, mode="drop"),
        counts=jnp.zeros(shape, jnp.int32),
    )


def count(seen: Seen, tokens: jax.Array) -> Seen:
    """`seen` after one more output token [B] in each row."""
    rows = jnp.arange(tokens.shape[0])
    return seen.replace(counts=seen.counts.at[rows, tokens].add(1))


def penalise(logits: jax.Array, seen: Seen, options: SamplingOptions) -> jax.Array:
    """Logits [B, V] with the penalties of `options`."""
    repeated = seen.in_prompt | (seen.counts > 0)
    factor = options.repetition_penalty
    logits = jnp.where(repeated, jnp.where(logits < 0, logits * factor, logits / factor), logits)
    logits = logits - options.presence_penalty * (seen.counts > 0)
    return logits - options.frequency_penalty * seen.counts


def candidates(logits: jax.Array, options: SamplingOptions) -> tuple[jax.Array, jax.Array | None]:
    """The tokens that may be drawn.

    Args:
      logits: float32 [B, V], penalties applied.
      options: temperature above 0.

    Returns:
      Logits [B, C] at temperature 1, -inf where a token is filtered out, and their ids [B, C], most
      likely first; ids None means that C is the whole vocabulary in order.
    """
    logits = logits / options.temperature
    if not options.top_k and options.top_p == 1.0 and options.min_p == 0.0:
        return logits, None
    V = logits.shape[-1]
    logits, ids = jax.lax.top_k(logits, min(options.top_k or V, V))
    if options.top_p < 1.0:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The most likely token always stays: nothing comes before it.
        logits = jnp.where(before < options.top_p, logits, -jnp.inf)
    if options.min_p > 0.0:
        floor = logits[:, :1] + math.log(options.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits, ids


def choose(
    logits: jax.Array, seen: Seen | None, keys: jax.Array, options: SamplingOptions
) -> jax.Array:
    """The next token of each row.

    Args:
      logits: float32 [B, V].
      seen: for penalties; None when there are none.
      keys: [B] random keys; unused when greedy.
      options: how to choose.

    Returns:
      int32 [B].
    """
    if seen is not None:
        logits = penalise(logits, seen, options)
    if options.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits, ids = candidates(logits, options)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    if ids is not None:
        drawn = jnp.take_along_axis(ids, drawn[:, None], axis=1)[:, 0]
    return drawn.astype(jnp.int32)
