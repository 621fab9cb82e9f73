"""Keys and values in int8: how far each number is off, and attention over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from qwen_jax.config import DualChunkSpec, LayerKind
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn import attend as attend_file
from qwen_jax.nn import attention, cache
from qwen_jax.nn.attend import Mask, attend
from qwen_jax.nn.cache import KeyValues, grow_cache, init_cache, rewind_cache
from qwen_jax.nn.delta_rule import DeltaState
from qwen_jax.nn.int8_vectors import Int8Vectors, dense, round_vectors
from qwen_jax.nn.kernels.choose import Kernels
from tests.sharding.models import CONFIGS, make_config, random_batch, random_params

FULL, SLIDING = LayerKind.FULL_ATTENTION, LayerKind.SLIDING_ATTENTION
MODELS = {
    **CONFIGS,
    "sliding": make_config(layer_types=(FULL, SLIDING), sliding_window=5),
    "dual chunk": make_config(dual_chunk=DualChunkSpec(8, 2, 64)),
}


def random_vectors(shape, seed=0):
    """Vectors of sizes from 1e-3 to 1e3."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, (*shape[:-1], 1))).astype("f")


def test_no_number_is_off_by_more_than_half_a_step():
    x = random_vectors((3, 40, 2, 16))
    rounded = round_vectors(jnp.asarray(x), jnp.float32)
    assert (rounded.values.dtype, rounded.scales.dtype) == (jnp.int8, jnp.float32)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(np.abs(rounded.values).max(axis=-1), 127)
    assert (np.abs(dense(rounded) - x) <= largest / 254 * (1 + 1e-5)).all()
    # A bound that is reached, and not one of a finer grid.
    assert (np.abs(dense(rounded) - x) / largest).max() > 0.9 / 254


def test_nothing_stays_nothing_and_what_is_no_number_stays_none():
    x = np.ones((1, 4, 1, 8), np.float32)
    x[0, 0], x[0, 1], x[0, 2, 0, 3], x[0, 3, 0, 5] = 0, 1e-40, np.nan, -np.inf
    found = dense(round_vectors(jnp.asarray(x), jnp.float32))
    np.testing.assert_array_equal(found[0, :2], 0)
    assert np.isnan(found[0, 2:]).all()


