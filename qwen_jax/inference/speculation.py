"""Decoding several tokens a pass: a drafter guesses, one pass of the model says what stands.

In small batches a pass takes as long as reading the weights, however few its tokens are, so that
guesses are verified for nearly nothing. What comes out is what `TokenStream` gives: the same tokens
when greedy, up to the rounding of sums, and tokens of the same distribution when drawn.

A step settles what the consumer took of the last one, drafts, and runs the last token and the
drafts in one pass. So whatever was not handed on, because a text has ended or was told how to go
on, is taken back by the same means as drafts that did not stand.

Letters here: n drafts of a row, T = n + 1 tokens of a pass, W what T is at most.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.inference.checks import check_integer, check_writes_text
from qwen_jax.inference.decoding import (
    COMPILER_OPTIONS,
    bucket,
    dtype_of,
    not_numbers,
    platform_of,
    read_ids,
)
from qwen_jax.inference.drafting import (
    Computing,
    Drafter,
    News,
    propose,
    why_not_speculate,
)
from qwen_jax.inference.sampling import SamplingOptions, SamplingRule, Seen, init_seen
from qwen_jax.inference.verification import NO_TOKEN, token_keys, verify
from qwen_jax.models.decoder import Decoder, warn_if_longer
from qwen_jax.nn.cache import (
    Cache,
    CacheDtype,
    check_cache_dtype,
    grow_cache,
    init_cache,
    open_cache,
    pad_open,
    rewind_cache,
)

# Slots that a cache gets for new tokens at first.
_FIRST_ROOM = 256


@flax.struct.dataclass
class SpeculationState:
    """What one step hands to the next; donated, so that caches are updated in place.

    Attributes:
      cache: open, with W tokens behind `lengths`, of which the last pass had those of `tokens`.
      lengths: int32 [B], its tokens before that pass.
      tokens: int32 [B, W], what the pass made of each row; before the first one, the prompt's last
        token, which is in no cache.
      numbers: int32 [B], of the first of `tokens` among a text's new ones; -1 for the prompt's
        last.
      hidden: [B, W, D], the model's last hidden state of the token before each; None where the
        drafter does not read it.
      draft_cache: of all tokens before `tokens`; None of a drafter without one.
      keys: [B] random keys, of the seed and the number of the row.
      seen: for penalties, before `tokens`; None when there are none.
      drafted, accepted: int32 [B], as `Verdict` has them of the last pass.
      counts: int32 [B], how many of `tokens` there are.
    """

    cache: Cache
    lengths: jax.Array
    tokens: jax.Array
    numbers: jax.Array
    hidden: jax.Array | None
    draft_cache: Cache | None
    keys: jax.Array
    seen: Seen | None
    drafted: jax.Array
    accepted: jax.Array
    counts: jax.Array


@dataclasses.dataclass(frozen=True)
class Counts:
    """What speculation brought, over all rows.

    Attributes:
      passes: of the model, a row that was still being written counted once in each.
      tokens: that were handed on.
      drafted, accepted: drafts that were verified, and that stood.
    """

    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(a + b for a, b in pairs))

    @property
    def acceptance(self) -> float:
        """The share of drafts that stood; 0 where there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """1 without speculation; 0 before the first pass."""
        return self.tokens / self.passes if self.passes else 0.0


