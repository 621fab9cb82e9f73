"""What a mesh computes equals what one device computes, and each device holds its share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax.nn import ring
from qwen_jax.nn.cache import init_cache
from qwen_jax.sharding import axes
from tests.sharding.models import CONFIGS, one_device, random_batch

MESHES = {
    "dense": ["fsdp:8", "tensor:8", "fsdp:2,context:4"],
    "moe": ["expert:4,tensor:2", "fsdp:2,expert:2,tensor:2"],
    "hybrid": ["fsdp:2,tensor:4", "expert:2,context:4"],
}
CASES = [(model, mesh) for model, meshes in MESHES.items() for mesh in meshes]


@pytest.fixture(autouse=True)
def dense_models_pass_keys_round_the_ring(request, monkeypatch):
    """So few are gathered otherwise, which the hybrid shows."""
    if "name" in request.fixturenames and request.getfixturevalue("name") == "dense":
        monkeypatch.setattr(ring, "_MOST_GATHERED", 0)


def run(model, params, ids, mask):
    """Logits of the real tokens, the loss of what follows one, and its gradients."""
    # What padding predicts is nobody's: a mesh that cuts texts moves it behind them.
    weights = mask[:, :-1] & mask[:, 1:]

    def loss(params):
        logits = model.apply({"params": params}, ids, mask).logits
        scores = jax.nn.log_softmax(logits[:, :-1])
        targets = jnp.take_along_axis(scores, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(targets * weights) / weights.sum(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return np.asarray(logits)[mask], value, gradients


def decode(model, params, ids, mask, cache_dtype=None):
    """Logits of a ragged prefill and of two steps behind it."""
    cache = init_cache(model.config, len(ids), 16, jnp.float32, model.mesh, cache_dtype)

    @jax.jit
    def step(params, cache, ids, mask):
        out = model.apply({"params": params}, ids, mask, cache=cache, logits_at="last")
        return out.cache, out.logits[:, 0]

    cache, first = step(params, cache, ids[:, :10], mask[:, :10])
    logits = [first]
    for column in (10, 11):
        cache, new = step(params, cache, ids[:, column : column + 1], None)
        logits.append(new)
    return np.stack(logits)


@pytest.fixture(scope="module")
def expected():
    """Of each model: parameters and what one device makes of them."""
    found = {}

    def of(name):
        if name not in found:
            model, params = one_device(CONFIGS[name])
            batch = random_batch(model.config)
            found[name] = (model, params, batch, run(model, params, *batch),
                           decode(model, params, *batch))  # fmt: skip
        return found[name]

    return of


def spread(model, params, text):
    mesh = axes.as_mesh(text)
    axes.check_mesh(model.config, mesh, params)
    shardings = axes.parameter_shardings(model.config, mesh, params)
    return model.clone(mesh=mesh), jax.device_put(params, shardings)


def assert_close(actual, wanted, name=""):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert np.linalg.norm(actual - wanted) <= 1e-5 * np.linalg.norm(wanted), name


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_logits_loss_and_gradients_equal_those_of_one_device(expected, name, mesh):
    model, params, batch, (logits, loss, gradients), _ = expected(name)
    found, value, found_gradients = run(*spread(model, params, mesh), *batch)
    assert_close(found, logits)
    assert_close(value, loss)
    wanted = dict(jax.tree_util.tree_leaves_with_path(gradients))
    for path, gradient in jax.tree_util.tree_leaves_with_path(found_gradients):
        assert_close(gradient, wanted[path], jax.tree_util.keystr(path))


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_cached_decode_of_ragged_rows_equals_that_of_one_device(expected, name, mesh):
    model, params, batch, _, logits = expected(name)
    assert_close(decode(*spread(model, params, mesh), *batch), logits)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("dense", "tensor:8"), ("dense", "fsdp:2,context:4"), ("hybrid", "expert:4,context:2")],
)
def test_decode_with_an_int8_cache_equals_that_of_one_device(expected, name, mesh):
    """But for numbers half a step between two integers, which rounding of sums tips over."""
    model, params, batch, _, floats = expected(name)
    wanted = decode(model, params, *batch, "int8")
    found = decode(*spread(model, params, mesh), *batch, "int8")
    rounding = np.linalg.norm(wanted - floats)
    assert np.linalg.norm(found - wanted) <= 0.1 * rounding
    assert 1e-4 < rounding / np.linalg.norm(floats) < 2e-2


def test_a_device_holds_its_share_of_an_int8_cache(expected):
    model = expected("dense")[0]
    mesh = axes.as_mesh("fsdp:2,context:2,tensor:2")
    cache = init_cache(model.config, 4, 16, jnp.float32, mesh, "int8")
    for array, size in ((cache.layers[0].keys.values, 8), (cache.layers[0].keys.scales, 4)):
        shards = {shard.data.nbytes for shard in array.addressable_shards}
        assert shards == {2 * 8 * 1 * size}


def test_generation_gives_the_ids_of_one_device(expected):
    model, params, (ids, _), _, _ = expected("hybrid")
    prompts = [ids[0, :9].tolist(), ids[1, :3].tolist(), ids[2, :6].tolist()]
    options = {"max_new_tokens": 5, "temperature": 0.8, "repetition_penalty": 1.2, "seed": 3}
    wanted = qwen_jax.generate(model, params, prompts, **options)
    assert (
        qwen_jax.generate(*spread(model, params, "fsdp:2,tensor:4"), prompts, **options) == wanted
    )


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_device_holds_its_share_of_every_parameter(expected, name, mesh):
    model, params, *_ = expected(name)
    model, spread_params = spread(model, params, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(spread_params):
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        # Too few key heads for the mesh are whole on every device.
        cut = [
            axis
            for axis in axes.parameter_axes(text)
            if axis is not None and axis not in axes.Layout.of(model.config, model.mesh).whole
        ]
        shards = math.prod(axes.num_shards(model.mesh, axis) for axis in cut if axis != "length")
        for shard in leaf.addressable_shards:
            assert shard.data.nbytes * shards == leaf.nbytes, text
