"""The decode loop: a batch of prompts of any lengths in, a token a row and step out.

Prompts are padded to one of few lengths and caches grow to one of few capacities, so that the
number of compiled programs stays small whatever the texts.
"""

import collections
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.inference.checks import check_integer, check_writes_text
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
from qwen_jax.sharding.axes import Layout, constrain, num_shards

# Slots that a cache gets for new tokens at first; it doubles when they are used up, so that a
# high `max_new_tokens` costs nothing until the text is that long.
_FIRST_ROOM = 256

# XLA fetches weights ahead of their use, on TPUs in pieces, each of which takes 32 KiB of tables in
# memory, 80 MB in a model of 64 layers. 0 is off; libtpu aborts on v6e where one piece is allowed.
COMPILER_OPTIONS = {"tpu": {"xla_tpu_sliced_prefetch_max_slices": 0}}


@flax.struct.dataclass
class DecodeState:
    """What one decode step hands to the next; donated, so that the cache is updated in place.

    Attributes:
      cache: of all tokens before `tokens`.
      tokens: int32 [B], chosen and not yet in the cache.
      keys: [B] random keys, made of the seed and the row's number alone, so that a row's draws do
        not depend on its neighbours.
      step: int32 [], tokens chosen so far.
      seen: for penalties; None when there are none.
    """

    cache: Cache
    tokens: jax.Array
    keys: jax.Array
    step: jax.Array
    seen: Seen | None


