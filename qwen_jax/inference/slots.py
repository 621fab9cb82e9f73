"""Many prompts through few rows: each row takes the next prompt as soon as its text has ended.

A step advances all rows by a token, and reads pieces of prompts beside them in the same pass:
weights are read once for both, so that in decoding, which reading bounds, a piece costs little, and
a long prompt holds up nobody (Sarathi, arXiv 2308.16369). While most rows have nothing to write
yet, as at the start, pieces are read alone; when no prompt waits any more, rows without a text are
dropped: both, since above a few rows an idle one costs as much as one that writes. Nothing is
padded to the length of another text.
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
from qwen_jax.inference.decoding import bucket, dtype_of, not_numbers, read_ids
from qwen_jax.inference.sampling import (
    SamplingOptions,
    SamplingRule,
    Seen,
    choose,
    count,
    init_seen,
)
from qwen_jax.models.decoder import Decoder, warn_if_longer
from qwen_jax.nn.cache import Cache, CacheDtype, check_cache_dtype, grow_cache, init_cache

# Tokens that a step reads of a prompt, and how many prompts it reads from: `_LARGEST` in all. Each
# pair is a program, by itself and beside decoding.
_SIZES = (16, 32, 64, 128, 256)
_COUNTS = (1, 4)
_LARGEST = 256
# A pass costs about as much as so many tokens do, for the weights that it reads.
_COST_OF_PASS = 32
# Slots for new tokens that a row has at first.
_FIRST_ROOM = 256
# Tokens that all prompts begin with from which on they are read once for all.
_LEAST_SHARED = 32
# Rows from which on fewer of them save no time, since reading the weights is what takes it.
_LEAST_ROWS = 8


@flax.struct.dataclass
class SlotState:
    """What one step hands to the next; donated, so that the cache is updated in place.

    Attributes:
      cache: of B rows, each with the tokens of its text before `tokens`.
      tokens: int32 [B], chosen and not yet in the cache.
      keys: [B] random keys, of the seed and the number of the row's prompt.
      steps: int32 [B], tokens chosen so far.
      seen: for penalties; None when there are none.
    """

    cache: Cache
    tokens: jax.Array
    keys: jax.Array
    steps: jax.Array
    seen: Seen | None


@flax.struct.dataclass
class Pieces:
    """Some tokens of each of n prompts.

    Attributes:
      ids: int32 [n, C].
      mask: bool [n, C], False at padding behind them.
      rows: int32 [n], the row that each is for; B where there is none.
      is_last: bool [n], whether the prompt ends with them, so that its first token is chosen.
    """

    ids: jax.Array
    mask: jax.Array
    rows: jax.Array
    is_last: jax.Array


@dataclasses.dataclass
class _Slot:
    """A row of the cache, as the host knows it.

    Attributes:
      prompt: the number of the prompt that it has; None while it is free.
      read: how many of the prompt's tokens are in the cache.
      used: slots of the cache that are filled.
    """

    prompt: int | None = None
    read: int = 0
    used: int = 0


class SlotStream:
    """Iterates over steps; each gives a new token id for every prompt, None for those without one.

    As `decoding.TokenStream` in all but the order: a text's tokens and draws are those that it has
    by itself, up to the rounding of sums. `occupancy` and `writing` tell how well rows were used.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        options: SamplingOptions | None = None,
        stop_ids: Iterable[int] | None = None,
        seed: int = 0,
        first_row: int | Sequence[int] = 0,
        slots: int = 8,
        cache_dtype: CacheDtype | None = None,
    ):
        """Checks the prompts; nothing runs until the first step.

        Args:
          model, params, prompts, options, stop_ids, seed, first_row: as for `TokenStream`.
          max_new_tokens: of every prompt, or of each.
          slots: B, rows of the cache.
          cache_dtype: as for `init_cache`.

        Raises:
          UserError: as `TokenStream`; or the model is on a mesh, or its RoPE depends on the length
            of the text.
        """
        self._model, self._params = model, params
        self._rule = (options or SamplingOptions()).rule()
        config = model.config
        check_writes_text(config)
        check_integer("seed", seed, 0, 2**32 - 1)
        check_integer("slots", slots, 1)
        check_cache_dtype(cache_dtype)
        self._cache_dtype = cache_dtype
        if why := why_not_slots(model):
            raise UserError(f"{why}; prompts can run in batches")
        self._prompts = [
            read_ids(config, f"prompt {row}", prompt) for row, prompt in enumerate(prompts)
        ]
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(self._prompts)
        for most in max_new_tokens:
            check_integer("max_new_tokens", most, 1)
        self._most = list(max_new_tokens)
        self._stop_ids = frozenset(config.eos_token_ids if stop_ids is None else stop_ids)
        for stop_id in self._stop_ids:
            check_integer("stop id", stop_id, 0)
        if isinstance(first_row, int):
            first_row = range(first_row, first_row + len(self._prompts))
        self._rows = np.asarray(first_row, np.int32)
        self._seed = seed
        self._ended = [False] * len(self._prompts)
        self._given = [0] * len(self._prompts)
        self._forced = [collections.deque[int]() for _ in self._prompts]
        self._waiting = collections.deque(range(len(self._prompts)))
        self._slots = [_Slot() for _ in range(min(slots, len(self._prompts)))]
        self._shared = _shared_length(self._prompts)
        self._template: Cache | None = None
        self._state: SlotState | None = None
        # While others wait: rows that had a text, of all; that took a token, of those computed.
        self._with_text = self._rows_seen = self._writing = self._computed = 0

    def __iter__(self) -> "SlotStream":
        return self

    def __next__(self) -> list[int | None]:
        """Raises `UserError` when an active row's logits are not numbers."""
        if self._state is None and self._prompts:
            self._state = self._start()
        self._free_and_admit()
        self._drop_rows()
        if all(slot.prompt is None for slot in self._slots):
            raise StopIteration
        unread = self._unread()
        active = [slot.prompt is not None and i not in unread for i, slot in enumerate(self._slots)]
        if reads_alone := bool(unread) and 2 * sum(active) < len(active):
            active = [False] * len(active)
        forced = [-1] * len(self._slots)
        choosing = [i for i, is_active in enumerate(active) if is_active]
        for i in choosing:
            self._slots[i].used += 1
        pieces = self._next_pieces(unread) if unread else None
        if pieces is not None:
            choosing += pieces.rows[pieces.is_last].tolist()
        for i in choosing:
            if queue := self._forced[self._slots[i].prompt]:
                forced[i] = queue.popleft()
        self._make_room()
        self._state = slot_step(
            self._model,
            self._params,
            self._state,
            None if reads_alone else np.array(active),
            np.array(forced, np.int32),
            self._rule,
            pieces,
        )
        if self._waiting:
            self._with_text += sum(slot.prompt is not None for slot in self._slots)
            self._rows_seen += len(self._slots)
            self._writing += sum(active)
            self._computed += 0 if reads_alone else len(active)
        tokens = np.asarray(self._state.tokens).tolist()
        step: list[int | None] = [None] * len(self._prompts)
        for i in choosing:
            self._take(step, self._slots[i].prompt, tokens[i])
        return step

    def stop(self, row: int) -> None:
        """Ends a prompt's text: later steps give None for it."""
        self._ended[row] = True

    def force(self, row: int, ids: Sequence[int]) -> None:
        """As `TokenStream.force`."""
        self._forced[row].extend(read_ids(self._model.config, f"prompt {row}", ids).tolist())

    def active(self, row: int) -> bool:
        """Whether a text has met neither a stop id nor `stop`."""
        return not self._ended[row]

    def finished(self, row: int) -> bool:
        """Whether a text has no more tokens to come."""
        return self._ended[row] or self._given[row] == self._most[row]

    @property
    def occupancy(self) -> float:
        """The share of rows that had a text, over the steps in which others waited; 1 if none."""
        return self._with_text / self._rows_seen if self._rows_seen else 1.0

    @property
    def writing(self) -> float:
        """The share of rows computed for a token that took one, while others waited; 1 if none."""
        return self._writing / self._computed if self._computed else 1.0

    def _take(self, step: list[int | None], row: int, token: int) -> None:
        self._given[row] += 1
        if token == -1:
            raise UserError(not_numbers(self._given[row], dtype_of(self._params)))
        step[row] = token
        if token in self._stop_ids:
            self.stop(row)

    def _start(self) -> SlotState:
        B, config = len(self._slots), self._model.config
        rooms = [
            len(prompt) + min(most, _FIRST_ROOM)
            for prompt, most in zip(self._prompts, self._most, strict=True)
        ]
        capacity = bucket(max(rooms))
        self._template = self._read_shared()
        seen = None
        if self._rule.penalises:
            seen = Seen(
                in_prompt=jnp.zeros((B, config.vocab_size), bool),
                counts=jnp.zeros((B, config.vocab_size), jnp.int32),
            )
        return SlotState(
            cache=init_cache(
                config, B, capacity, dtype_of(self._params), cache_dtype=self._cache_dtype
            ),
            tokens=jnp.zeros(B, jnp.int32),
            keys=jax.random.split(jax.random.key(self._seed), B),
            steps=jnp.zeros(B, jnp.int32),
            seen=seen,
        )

    def _read_shared(self) -> Cache:
        """A row with what all prompts begin with, as each begins: no longer than that."""
        shared = self._shared
        template = init_cache(
            self._model.config,
            1,
            bucket(shared),
            dtype_of(self._params),
            cache_dtype=self._cache_dtype,
        )
        for start in range(0, shared, _LARGEST):
            own = self._prompts[0][start : min(start + _LARGEST, shared)]
            ids = np.zeros((1, bucket(len(own))), np.int32)
            ids[0, : len(own)] = own
            mask = np.arange(ids.shape[1])[None] < len(own)
            template = _extend(self._model, self._params, template, ids, mask)
        return template

    def _free_and_admit(self) -> None:
        for i, slot in enumerate(self._slots):
            if slot.prompt is not None and self.finished(slot.prompt):
                slot.prompt = None
            while self._slots[i].prompt is None and self._waiting:
                row = self._waiting.popleft()
                if not self.finished(row):
                    self._admit(i, row)

    def _drop_rows(self) -> None:
        """Halves the rows where the texts that are left, all read to their ends, need no more."""
        taken = [i for i, slot in enumerate(self._slots) if slot.prompt is not None]
        read = all(self._slots[i].read == len(self._prompts[self._slots[i].prompt]) for i in taken)
        if self._waiting or not read:
            return
        count = len(self._slots)
        while count // 2 >= max(len(taken), _LEAST_ROWS):
            count //= 2
        if count < len(self._slots):
            free = [i for i, slot in enumerate(self._slots) if slot.prompt is None]
            kept = [*taken, *free][:count]
            self._slots = [self._slots[i] for i in kept]
            self._state = _rows_of(self._state, np.array(kept))

    def _admit(self, i: int, row: int) -> None:
        """Gives a prompt the row `i`, with what it shares with the others."""
        self._slots[i] = _Slot(row, self._shared, self._shared)
        warn_if_longer(self._model.config, len(self._prompts[row]))
        self._state = admit(
            self._state, self._template, np.int32(i), np.uint32(self._seed), self._rows[row]
        )

    def _unread(self) -> list[int]:
        """Rows whose prompts are not read to their ends, in the order of the prompts."""
        unread = [
            i
            for i, slot in enumerate(self._slots)
            if slot.prompt is not None and slot.read < len(self._prompts[slot.prompt])
        ]
        return sorted(unread, key=lambda i: self._slots[i].prompt)

    def _next_pieces(self, unread: Sequence[int]) -> Pieces:
        """Pieces of the first of some prompts, taken to be read."""
        slots = [self._slots[i] for i in unread]
        left = [len(self._prompts[slot.prompt]) - slot.read for slot in slots]
        count, size = shape_of_pieces(left)
        pieces = Pieces(
            ids=np.zeros((count, size), np.int32),
            mask=np.zeros((count, size), bool),
            rows=np.full(count, len(self._slots), np.int32),
            is_last=np.zeros(count, bool),
        )
        for n, slot in enumerate(slots[:count]):
            own = self._prompts[slot.prompt][slot.read : slot.read + size]
            pieces.ids[n, : len(own)] = own
            pieces.mask[n, : len(own)] = True
            pieces.rows[n] = unread[n]
            pieces.is_last[n] = len(own) == left[n]
            slot.read, slot.used = slot.read + len(own), slot.used + len(own)
        return pieces

    def _make_room(self) -> None:
        """Slots for the tokens about to enter the cache."""
        used = max(slot.used for slot in self._slots)
        warn_if_longer(self._model.config, used)
        if used > self._state.cache.capacity:
            capacity = bucket(used + max(_FIRST_ROOM, used))
            self._state = self._state.replace(cache=grow_cache(self._state.cache, capacity))