@pytest.mark.parametrize("method", ["plain", "blockwise"])
@pytest.mark.parametrize("window", [None, 6])
def test_attention_is_that_over_the_numbers_written_out(method, window, monkeypatch):
    monkeypatch.setattr(attend_file, "_BLOCK", 8)
    k, v = (random_vectors((2, 37, 2, 16), seed) for seed in (1, 2))
    k, v = (round_vectors(jnp.asarray(x / np.abs(x).max(-1, keepdims=True) ** 0.9), jnp.float32)
            for x in (k, v))  # fmt: skip
    q = jax.random.normal(jax.random.key(3), (2, 20, 4, 16))
    mask = Mask(jnp.stack([jnp.arange(20), jnp.arange(17, 37)]), window=window)
    found = attend(q, k, v, mask, method=method)
    written = [x.values.astype(jnp.float32) * x.scales[..., None] for x in (k, v)]
    for a, b in zip(found, attend(q, *written, mask, method="plain"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def floats_in(jaxpr):
    """Shapes of all floating-point arrays that a program makes, those of its loops included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if jnp.issubdtype(variable.aval.dtype, jnp.floating):
                yield variable.aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from floats_in(inner)


def test_block_by_block_no_float_copy_of_the_cache_is_made(monkeypatch):
    monkeypatch.setattr(attend_file, "_BLOCK", 8)
    x = round_vectors(jnp.ones((1, 64, 2, 16)), jnp.float32)
    q = jnp.ones((1, 20, 4, 16))
    mask = Mask(jnp.arange(20)[None])

    def shapes(method):
        function = functools.partial(attend, method=method)
        return set(floats_in(jax.make_jaxpr(function)(q, x, x, mask).jaxpr))

    assert x.shape in shapes("plain")
    assert x.shape not in shapes("blockwise")
    assert (1, 8, 2, 16) in shapes("blockwise")


def logits_of(config, pieces, cache_dtype=None):
    """Logits [B, T, V] of a batch that goes through a cache in pieces, and the cache."""
    params, (ids, _) = random_params(config), random_batch(config)
    state = init_cache(config, len(ids), sum(pieces), jnp.float32, cache_dtype=cache_dtype)
    logits, start = [], 0
    for size in pieces:
        out = Decoder(config).apply({"params": params}, ids[:, start : start + size], cache=state)
        state, start = out.cache, start + size
        logits.append(out.logits)
    return np.concatenate(logits, axis=1), state


def kl(p, q):
    p, q = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(axis=-1)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_an_int8_cache_is_near_one_with_floats_and_not_the_same(name):
    want, _ = logits_of(MODELS[name], [12])
    whole, state = logits_of(MODELS[name], [12], "int8")
    steps, stepped = logits_of(MODELS[name], [6, 3, 1, 1, 1], "int8")
    found = kl(want, whole)
    assert 1e-9 < found.mean() < 1e-3
    assert found.max() < 1e-2
    assert state.is_int8
    # What is written does not depend on how the text came in.
    np.testing.assert_allclose(steps, whole, rtol=0, atol=0.02 * np.abs(whole).max())
    for a, b in zip(
        jax.tree.leaves(state.layers[-1]), jax.tree.leaves(stepped.layers[-1]), strict=True
    ):
        assert a.dtype == b.dtype
    assert kl(whole, steps).mean() < found.mean()


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_the_cache_takes_a_quarter_of_float32_and_its_scales(name):
    config = MODELS[name]
    full, small = (init_cache(config, 3, 20, jnp.float32, cache_dtype=d) for d in (None, "int8"))
    numbers = 3 * 20 * config.num_key_value_heads
    for layer, other in zip(full.layers, small.layers, strict=True):
        if isinstance(layer, DeltaState):
            assert jax.tree.map(jnp.shape, layer) == jax.tree.map(jnp.shape, other)
            continue
        assert sum(x.nbytes for x in jax.tree.leaves(layer)) == 2 * numbers * config.head_dim * 4
        assert sum(x.nbytes for x in jax.tree.leaves(other)) == 2 * numbers * (config.head_dim + 4)
        assert other.keys.nbytes == numbers * (config.head_dim + 4)


def test_a_cache_that_grew_or_was_rewound_goes_on_as_it_was():
    config = MODELS["sliding"]
    params, (ids, _) = random_params(config), random_batch(config)

    def run(state, ids):
        out = Decoder(config).apply({"params": params}, ids, cache=state)
        return out.cache, np.asarray(out.logits)

    small = init_cache(config, 3, 6, jnp.float32, cache_dtype="int8")
    small, _ = run(small, ids[:, :6])
    grown = grow_cache(small, 10)
    assert (grown.capacity, grown.is_int8) == (10, True)
    for a, b in zip(jax.tree.leaves(small.layers), jax.tree.leaves(grown.layers), strict=True):
        np.testing.assert_array_equal(b[:, :6], a)
        assert not np.any(b[:, 6:])
    _, want = run(grown, ids[:, 8:9])
    longer, _ = run(grown, ids[:, 6:8])
    assert longer.can_rewind
    _, found = run(rewind_cache(longer, 6), ids[:, 8:9])
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)


def test_on_tpu_int8_has_no_pages(monkeypatch):
    for module in (attention, cache):
        monkeypatch.setattr(module, "kernels_on", lambda _: Kernels("tpu"))
    state = jax.eval_shape(
        lambda: init_cache(MODELS["dense"], 2, 10, jnp.float32, cache_dtype="int8")
    )
    assert isinstance(state.layers[0], KeyValues)
    assert isinstance(state.layers[0].keys, Int8Vectors)
    assert state.capacity == 10


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="cache_dtype = 'int4': give int8, or None"):
        init_cache(MODELS["dense"], 1, 4, jnp.float32, cache_dtype="int4")