class SpeculativeStream:
    """Iterates as `TokenStream`, several steps for one pass of the model.

    Each step gives a new token id for every row, None for rows that have ended, and for rows of
    which less stood in the last pass than of others.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        drafter: Drafter,
        options: SamplingOptions | None = None,
        stop_ids: Iterable[int] | None = None,
        seed: int = 0,
        first_row: int | Sequence[int] = 0,
        cache_dtype: CacheDtype | None = None,
    ):
        """Checks the prompts; nothing runs until the first step.

        Args:
          model, params, prompts, max_new_tokens, options, stop_ids, seed, first_row: as for
            `TokenStream`.
          cache_dtype: of the model's cache, as for `init_cache`; a drafter's has its own dtype.
          drafter: guesses.

        Raises:
          UserError: as `TokenStream`; or the drafter cannot draft for the model, or tokens of the
            model cannot be taken back: on a mesh, and where lengths change frequencies or keys.
        """
        self._model, self._params = model, params
        config = model.config
        check_writes_text(config)
        if why := why_not_speculate(model):
            raise UserError(why)
        self._computing = drafter if isinstance(drafter, Computing) else None
        self._drafter = drafter
        if self._computing is not None:
            self._computing.check(model)
        check_integer("max_new_tokens", max_new_tokens, 1)
        check_integer("seed", seed, 0, 2**32 - 1)
        self._rule = (options or SamplingOptions()).rule()
        self._texts = [
            read_ids(config, f"prompt {row}", prompt) for row, prompt in enumerate(prompts)
        ]
        self._stop_ids = frozenset(config.eos_token_ids if stop_ids is None else stop_ids)
        for stop_id in self._stop_ids:
            check_integer("stop id", stop_id, 0)
        check_cache_dtype(cache_dtype)
        self._most, self._seed, self._cache_dtype = max_new_tokens, seed, cache_dtype
        if isinstance(first_row, int):
            first_row = range(first_row, first_row + len(self._texts))
        self._rows = np.asarray(first_row, np.int32)
        B = len(self._texts)
        self._active, self._given = [True] * B, [0] * B
        self._forced = [collections.deque[int]() for _ in range(B)]
        # Tokens of the last pass that are still to be handed on, and how many of it were.
        self._waiting = [collections.deque[int]() for _ in range(B)]
        self._taken = np.ones(B, np.int32)
        # Slots in use before the last pass.
        self._used = np.array([len(text) - 1 for text in self._texts], np.int32)
        self._state: SpeculationState | None = None
        self._counts = Counts()

    def __iter__(self) -> "SpeculativeStream":
        return self

    def __next__(self) -> list[int | None]:
        """Raises `UserError` when a token to hand on comes of logits that are not numbers."""
        rows = [row for row in range(len(self._texts)) if not self.finished(row)]
        if not rows:
            raise StopIteration
        if not any(self._waiting[row] for row in rows):
            self._run()
        step: list[int | None] = [None] * len(self._texts)
        for row in rows:
            if self._waiting[row]:
                step[row] = self._hand_on(row)
        return step

    def stop(self, row: int) -> None:
        """Ends a row: later steps give None for it."""
        self._active[row] = False

    def force(self, row: int, ids: Sequence[int]) -> None:
        """Makes `ids` the next tokens of a row, before any that are drawn; as `TokenStream.force`.

        What a pass has made of the row beyond the tokens handed on is taken back.

        Raises:
          UserError: an id outside the vocabulary.
        """
        self._forced[row].extend(read_ids(self._model.config, f"prompt {row}", ids).tolist())
        self._waiting[row].clear()

    def active(self, row: int) -> bool:
        """Whether a row has met neither a stop id nor `stop`."""
        return self._active[row]

    def finished(self, row: int) -> bool:
        """Whether a row has no more tokens to come."""
        return not self._active[row] or self._given[row] == self._most

    @property
    def cache(self) -> Cache | None:
        """Of the prompts and of what was handed on, except each row's last token; None at first.

        It is donated to the next step.
        """
        return None if self._state is None else _settled(self._state, self._taken)

    @property
    def counts(self) -> Counts:
        """What speculation has brought so far."""
        return self._counts

    def _hand_on(self, row: int) -> int:
        token = self._waiting[row].popleft()
        self._given[row] += 1
        if token == NO_TOKEN:
            raise UserError(not_numbers(self._given[row], dtype_of(self._params)))
        if self._forced[row]:
            self._forced[row].popleft()
        self._taken[row] += 1
        self._texts[row] = np.append(self._texts[row], token)
        self._counts += Counts(tokens=1)
        if token in self._stop_ids:
            self.stop(row)
        return token

    def _run(self) -> None:
        """A pass: what was handed on of the last one stays, and every row has new tokens."""
        # Prompts are read in a cache of their own length, which grows before the first token.
        is_tight = self._state is None
        if is_tight:
            self._state = self._read_prompts()
        else:
            self._used += self._taken
        drafts = self._found()
        forced = self._next_forced(
            1 + (self._drafter.tokens if drafts is None else drafts.shape[1])
        )
        self._make_room(forced.shape[1], is_tight)
        step = speculate(platform_of(self._params))
        self._state = step(
            self._model,
            self._params,
            self._computing,
            self._state,
            self._taken,
            drafts,
            forced,
            self._rule,
        )
        self._taken = np.zeros_like(self._taken)
        state = self._state
        found = jax.device_get((state.tokens, state.counts, state.drafted, state.accepted))
        for row, (tokens, count, drafted, accepted) in enumerate(zip(*found, strict=True)):
            if not self.finished(row):
                self._waiting[row].extend(tokens[:count].tolist())
                self._counts += Counts(1, 0, int(drafted), int(accepted))

    def _found(self) -> np.ndarray | None:
        """int32 [B, n], what rows drafted on the host; n is 0 where none has any."""
        if self._computing is not None:
            return None
        n = self._drafter.tokens
        drafts = np.full((len(self._texts), n), NO_TOKEN, np.int32)
        for row, text in enumerate(self._texts):
            if self.finished(row):
                continue
            forced = list(self._forced[row])
            if forced:
                text = np.append(text, np.array(forced, text.dtype))
            own = (forced + list(self._drafter.find(text)))[:n]
            drafts[row, : len(own)] = own
        return drafts if (drafts >= 0).any() else drafts[:, :0]

    def _next_forced(self, length: int) -> np.ndarray:
        """int32 [B, T], what rows must take next, -1 where they may choose."""
        forced = np.full((len(self._texts), length), NO_TOKEN, np.int32)
        for row, queue in enumerate(self._forced):
            own = list(queue)[:length]
            forced[row, : len(own)] = own
        return forced

    def _read_prompts(self) -> SpeculationState:
        lengths = self._used
        P = bucket(int(lengths.max()))
        ids = np.zeros((len(lengths), P), np.int32)
        for row, text in enumerate(self._texts):
            ids[row, : len(text) - 1] = text[:-1]
        warn_if_longer(self._model.config, int(lengths.max()))
        config, B = self._model.config, len(lengths)
        draft_cache = None
        if self._computing is not None:
            draft_cache = self._computing.init_cache(self._model, B, P, dtype_of(self._params))
        return read_prompts(
            self._model,
            self._params,
            self._computing,
            init_cache(config, B, P, dtype_of(self._params), cache_dtype=self._cache_dtype),
            draft_cache,
            ids,
            lengths,
            np.array([text[-1] for text in self._texts], np.int32),
            np.uint32(self._seed),
            self._rows,
            self._rule,
            1 + self._drafter.tokens,
        )

    def _make_room(self, length: int, is_tight: bool) -> None:
        """Slots for the tokens of a pass; each capacity compiles a step, so that it doubles."""
        used, state = int(self._used.max()), self._state
        warn_if_longer(self._model.config, used + 1)
        if used + length <= state.cache.capacity and not is_tight:
            return
        left = self._most - min(
            given for row, given in enumerate(self._given) if not self.finished(row)
        )
        room = 1 + self._drafter.tokens + min(left, max(_FIRST_ROOM, used))
        caches = (state.cache, state.draft_cache)
        cache, draft_cache = (c and grow_cache(c, bucket(used + room)) for c in caches)
        self._state = state.replace(cache=cache, draft_cache=draft_cache)


@functools.partial(
    jax.jit,
    static_argnames=("model", "width"),
    donate_argnames=("cache", "draft_cache"),
)
def read_prompts(
    model: Decoder,
    params: Any,
    drafter: Computing | None,
    cache: Cache,
    draft_cache: Cache | None,
    ids: jax.Array,
    lengths: jax.Array,
    last: jax.Array,
    seed: jax.Array,
    rows: jax.Array,
    rule: SamplingRule,
    width: int,
) -> SpeculationState:
    """Prompts [B, P] without their `last` tokens [B] into empty caches, which are donated."""
    B, P = ids.shape
    columns = jnp.arange(P)
    mask = columns < lengths[:, None]
    out = model.apply({"params": params}, ids, mask, jnp.where(mask, columns, 0), cache, "last")
    hidden = None
    if drafter is not None:
        before = None
        if drafter.reads_hidden:
            of_each = out.hidden_states[-1]
            before = jnp.roll(of_each, 1, axis=1)
            last_one = jnp.maximum(lengths - 1, 0)[:, None, None]
            hidden = jnp.zeros((B, width, of_each.shape[-1]), of_each.dtype)
            hidden = hidden.at[:, :1].set(jnp.take_along_axis(of_each, last_one, axis=1))
        news = News(ids, mask, before, jnp.broadcast_to(columns > 0, mask.shape))
        draft_cache = drafter.read(model, params, draft_cache, news).cache
    seen = None
    if rule.penalises:
        whole, filled = jnp.c_[ids, last], jnp.c_[mask, jnp.ones((B, 1), bool)]
        seen = init_seen(whole, filled, model.config.vocab_size)
    return SpeculationState(
        cache=pad_open(open_cache(model.config, out.cache), width),
        lengths=out.cache.lengths,
        tokens=jnp.zeros((B, width), jnp.int32).at[:, 0].set(last),
        numbers=jnp.full(B, -1, jnp.int32),
        hidden=hidden,
        draft_cache=draft_cache,
        keys=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows),
        seen=seen,
        counts=jnp.zeros(B, jnp.int32),
        drafted=jnp.zeros(B, jnp.int32),
        accepted=jnp.zeros(B, jnp.int32),
    )


@functools.cache
def speculate(platform: str) -> Any:
    """`_speculate` under `jit`, as it is compiled for the devices of a platform."""
    return jax.jit(
        _speculate,
        static_argnames="model",
        donate_argnames="state",
        compiler_options=COMPILER_OPTIONS.get(platform),
    )


def _speculate(
    model: Decoder,
    params: Any,
    drafter: Computing | None,
    state: SpeculationState,
    taken: jax.Array,
    drafts: jax.Array | None,
    forced: jax.Array,
    rule: SamplingRule,
) -> SpeculationState:
    """Settles the last pass, drafts, and runs the next one; `state` is donated.

    Args:
      model, params: as `load_pretrained` returns them.
      drafter: one that computes; None where `drafts` are given.
      state: of the step before.
      taken: int32 [B], how many of its tokens were handed on.
      drafts: int32 [B, n], -1 for none; None of a drafter that computes.
      forced: int32 [B, T], tokens that rows must take first, -1 where they may choose.
      rule: how tokens are chosen.
    """
    B, width = state.tokens.shape
    handed_on = jnp.arange(width) < taken[:, None]
    cache, seen = _settled(state, taken), state.seen
    if seen is not None:
        is_new = handed_on & (state.numbers[:, None] + jnp.arange(width) >= 0)
        seen = seen.replace(
            counts=seen.counts.at[jnp.arange(B)[:, None], jnp.maximum(state.tokens, 0)].add(
                is_new.astype(jnp.int32)
            )
        )
    last = jnp.take_along_axis(state.tokens, jnp.maximum(taken - 1, 0)[:, None], axis=1)
    numbers, T = state.numbers + taken, forced.shape[1]
    keys = token_keys(state.keys, numbers, T)
    probabilities, draft_cache = None, state.draft_cache
    if drafter is not None:
        # A text's first token follows nothing.
        follows = (state.lengths > 0) | (state.numbers >= 0)
        has_hidden = jnp.broadcast_to(follows[:, None], handed_on.shape)
        news = News(jnp.maximum(state.tokens, 0), handed_on, state.hidden, has_hidden)
        drafts, probabilities, draft_cache = propose(
            drafter, model, params, draft_cache, news, keys, forced, rule
        )
    ids = jnp.maximum(jnp.concatenate([last, drafts], axis=1), 0)
    out = model.apply({"params": params}, ids, cache=open_cache(model.config, cache))
    found = verify(out.logits, drafts, probabilities, seen, keys, forced, rule)
    hidden = state.hidden
    if hidden is not None:
        hidden = out.hidden_states[-1]
    return SpeculationState(
        cache=pad_open(out.cache, width - T),
        lengths=cache.lengths,
        tokens=jnp.pad(found.tokens, [(0, 0), (0, width - T)]),
        numbers=numbers,
        hidden=hidden,
        draft_cache=draft_cache,
        keys=state.keys,
        seen=seen,
        drafted=found.drafted,
        accepted=found.accepted,
        counts=found.counts,
    )


def _settled(state: SpeculationState, taken: jax.Array) -> Cache:
    """The cache with the tokens before the last of those that were handed on."""
    # The prompt's last token is the first to be run: no pass has had it.
    entered = jnp.where(state.numbers < 0, 0, taken)
    return rewind_cache(state.cache, state.lengths + entered)
