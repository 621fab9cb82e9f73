"""From logits to the next token."""

import dataclasses
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

    def rule(self) -> "SamplingRule":
        """These options for a compiled program."""
        return SamplingRule(
            temperature=np.float32(max(self.temperature, _SMALLEST)),
            top_p=np.float32(self.top_p),
            min_p=np.float32(max(self.min_p, _SMALLEST)),
            repetition_penalty=np.float32(self.repetition_penalty),
            presence_penalty=np.float32(self.presence_penalty),
            frequency_penalty=np.float32(self.frequency_penalty),
            top_k=int(self.top_k),
            greedy=bool(self.greedy),
            has_top_p=bool(self.top_p < 1.0),
            has_min_p=bool(self.min_p > 0.0),
            penalises=bool(
                self.repetition_penalty != 1.0
                or self.presence_penalty != 0.0
                or self.frequency_penalty != 0.0
            ),
        )


@flax.struct.dataclass
class SamplingRule:
    """`SamplingOptions` as a pytree: numbers are traced, so that another temperature compiles
    nothing; which steps there are is static.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    top_k: int = flax.struct.field(pytree_node=False)
    greedy: bool = flax.struct.field(pytree_node=False)
    has_top_p: bool = flax.struct.field(pytree_node=False)
    has_min_p: bool = flax.struct.field(pytree_node=False)
    penalises: bool = flax.struct.field(pytree_node=False)


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


def penalise(logits: jax.Array, seen: Seen, rule: SamplingRule) -> jax.Array:
    """Logits [B, V] with the penalties of `rule`."""
    repeated = seen.in_prompt | (seen.counts > 0)
    factor = rule.repetition_penalty
    logits = jnp.where(repeated, jnp.where(logits < 0, logits * factor, logits / factor), logits)
    logits = logits - rule.presence_penalty * (seen.counts > 0)
    return logits - rule.frequency_penalty * seen.counts


def candidates(logits: jax.Array, rule: SamplingRule) -> tuple[jax.Array, jax.Array | None]:
    """The tokens that may be drawn.

    Args:
      logits: float32 [B, V], penalties applied.
      rule: not greedy.

    Returns:
      Logits [B, C] at temperature 1, the best of the row 0 and -inf where a token is filtered out,
      and their ids [B, C], most likely first; ids None means that C is the whole vocabulary in
      order.
    """
    # Measured from the best one, so that no temperature is low enough to make it infinite.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / rule.temperature
    if not (rule.top_k or rule.has_top_p or rule.has_min_p):
        return logits, None
    V = logits.shape[-1]
    logits, ids = jax.lax.top_k(logits, min(rule.top_k or V, V))
    if rule.has_top_p:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The most likely token always stays: nothing comes before it.
        logits = jnp.where(before < rule.top_p, logits, -jnp.inf)
    if rule.has_min_p:
        floor = logits[:, :1] + jnp.log(rule.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits, ids


def choose(logits: jax.Array, seen: Seen | None, keys: jax.Array, rule: SamplingRule) -> jax.Array:
    """The next token of each row.

    Args:
      logits: float32 [B, V].
      seen: for penalties; None when there are none.
      keys: [B] random keys; unused when greedy.
      rule: how to choose.

    Returns:
      int32 [B]; -1 in a row whose logits hold NaN or an infinite maximum, so that none is best.
    """
    broken = ~jnp.isfinite(logits.max(axis=-1))
    if seen is not None:
        logits = penalise(logits, seen, rule)
    if rule.greedy:
        chosen = jnp.argmax(logits, axis=-1)
    else:
        logits, ids = candidates(logits, rule)
        chosen = jax.vmap(jax.random.categorical)(keys, logits)
        if ids is not None:
            chosen = jnp.take_along_axis(ids, chosen[:, None], axis=1)[:, 0]
    return jnp.where(broken, -1, chosen).astype(jnp.int32)