def why_not_slots(model: Decoder) -> str | None:
    """Why a model's rows cannot take one prompt after another; None where they can."""
    if model.mesh is not None:
        return "on a mesh rows do not take one prompt after another"
    if model.config.rope.depends_on_length:
        return (
            f"rope_type = {model.config.rope.kind.value}: the longest text sets the frequencies of "
            "all, so that rows cannot take one prompt after another"
        )
    return None


def shape_of_pieces(left: Sequence[int]) -> tuple[int, int]:
    """From how many prompts to read at once, and how many tokens of each.

    Those with which prompts are read for the least a token, as far as their passes are alike: by
    what the longest takes, and in padding the others.

    Args:
      left: tokens that are left to read of each prompt, the first of which is read in any case.
    """

    def cost_of_a_token(count: int) -> float:
        own = left[:count]
        return _passes(count, max(own))[0] / sum(own)

    counts = [count for count in _COUNTS if count < 2 * len(left)]
    count = min(counts, key=cost_of_a_token)
    return count, _passes(count, max(left[:count]))[1]


@functools.cache
def _passes(count: int, tokens: int) -> tuple[int, int]:
    """The least cost, in tokens, to read so many of each of `count` prompts, and the first size."""
    if tokens <= 0:
        return 0, 0
    sizes = [size for size in _SIZES if count * size <= _LARGEST]
    if tokens > sizes[-1]:
        whole = (tokens - 1) // sizes[-1]
        rest, _ = _passes(count, tokens - whole * sizes[-1])
        return whole * (_COST_OF_PASS + count * sizes[-1]) + rest, sizes[-1]
    return min(
        (_COST_OF_PASS + count * size + _passes(count, tokens - size)[0], size) for size in sizes
    )


