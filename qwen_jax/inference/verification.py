"""Which of several drafted tokens stand: the distribution is that of the model, whoever drafted.

A draft x that was drawn from q stands with probability min(1, p(x) / q(x)), p being what the model
itself draws from; at the first that does not, the token is drawn from max(p - q, 0) instead, and
behind the last from p (arXiv 2211.17192, arXiv 2302.01318). A draft that nobody drew is one with
q(x) = 1. Greedily, drafts stand as long as each is the likeliest token.

Letters here: n drafts of a row, T = n + 1 tokens of a pass, C candidates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.inference.sampling import SamplingRule, Seen, candidates, penalise

# Which of a token's random numbers is which.
_TEST, _REPLACE, _DRAFT = range(3)
# In place of a token: none was drafted, none is forced.
NO_TOKEN = -1


class Verdict(NamedTuple):
    """What became of a pass.

    Attributes:
      tokens: int32 [B, T], the new tokens of each row, meaningful up to `counts`; -1 where the
        logits are not numbers.
      counts: int32 [B], 1 to T: the drafts that stand and one more.
      drafted, accepted: int32 [B], drafts that the row had, forced ones not counted, and those of
        them that stand.
    """

    tokens: jax.Array
    counts: jax.Array
    drafted: jax.Array
    accepted: jax.Array


def token_keys(keys: jax.Array, first: jax.Array, length: int) -> jax.Array:
    """[B, length] random keys of the tokens numbered from `first` [B] on, of rows' `keys` [B].

    A number has the same key in every pass. What it decided in one is known only where its token
    is handed on, and then the number does not come again.
    """
    numbers = first[:, None] + jnp.arange(length)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, numbers)


def _part(keys: jax.Array, part: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, part))(keys)


def draw_draft(
    logits: jax.Array, keys: jax.Array, rule: SamplingRule
) -> tuple[jax.Array, jax.Array | None]:
    """A drafter's next token of each row, without penalties.

    Args:
      logits: float32 [B, V].
      keys: [B], of `token_keys`.
      rule: of the text.

    Returns:
      int32 [B], and the probabilities [B, V] that it was drawn with; None when greedy.
    """
    if rule.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
    kept, ids = candidates(logits, rule)
    tokens = jax.vmap(jax.random.categorical)(_part(keys, _DRAFT), kept)
    probabilities = jax.nn.softmax(kept, axis=-1)
    if ids is not None:
        tokens = jnp.take_along_axis(ids, tokens[:, None], axis=1)[:, 0]
        rows = jnp.arange(len(ids))[:, None]
        probabilities = jnp.zeros_like(logits).at[rows, ids].set(probabilities)
    return tokens.astype(jnp.int32), probabilities


def verify(
    logits: jax.Array,
    drafts: jax.Array,
    probabilities: jax.Array | None,
    seen: Seen | None,
    keys: jax.Array,
    forced: jax.Array,
    rule: SamplingRule,
) -> Verdict:
    """Decides which drafts stand, and chooses the token behind them.

    Args:
      logits: float32 [B, T, V], of the token before the drafts and of each draft.
      drafts: int32 [B, n], -1 for none.
      probabilities: float32 [B, n, V], that each draft was drawn with; None where nobody drew.
      seen: for penalties, before the drafts; None when there are none.
      keys: [B, T], of `token_keys`.
      forced: int32 [B, T], tokens that a row must take, -1 where it may choose; they are the first
        of a row and stand among its drafts.
      rule: how tokens are chosen.
    """
    n = drafts.shape[1]
    broken = ~jnp.isfinite(logits.max(axis=-1))
    if seen is not None:
        logits = _penalised(logits, drafts, seen, rule)
    if rule.greedy:
        tokens = jnp.argmax(logits, axis=-1)
        stands = drafts == tokens[:, :n]
    else:
        tokens, stands = _sampled(logits, drafts, probabilities, keys, rule)
    is_forced = forced >= 0
    tokens = jnp.where(is_forced, forced, tokens)
    stands = (stands | is_forced[:, :n]) & ~broken[:, :n]
    stands = jnp.cumprod(stands, axis=1).astype(bool)
    is_draft = jnp.pad(stands, [(0, 0), (0, 1)])
    tokens = jnp.where(is_draft, jnp.pad(drafts, [(0, 0), (0, 1)]), tokens)
    tokens = jnp.where(broken, NO_TOKEN, tokens).astype(jnp.int32)
    own = (drafts >= 0) & ~is_forced[:, :n]
    return Verdict(tokens, 1 + stands.sum(axis=1), own.sum(axis=1), (own & stands).sum(axis=1))


def _penalised(logits: jax.Array, drafts: jax.Array, seen: Seen, rule: SamplingRule) -> jax.Array:
    """Logits [B, T, V], where each place has seen the drafts before it as well."""
    B, T, V = logits.shape
    places = jnp.arange(T)
    earlier = jnp.broadcast_to(
        (places[:-1] < places[:, None]) & (drafts >= 0)[:, None], (B, T, T - 1)
    )
    at = (jnp.arange(B)[:, None, None], places[:, None], jnp.maximum(drafts, 0)[:, None])
    counts = jnp.repeat(seen.counts[:, None], T, axis=1).at[at].add(earlier.astype(jnp.int32))
    flat = Seen(jnp.repeat(seen.in_prompt, T, axis=0), counts.reshape(B * T, V))
    return penalise(logits.reshape(B * T, V), flat, rule).reshape(B, T, V)


def _sampled(
    logits: jax.Array,
    drafts: jax.Array,
    probabilities: jax.Array | None,
    keys: jax.Array,
    rule: SamplingRule,
) -> tuple[jax.Array, jax.Array]:
    """[B, T] the tokens to take where no draft stands, and [B, n] whether each draft would."""
    B, T, V = logits.shape
    kept, ids = candidates(logits.reshape(B * T, V), rule)
    # Behind the last draft there is none.
    drafts = jnp.pad(drafts, [(0, 0), (0, 1)], constant_values=NO_TOKEN).reshape(B * T, 1)
    p = jax.nn.softmax(kept, axis=-1)
    ids = jnp.arange(V)[None] if ids is None else ids
    is_draft = ids == drafts
    # The probability that the draft had, and that each candidate had to be the draft.
    drawn, q = jnp.ones(B * T), is_draft.astype(p.dtype)
    if probabilities is not None:
        q = jnp.pad(probabilities, [(0, 0), (0, 1), (0, 0)]).reshape(B * T, V)
        drawn = jnp.take_along_axis(q, jnp.maximum(drafts, 0), axis=1)[:, 0]
        q = jnp.take_along_axis(q, jnp.broadcast_to(ids, kept.shape), axis=1)
    wanted = jnp.where(is_draft, p, 0).sum(axis=-1)
    keys = keys.reshape(B * T)
    stands = jax.vmap(jax.random.uniform)(_part(keys, _TEST)) * drawn < wanted
    rest = jnp.maximum(p - q, 0)
    # Where nothing is left the draft stands but for rounding, or its drafter's logits are not
    # numbers, and then it never does.
    rest = jnp.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p)
    places = jax.vmap(jax.random.categorical)(_part(keys, _REPLACE), jnp.log(rest))
    tokens = jnp.take_along_axis(jnp.broadcast_to(ids, kept.shape), places[:, None], axis=1)
    return tokens.reshape(B, T), stands.reshape(B, T)[:, :-1]
