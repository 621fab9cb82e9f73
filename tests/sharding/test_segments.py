"""Texts packed into rows compute what each computes alone."""

import jax
import numpy as np
import pytest

from qwen_jax.nn.cache import init_cache
from qwen_jax.sharding import axes
from tests.sharding.models import CONFIGS, one_device

LENGTHS = ([5, 7, 4], [9, 6])


def packed(config):
    """Two rows of several texts, the second with padding behind them."""
    rng = np.random.default_rng(5)
    texts = [[rng.integers(0, config.vocab_size, n) for n in row] for row in LENGTHS]
    ids, segments, positions = (np.zeros((2, 16), int) for _ in range(3))
    for row, found in enumerate(texts):
        length = sum(map(len, found))
        ids[row, :length] = np.concatenate(found)
        segments[row, :length] = np.repeat(np.arange(len(found)), list(map(len, found)))
        positions[row, :length] = np.concatenate([np.arange(len(text)) for text in found])
    mask = np.arange(16) < np.array([[16], [15]])
    return texts, ids, mask, positions, segments


@pytest.mark.parametrize("mesh", [None, "fsdp:2,context:2", "context:4,tensor:2"])
@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_packed_texts_are_as_if_alone(name, mesh):
    model, params = one_device(CONFIGS[name])
    texts, ids, mask, positions, segments = packed(model.config)
    alone = [[model.apply({"params": params}, t[None]).logits[0] for t in row] for row in texts]
    if mesh is not None:
        mesh = axes.as_mesh(mesh)
        params = jax.device_put(params, axes.parameter_shardings(model.config, mesh, params))
        model = model.clone(mesh=mesh)
    out = jax.jit(
        lambda params: (
            model.apply({"params": params}, ids, mask, positions, segment_ids=segments).logits
        )
    )(params)
    for row, expected in enumerate(alone):
        expected = np.concatenate(expected)
        found = np.asarray(out)[row, : len(expected)]
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_segments_with_a_cache_are_refused():
    model, params = one_device(CONFIGS["dense"])
    cache = init_cache(model.config, 1, 8, np.float32)
    ids = np.zeros((1, 4), int)
    with pytest.raises(ValueError, match="segment_ids with a cache"):
        model.apply({"params": params}, ids, cache=cache, segment_ids=ids)