def _shared_length(prompts: Sequence[np.ndarray]) -> int:
    """How many tokens all of several prompts begin with, without the last of any."""
    if len(prompts) < 2:
        return 0
    shortest = min(map(len, prompts)) - 1
    alike = np.ones(shortest, bool)
    for prompt in prompts[1:]:
        alike &= prompts[0][:shortest] == prompt[:shortest]
    shared = shortest if alike.all() else int(alike.argmin())
    return shared if shared >= _LEAST_SHARED else 0


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _extend(model: Decoder, params: Any, cache: Cache, ids: jax.Array, mask: jax.Array) -> Cache:
    """The cache of a row with more tokens in it."""
    return model.apply({"params": params}, ids, mask, cache=cache, logits_at="last").cache


@functools.partial(jax.jit, donate_argnames="state")
def admit(
    state: SlotState, template: Cache, slot: jax.Array, seed: jax.Array, row: jax.Array
) -> SlotState:
    """`state` with the row `slot` begun as `template` is, for the prompt numbered `row`.

    The template may have fewer slots than the row: what lies behind them is not looked at.
    """
    cache = jax.tree.map(
        lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, slot, axis=0), state.cache, template
    )
    key = jax.random.fold_in(jax.random.key(seed), row)
    return state.replace(
        cache=cache, keys=state.keys.at[slot].set(key), steps=state.steps.at[slot].set(0)
    )


