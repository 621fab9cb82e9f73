"""The programs of a model's shape by themselves, with random weights and a cache as full as asked.

Numbers do not matter to their costs, so that no checkpoint is needed.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache

from qwen_jax.config import ModelConfig
from qwen_jax.inference.decoding import DecodeState, decode_step, prefill
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.nn.cache import Cache, init_cache
from qwen_jax.training.objective import Batch, TrainOptions
from qwen_jax.training.train_step import abstract_train_state, make_train_step

# What all of it is in.
DTYPE = jnp.float32


def first_layers(config: ModelConfig, count: int) -> ModelConfig:
    """The model's first layers, and of its vocabulary as large a part, which keeps its share.

    Raises:
      UserError: the model has fewer.
    """
    cut = config.with_layers(range(count))
    vocab_size = max(1, round(config.vocab_size * count / config.num_hidden_layers))
    return dataclasses.replace(cut, vocab_size=vocab_size, eos_token_ids=())


def random_params(config: ModelConfig) -> Any:
    """Parameters as `load_pretrained` returns them, normal and small."""
    generator = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = generator.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values * np.float32(config.initializer_range), DTYPE)

    return jax.tree.map(draw, parameter_shapes(config))


def filled_cache(config: ModelConfig, rows: int, capacity: int, filled: int) -> Cache:
    """A cache of zeros of which each row has `filled` tokens."""
    cache = init_cache(config, rows, capacity, DTYPE)
    positions = jnp.broadcast_to(jnp.arange(cache.capacity, dtype=jnp.int32), cache.ids.shape)
    return _with_lengths(cache, filled).replace(positions=positions)


def _with_lengths(cache: Cache, filled: int) -> Cache:
    # Three arrays, since the cache is donated and a buffer can be given away once only.
    names = ("lengths", "next_positions", "frequencies_for")
    return cache.replace(**{name: jnp.full_like(cache.lengths, filled) for name in names})


def _decode_state(config: ModelConfig, rows: int, capacity: int, filled: int) -> DecodeState:
    return DecodeState(
        cache=filled_cache(config, rows, capacity, filled),
        tokens=jnp.zeros(rows, jnp.int32),
        keys=jax.random.split(jax.random.key(0), rows),
        step=jnp.zeros((), jnp.int32),
        seen=None,
    )


def _forced(rows: int) -> np.ndarray:
    """No row's token is."""
    return np.full(rows, -1, np.int32)


def lower_decode(config: ModelConfig, rows: int, capacity: int) -> jax.stages.Lowered:
    """A greedy decode step, as `TokenStream` runs it."""
    state = jax.eval_shape(lambda: _decode_state(config, rows, capacity, 0))
    step = decode_step(jax.default_backend())
    rule = SamplingOptions().rule()
    return step.lower(Decoder(config), _abstract_params(config), state, _forced(rows), rule)


def lower_prefill(config: ModelConfig, rows: int, length: int) -> jax.stages.Lowered:
    """The first step over prompts of this length, in a cache of their own size."""
    cache = jax.eval_shape(lambda: init_cache(config, rows, length, DTYPE))
    ids, mask = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, bool))
    numbers, rule = np.arange(rows, dtype=np.int32), SamplingOptions().rule()
    beside = np.uint32(0), numbers, _forced(rows), rule
    params = _abstract_params(config)
    return prefill.lower(Decoder(config), params, cache, ids, mask, ids, *beside)


def lower_train(config: ModelConfig, rows: int, length: int, scan: bool) -> jax.stages.Lowered:
    """A train step of AdamW, its layers scanned or one after another."""
    model, optimiser = Decoder(config), optax.adamw(1e-4)
    step = make_train_step(model, optimiser, TrainOptions(dtype="float32", scan=scan))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    state = abstract_train_state(model, optimiser, stacked=scan)
    return step.trace(state, Batch(ids)).lower()


def _abstract_params(config: ModelConfig) -> Any:
    return jax.tree.map(lambda leaf: leaf.update(dtype=DTYPE), parameter_shapes(config))


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Within it programs are traced and compiled, whatever is kept in memory or on disk.

    One that comes from disk may also bear the names of an earlier version's source.
    """
    was = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX looks once whether there is a cache, and keeps to it.
    compilation_cache.reset_cache()
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()


class Prefills:
    """Prefills of prompts of one length, each into an empty cache.

    Attributes:
      text: of the compiled program.
    """

    def __init__(self, config: ModelConfig, params: Any, rows: int, length: int):
        self._config, self._params, self._shape = config, params, (rows, length)
        with compiled_anew():
            self._program = lower_prefill(config, rows, length).compile()
        self.text = self._program.as_text()

    def seconds(self) -> float:
        """Of one, until its tokens are known."""
        rows, length = self._shape
        cache = jax.block_until_ready(init_cache(self._config, rows, length, DTYPE))
        ids = np.zeros(self._shape, np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), self._shape)
        beside = np.uint32(0), np.arange(rows, dtype=np.int32), _forced(rows)
        start = time.perf_counter()
        state = self._program(
            self._params,
            cache,
            ids,
            np.ones(self._shape, bool),
            positions,
            *beside,
            SamplingOptions().rule(),
        )
        np.asarray(state.tokens)
        return time.perf_counter() - start


class DecodeSteps:
    """Single decode steps after so many tokens as each is asked for."""

    def __init__(self, config: ModelConfig, params: Any, rows: int, capacity: int):
        self._params, self._rows = params, rows
        self._program = lower_decode(config, rows, capacity).compile()
        self._state = _decode_state(config, rows, capacity, 0)
        self._rule = SamplingOptions().rule()

    def seconds(self, filled: int) -> float:
        """Of a step after `filled` tokens in each row, until its tokens are known."""
        cache = _with_lengths(self._state.cache, filled)
        state = jax.block_until_ready(self._state.replace(cache=cache))
        start = time.perf_counter()
        self._state = self._program(self._params, state, _forced(self._rows), self._rule)
        np.asarray(self._state.tokens)
        return time.perf_counter() - start
