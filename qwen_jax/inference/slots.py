"""Many prompts through few rows: each row takes the next prompt as soon as its text has ended.

A step advances all rows by a token, and reads a piece of one waiting prompt beside them in the same
pass: weights are read once for both, so that in decoding, which reading bounds, a piece costs
little, and a long prompt holds up nobody (Sarathi, arXiv 2308.16369). Nothing is padded to the
length of another text.
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
from qwen_jax.inference.decoding import bucket, not_numbers, read_ids
from qwen_jax.inference.sampling import (
    SamplingOptions,
    SamplingRule,
    Seen,
    choose,
    count,
    init_seen,
)
from qwen_jax.models.decoder import Decoder, warn_if_longer
from qwen_jax.nn.cache import Cache, grow_cache, init_cache

# Tokens of a prompt that a step reads: the largest that is filled, or the smallest.
_PIECES = (256, 128, 64, 32, 16)
# Slots for new tokens that a row has at first.
_FIRST_ROOM = 256
# Tokens that all prompts begin with from which on they are read once for all.
_LEAST_SHARED = 32


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
class Piece:
    """Some of a prompt's tokens.

    Attributes:
      ids: int32 [1, C].
      mask: bool [1, C], False at padding behind them.
      slot: int32 [], the row that they are for.
      is_last: bool [], whether the prompt ends with them, so that its first token is chosen.
    """

    ids: jax.Array
    mask: jax.Array
    slot: jax.Array
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
    by itself, up to the rounding of sums. `occupancy` tells how well the rows were used.
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
    ):
        """Checks the prompts; nothing runs until the first step.

        Args:
          model, params, prompts, options, stop_ids, seed, first_row: as for `TokenStream`.
          max_new_tokens: of every prompt, or of each.
          slots: B, rows of the cache.

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
        self._busy = self._steps = 0

    def __iter__(self) -> "SlotStream":
        return self

    def __next__(self) -> list[int | None]:
        """Raises `UserError` when an active row's logits are not numbers."""
        if self._state is None and self._prompts:
            self._state = self._start()
        self._free_and_admit()
        if all(slot.prompt is None for slot in self._slots):
            raise StopIteration
        piece, filling = self._next_piece()
        active = [
            slot.prompt is not None and slot.read == len(self._prompts[slot.prompt])
            for slot in self._slots
        ]
        forced = [-1] * len(self._slots)
        choosing = [i for i, is_active in enumerate(active) if is_active]
        for i in choosing:
            self._slots[i].used += 1
        if filling is not None:
            slot = self._slots[filling]
            length = int(piece.mask.sum())
            slot.read, slot.used = slot.read + length, slot.used + length
            if piece.is_last:
                choosing.append(filling)
        for i in choosing:
            if queue := self._forced[self._slots[i].prompt]:
                forced[i] = queue.popleft()
        self._make_room()
        self._state = slot_step(
            self._model,
            self._params,
            self._state,
            np.array(active),
            np.array(forced, np.int32),
            self._rule,
            piece,
        )
        if self._waiting:
            self._busy += sum(slot.prompt is not None for slot in self._slots)
            self._steps += 1
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
        return self._busy / (self._steps * len(self._slots)) if self._steps else 1.0

    def _take(self, step: list[int | None], row: int, token: int) -> None:
        self._given[row] += 1
        if token == -1:
            raise UserError(not_numbers(self._given[row], self._dtype))
        step[row] = token
        if token in self._stop_ids:
            self.stop(row)

    @property
    def _dtype(self) -> jnp.dtype:
        return self._params["embed_tokens"]["weight"].dtype

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
            cache=init_cache(config, B, capacity, self._dtype),
            tokens=jnp.zeros(B, jnp.int32),
            keys=jax.random.split(jax.random.key(self._seed), B),
            steps=jnp.zeros(B, jnp.int32),
            seen=seen,
        )

    def _read_shared(self) -> Cache:
        """A row with what all prompts begin with, as each begins: no longer than that."""
        shared = self._shared
        template = init_cache(self._model.config, 1, bucket(shared), self._dtype)
        for start in range(0, shared, _PIECES[0]):
            own = self._prompts[0][start : min(start + _PIECES[0], shared)]
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

    def _admit(self, i: int, row: int) -> None:
        """Gives a prompt the row `i`, with what it shares with the others."""
        self._slots[i] = _Slot(row, self._shared, self._shared)
        warn_if_longer(self._model.config, len(self._prompts[row]))
        self._state = admit(
            self._state, self._template, np.int32(i), np.uint32(self._seed), self._rows[row]
        )

    def _next_piece(self) -> tuple[Piece | None, int | None]:
        """A piece of the first prompt that is not read to its end, and its slot."""
        for i, slot in enumerate(self._slots):
            if slot.prompt is None:
                continue
            prompt = self._prompts[slot.prompt]
            left = len(prompt) - slot.read
            if not left:
                continue
            size = next((size for size in _PIECES if size <= left), _PIECES[-1])
            ids = np.zeros((1, size), np.int32)
            own = prompt[slot.read : slot.read + size]
            ids[0, : len(own)] = own
            return Piece(
                ids=ids,
                mask=np.arange(size)[None] < len(own),
                slot=np.int32(i),
                is_last=np.bool_(len(own) == left),
            ), i
        return None, None

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


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def slot_step(
    model: Decoder,
    params: Any,
    state: SlotState,
    active: jax.Array,
    forced: jax.Array,
    rule: SamplingRule,
    piece: Piece | None,
) -> SlotState:
    """One more token for the active rows, and a piece of a prompt for another.

    Args:
      model, params: as `load_pretrained` returns them.
      state: donated.
      active: bool [B], rows that have a text to go on with.
      forced: int32 [B], the token that a row must take, -1 where it may choose.
      rule: how tokens are chosen.
      piece: of a prompt; None for none.
    """
    calls = [(state.tokens[:, None], active[:, None], None)]
    if piece is not None:
        calls.append((piece.ids, piece.mask, piece.slot))
    logits, cache = model.apply({"params": params}, calls, state.cache, method="run_parts")
    seen, chooses, B = state.seen, active, len(active)
    if piece is not None:
        is_new = (jnp.arange(B) == piece.slot) & piece.is_last
        logits = jnp.where(is_new[:, None], logits[B:], logits[:B])
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