@jax.jit
def _rows_of(state: SlotState, rows: jax.Array) -> SlotState:
    """`state` with some of its rows alone."""
    return jax.tree.map(lambda x: x[rows], state)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def slot_step(
    model: Decoder,
    params: Any,
    state: SlotState,
    active: jax.Array | None,
    forced: jax.Array,
    rule: SamplingRule,
    pieces: Pieces | None,
) -> SlotState:
    """One more token for the active rows, and pieces of prompts for others.

    Args:
      model, params: as `load_pretrained` returns them.
      state: donated.
      active: bool [B], rows that have a text to go on with; None where there are pieces alone.
      forced: int32 [B], the token that a row must take, -1 where it may choose.
      rule: how tokens are chosen.
      pieces: of prompts; None for none.
    """
    # The pieces first: what is then written for all rows waits for nobody who reads the cache as it
    # was, and XLA copies none of it.
    calls, B = [], len(state.tokens)
    if pieces is not None:
        calls.append((pieces.ids, pieces.mask, pieces.rows))
    if active is not None:
        calls.append((state.tokens[:, None], active[:, None], None))
    logits, cache = model.apply({"params": params}, calls, state.cache, method="run_parts")
    if active is None:
        active = jnp.zeros(B, bool)
        logits = jnp.concatenate([logits, jnp.zeros((B, logits.shape[1]))])
    seen, chooses = state.seen, active
    if pieces is not None:
        ended = jnp.where(pieces.is_last, pieces.rows, B)
        of_pieces, logits = jnp.split(logits, [len(ended)])
        logits = logits.at[ended].set(of_pieces, mode="drop")
        is_new = jnp.zeros(B, bool).at[ended].set(True, mode="drop")
        chooses = active | is_new
        if seen is not None:
            filled = jnp.arange(cache.capacity) < cache.lengths[:, None]
            fresh = init_seen(cache.ids, filled, model.config.vocab_size)
            seen = jax.tree.map(lambda a, b: jnp.where(is_new[:, None], a, b), fresh, seen)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.steps)
    tokens = choose(logits, seen, keys, rule)
    tokens = jnp.where((forced >= 0) & (tokens >= 0), forced, tokens)
    if seen is not None:
        counted = count(seen, tokens)
        seen = jax.tree.map(lambda a, b: jnp.where(chooses[:, None], a, b), counted, seen)
    return SlotState(
        cache=cache,
        tokens=jnp.where(chooses, tokens, state.tokens),
        keys=state.keys,
        steps=state.steps + chooses,
        seen=seen,
    )
