"""What an int8 cache does to predictions, measured, against numbers worked out one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.evaluation.cache_divergence import measure_cache_divergence
from qwen_jax.evaluation.perplexity import cut_windows
from qwen_jax.nn.cache import init_cache
from tests.sharding.models import CONFIGS, one_device
from tests.sharding.test_equality import spread


def decode(model, params, ids, cache_dtype):
    """float64 log probabilities [T, V] after each token, decoded one by one."""
    state = init_cache(model.config, 1, len(ids), jnp.float32, cache_dtype=cache_dtype)
    step = jax.jit(lambda params, token, state: model.apply({"params": params}, token, cache=state))
    found = []
    for token in ids:
        out = step(params, np.array([[token]]), state)
        state = out.cache
        found.append(np.asarray(out.logits[0, 0], np.float64))
    logits = np.stack(found)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_it_is_that_of_decoding_the_text_token_by_token(name):
    model, params = one_device(CONFIGS[name])
    ids = np.random.default_rng(0).integers(0, 96, 45)
    found = measure_cache_divergence(model, params, ids, 20, 12, "int8", batch_size=2)
    kl, agrees = [], []
    for window in cut_windows(len(ids), 20, 12):
        p, q = (
            decode(model, params, ids[window.begin : window.end - 1], d) for d in (None, "int8")
        )
        first = window.start - 1 - window.begin
        kl += (np.exp(p) * (p - q)).sum(axis=-1)[first:].tolist()
        agrees += (p.argmax(axis=-1) == q.argmax(axis=-1))[first:].tolist()
    assert len(found.kl) == len(ids) - 1
    assert 0 < found.kl.mean() < 1e-3
    np.testing.assert_allclose(found.kl, kl, rtol=0.05, atol=2e-8)
    np.testing.assert_array_equal(found.agrees, agrees)
    if name == "dense":
        # 8 numbers a head, in 4 bytes each or in one with a scale of 4.
        assert found.other_bytes / found.full_bytes == 12 / 32


def test_a_mesh_changes_nothing():
    model, params = one_device(CONFIGS["dense"])
    ids = np.random.default_rng(1).integers(0, 96, 30)
    want = measure_cache_divergence(model, params, ids, 16, 16, "int8")
    model, params = spread(model, params, "fsdp:2,tensor:2")
    found = measure_cache_divergence(model, params, ids, 16, 16, "int8")
    np.testing.assert_allclose(found.kl, want.kl, rtol=0.05, atol=2e-8)


def test_what_cannot_be_measured_is_refused():
    model, params = one_device(CONFIGS["dense"])
    with pytest.raises(UserError, match="cache_dtype = 'int3': give int8"):
        measure_cache_divergence(model, params, [1, 2, 3], 3, 3, "int3")
    params = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(UserError, match="NaN or infinite in float32"):
        measure_cache_divergence(model, params, [1, 2, 3], 3, 3, "int8")
