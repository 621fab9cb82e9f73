"""From logits to the next token."""

import dataclasses
import math
import numbers
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import UserError

_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)

# What each option may be, for the check and for its message.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: x >= 0, "a finite number of at least 0"),
    "top_k": (lambda x: x >= 0 and isinstance(x, numbers.Integral), "an integer, 0 for off"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "a number between 0 and 1"),
    "repetition_penalty": (lambda x: x > 0, "a finite number above 0"),
    "presence_penalty": (lambda x: True, "a finite number"),
    "frequency_penalty": (lambda x: True, "a finite number"),
}


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; the defaults are greedy and change nothing.

    Applied in transformers' order: penalties, temperature, top-k, top-p, min-p. Of equally likely
    tokens at the border of top-k or top-p those of lower id stay; transformers keeps all that tie
    with the k-th, and leaves ties in top-p to its sort.

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
        for name, (is_valid, expected) in _RANGES.items():
            value = getattr(self, name)
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            # NaN is in no range, and what float32 cannot hold would become infinite.
            if not (is_number and abs(value) <= _LARGEST and is_valid(value)):
                raise UserError(f"{name} = {value!r} should be {expected}")

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
      Logits [B, C] at temperature 1, the best of the row 0 and -inf where a token is filtered out,
      and their ids [B, C], most likely first; ids None means that C is the whole vocabulary in
      order.
    """
    # Measured from the best one, so that no temperature is low enough to make it infinite.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / max(options.temperature, _SMALLEST)
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
      int32 [B]; -1 in a row whose logits hold NaN or an infinite maximum, so that none is best.
    """
    broken = ~jnp.isfinite(logits.max(axis=-1))
    if seen is not None:
        logits = penalise(logits, seen, options)
    if options.greedy:
        chosen = jnp.argmax(logits, axis=-1)
    else:
        logits, ids = candidates(logits, options)
        chosen = jax.vmap(jax.random.categorical)(keys, logits)
        if ids is not None:
            chosen = jnp.take_along_axis(ids, chosen[:, None], axis=1)[:, 0]
    return jnp.where(broken, -1, chosen).astype(jnp.int32)