def bucket(n: int, minimum: int = 16) -> int:
    """The next of 16, 20, 24, 28, 32, 40, ... at or above `n`: at most a quarter is padding."""
    if n <= minimum:
        return minimum
    octave = 1 << ((n - 1).bit_length() - 1)
    step = max(octave // 4, 1)
    return -(-n // step) * step


class TokenStream:
    """Iterates over decode steps; each gives a new token id for every row, None for ended rows.

    A row ends with a stop id (which is given out), after `max_new_tokens`, or by `stop`. The
    iteration ends with the last row.

    Attributes:
      cache: of the prompt and of what was generated, except for the last token given out.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        options: SamplingOptions | None = None,
        stop_ids: Iterable[int] | None = None,
        seed: int = 0,
        cache: Cache | None = None,
        first_row: int | Sequence[int] = 0,
        cache_dtype: CacheDtype | None = None,
    ):
        """Checks the prompts; nothing runs until the first step.

        Args:
          model, params: as `load_pretrained` returns them.
          prompts: token ids, a row each; none may be empty.
          max_new_tokens: of each row.
          options: greedy when None.
          stop_ids: ids that end a row; None takes the model's `eos_token_ids`.
          seed: of the draws, below 2**32; the same seed gives the same tokens.
          cache: of the tokens before the prompts; it is donated, so use `self.cache` afterwards.
          first_row: number of the first prompt among those that share the seed, or those of all
            prompts, where a caller cuts them into batches: each then draws as it would in one
            large batch.
          cache_dtype: as for `init_cache`; None for that of `cache`, where there is one.

        Raises:
          UserError: an empty prompt, an id outside the vocabulary, no tokens to generate, a
            model that scores instead of writing, a `cache_dtype` that is none or not the cache's.
        """
        self._model, self._params = model, params
        self._rule = (options or SamplingOptions()).rule()
        config = model.config
        check_writes_text(config)
        check_integer("max_new_tokens", max_new_tokens, 1)
        check_integer("seed", seed, 0, 2**32 - 1)
        check_cache_dtype(cache_dtype, cache)
        self._cache_dtype = cache_dtype
        self._prompts = [
            read_ids(config, f"prompt {row}", prompt) for row, prompt in enumerate(prompts)
        ]
        self._stop_ids = frozenset(config.eos_token_ids if stop_ids is None else stop_ids)
        for stop_id in self._stop_ids:
            check_integer("stop id", stop_id, 0)
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        if isinstance(first_row, int):
            first_row = range(first_row, first_row + len(self._prompts))
        self._rows = np.asarray(first_row, np.int32)
        self._active = [True] * len(self._prompts)
        self._forced = [collections.deque[int]() for _ in self._prompts]
        self._given = 0
        self._start_cache = cache
        self._state: DecodeState | None = None
        # A prompt runs in a cache of its own length, which grows before the second token.
        self._is_tight = cache is None
        # Slots in use, as far as the host needs to know: of the longest row.
        self._used = 0 if cache is None else int(np.max(cache.lengths))

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> list[int | None]:
        """Raises `UserError` when an active row's logits are not numbers."""
        if not any(self._active) or self._given == self._max_new_tokens:
            raise StopIteration
        if self._state is None:
            self._state = self._prefill()
        else:
            self._make_room()
            step = decode_step(platform_of(self._params))
            self._state = step(
                self._model, self._params, self._state, self._next_forced(), self._rule
            )
            self._used += 1
        self._given += 1
        tokens = np.asarray(self._state.tokens)[: len(self._prompts)].tolist()
        step = [
            token if active else None for token, active in zip(tokens, self._active, strict=True)
        ]
        for row, token in enumerate(step):
            if token == -1:
                raise UserError(not_numbers(self._given, dtype_of(self._params)))
            if token in self._stop_ids:
                self.stop(row)
        return step

    def stop(self, row: int) -> None:
        """Ends a row: later steps give None for it."""
        self._active[row] = False

    def force(self, row: int, ids: Sequence[int]) -> None:
        """Makes `ids` the next tokens of a row, before any that are drawn.

        They are tokens like any other: they count for penalties, for `max_new_tokens` and as stop
        ids, and the draws of later tokens are what they would have been.

        Raises:
          UserError: an id outside the vocabulary.
        """
        self._forced[row].extend(read_ids(self._model.config, f"prompt {row}", ids).tolist())

    def active(self, row: int) -> bool:
        """Whether a row has met neither a stop id nor `stop`."""
        return self._active[row]

    def finished(self, row: int) -> bool:
        """Whether a row has no more tokens to come."""
        return not self._active[row] or self._given == self._max_new_tokens

    @property
    def cache(self) -> Cache | None:
        """The cache so far; None before the first step of a stream that was given none."""
        return self._start_cache if self._state is None else self._state.cache

    def _prefill(self) -> DecodeState:
        lengths = np.array([len(prompt) for prompt in self._prompts])
        # Rows that only the mesh needs have no tokens.
        lengths = np.pad(lengths, (0, self._extra_rows))
        B = len(lengths)
        longest = int(lengths.max())
        # A turn of a chat is short and its program depends on the cache's size too: few lengths.
        T = bucket(longest, 16 if self._start_cache is None else 32)
        ids = np.zeros((B, T), np.int32)
        for row, prompt in enumerate(self._prompts):
            ids[row, : len(prompt)] = prompt
        columns = np.arange(T)
        mask = columns < lengths[:, None]
        config = self._model.config
        self._used += longest
        if self._start_cache is None:
            cache = init_cache(
                config, B, T, dtype_of(self._params), self._model.mesh, self._cache_dtype
            )
            past = np.zeros(B, np.int32)
        else:
            cache = self._start_cache
            past = np.asarray(cache.next_positions)
            if self._used > cache.capacity:
                cache = grow_cache(cache, self._roomy_capacity(), self._model.mesh)
        self._start_cache = None
        positions = np.where(mask, past[:, None] + columns, 0)
        # Those that only the mesh needs draw for nobody.
        rows = np.pad(self._rows, (0, self._extra_rows))
        warn_if_longer(config, int((past + lengths).max()))
        return prefill(
            self._model,
            self._params,
            cache,
            ids,
            mask,
            positions,
            np.uint32(self._seed),
            rows,
            self._next_forced(),
            self._rule,
        )

    def _next_forced(self) -> np.ndarray:
        """int32, for each row the token that it must take next, -1 where it may choose."""
        forced = [queue.popleft() if queue else -1 for queue in self._forced]
        return np.array(forced + [-1] * self._extra_rows, np.int32)

    @property
    def _extra_rows(self) -> int:
        mesh = self._model.mesh
        return 0 if mesh is None else -len(self._prompts) % num_shards(mesh, "batch")

    def _make_room(self) -> None:
        """A slot for the token about to enter the cache."""
        warn_if_longer(self._model.config, self._used + 1)
        if self._used < self._state.cache.capacity and not self._is_tight:
            return
        self._is_tight = False
        self._state = self._state.replace(
            cache=grow_cache(self._state.cache, self._roomy_capacity(), self._model.mesh)
        )

    def _roomy_capacity(self) -> int:
        """Slots for what is used and for tokens to come: each capacity compiles a decode step."""
        left = self._max_new_tokens - self._given
        return bucket(self._used + min(left, max(_FIRST_ROOM, self._used)))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(model, params, cache, ids, mask, positions, seed, rows, forced, rule) -> DecodeState:
    """The first step: prompts [B, T] into an empty or used cache, which is donated."""
    out = model.apply({"params": params}, ids, mask, positions, cache, "last")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)
    seen = None
    if rule.penalises:
        # The cache's tokens, not this call's alone: a chat's earlier turns are in its prompt too.
        filled = jnp.arange(out.cache.capacity) < out.cache.lengths[:, None]
        seen = init_seen(out.cache.ids, filled, model.config.vocab_size)
    state = DecodeState(out.cache, ids[:, 0], keys, jnp.zeros((), jnp.int32), seen)
    return _chosen(model, state, out.logits[:, 0], forced, rule)


@functools.cache
def decode_step(platform: str) -> Any:
    """`_decode_step` under `jit`, as it is compiled for the devices of a platform."""
    return jax.jit(
        _decode_step,
        static_argnames="model",
        donate_argnames="state",
        compiler_options=COMPILER_OPTIONS.get(platform),
    )


def _decode_step(model, params, state, forced, rule) -> DecodeState:
    """One more token for every row; `state` is donated. `forced` as `_next_forced` has it."""
    out = model.apply({"params": params}, state.tokens[:, None], cache=state.cache)
    return _chosen(model, state.replace(cache=out.cache), out.logits[:, 0], forced, rule)


def _chosen(
    model: Decoder, state: DecodeState, logits: jax.Array, forced: jax.Array, rule: SamplingRule
) -> DecodeState:
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    tokens = choose(logits, state.seen, keys, rule)
    # A row whose logits are not numbers stays marked.
    tokens = jnp.where((forced >= 0) & (tokens >= 0), forced, tokens)
    seen = None if state.seen is None else count(state.seen, tokens)
    # Every process reads them.
    tokens = constrain(tokens, model.mesh and Layout(model.mesh), None)
    return state.replace(tokens=tokens, step=state.step + 1, seen=seen)


def dtype_of(params: Any) -> jnp.dtype:
    """What a model computes in: the dtype of its embeddings."""
    return params["embed_tokens"]["weight"].dtype


def platform_of(params: Any) -> str:
    """Of the devices that have the parameters; JAX's default where none do yet."""
    weight = params["embed_tokens"]["weight"]
    if isinstance(weight, jax.Array):
        return next(iter(weight.devices())).platform
    return jax.default_backend()


def read_ids(config: ModelConfig, name: str, text: Sequence[int]) -> np.ndarray:
    """The token ids of one text as an array; `name` is what errors call it.

    Raises:
      UserError: it is empty, no list of ids, or has one outside the vocabulary.
    """
    try:
        ids = np.asarray(text)
    except ValueError:  # Lists of different lengths inside.
        ids = np.zeros((1, 1))
    if ids.size == 0:
        raise UserError(f"{name} is empty; give at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"{name} should be a list of token ids; it is {str(text)[:60]!r}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(
            f"{name}: token id {worst} is outside the model's vocabulary of {config.vocab_size}"
        )
    return ids


def not_numbers(given: int, dtype: jnp.dtype) -> str:
    """What is wrong where no token is the likeliest."""
    wider = "" if dtype == jnp.float32 else ", or load it as float32"
    return (
        f"the logits of new token {given} are NaN or infinite in {dtype}; download the checkpoint "
        f"again{wider}"
    )
