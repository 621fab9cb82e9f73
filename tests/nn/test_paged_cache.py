"""Whole models that decode from pages, the kernel interpreted, against those with plain caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax.config import DeltaSpec, DualChunkSpec, LayerKind
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn import attention, cache
from qwen_jax.nn.cache import grow_cache, init_cache, rewind_cache
from qwen_jax.nn.kernels.choose import Kernels
from qwen_jax.nn.kernels.paged import PagedKeyValues
from qwen_jax.sharding.axes import as_mesh, parameter_shardings
from tests.sharding.models import make_config, random_batch, random_params

FULL, SLIDING, LINEAR = (
    LayerKind.FULL_ATTENTION,
    LayerKind.SLIDING_ATTENTION,
    LayerKind.LINEAR_ATTENTION,
)
CONFIGS = {
    "sliding": make_config(layer_types=(FULL, SLIDING), sliding_window=5),
    "hybrid": make_config(
        layer_types=(LINEAR, FULL), output_gate=True, delta=DeltaSpec(2, 8, 8, 8, 4)
    ),
}


@pytest.fixture
def on_tpu(monkeypatch, interpreter, small_pages):
    """Makes models of one platform run as on a TPU."""
    jax.clear_caches()
    for module in (attention, cache):
        monkeypatch.setattr(module, "kernels_on", lambda _: Kernels("tpu", interpret=True))
    yield
    jax.clear_caches()


def full_pass(config, ids, mask):
    """Logits of each row's tokens from the tenth column on, without a cache."""
    rows = []
    for row, real in zip(ids, mask, strict=True):
        # Padding counts, behind the prompt as well.
        (columns,) = np.nonzero(np.concatenate([real[:10], [True, True]]))
        out = Decoder(config).apply(
            {"params": random_params(config)}, row[None, columns], positions=columns[None]
        )
        rows.append(out.logits[0, -3:])
    return np.stack(rows, axis=1)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("sliding", None), ("hybrid", None), ("sliding", "fsdp:2,tensor:4"), ("hybrid", "tensor:2")],
)
def test_decoding_from_pages_equals_a_full_pass(name, mesh, on_tpu, monkeypatch):
    config = CONFIGS[name]
    params, (ids, mask) = random_params(config), random_batch(config)
    with monkeypatch.context() as plain:
        for module in (attention, cache):
            plain.setattr(module, "kernels_on", lambda _: Kernels())
        want = full_pass(config, ids, mask)
    jax.clear_caches()
    mesh = as_mesh(mesh)
    if mesh is not None:
        params = jax.device_put(params, parameter_shardings(config, mesh, params))
    model = Decoder(config, mesh=mesh)
    state = init_cache(config, len(ids), 10, jnp.float32, mesh)
    assert state.capacity == 16
    assert isinstance(state.layers[1], PagedKeyValues)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state, ids, mask=None):
        out = model.apply({"params": params}, ids, mask, cache=state, logits_at="last")
        return out.cache, out.logits[:, 0]

    state, first = step(params, state, ids[:, :10], mask[:, :10])
    state = grow_cache(state, 20, mesh)
    assert state.capacity == 24
    logits = [first]
    for column in (10, 11):
        state, new = step(params, state, ids[:, column : column + 1])
        logits.append(new)
    got = np.stack(logits)
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_generation_from_pages_gives_the_ids_of_a_plain_cache(monkeypatch, request):
    config = CONFIGS["sliding"]
    params, (ids, _) = random_params(config), random_batch(config)
    prompts = [ids[0, :9].tolist(), ids[1, :3].tolist()]
    generate = functools.partial(
        qwen_jax.generate, Decoder(config), params, prompts, max_new_tokens=12, temperature=0.0
    )
    want = generate()
    request.getfixturevalue("on_tpu")
    assert generate() == want


def test_a_rewound_cache_of_pages_goes_on_from_there(on_tpu):
    config = CONFIGS["sliding"]
    params, (ids, _) = random_params(config), random_batch(config)
    model = Decoder(config)

    def run(state, ids):
        out = model.apply({"params": params}, ids, cache=state, logits_at="last")
        return out.cache, out.logits

    empty = init_cache(config, 3, 16, jnp.float32)
    state, _ = run(empty, ids[:, :6])
    _, want = run(state, ids[:, 8:9])
    longer, _ = run(state, ids[:, 6:8])
    assert longer.can_rewind
    _, got = run(rewind_cache(longer, 6), ids[:, 8:9])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_pages_are_for_what_the_kernel_can_read(on_tpu):
    def is_paged(config, mesh=None, dtype=jnp.float32):
        state = jax.eval_shape(lambda: init_cache(config, 2, 16, dtype, as_mesh(mesh)))
        return isinstance(state.layers[-1], PagedKeyValues)

    config = CONFIGS["sliding"]
    assert is_paged(config)
    assert is_paged(config, "data:2,tensor:4")
    assert not is_paged(config, "context:2")
    assert not is_paged(config, dtype=jnp.float16)
    assert not is_paged(make_config(head_dim=256))
    assert not is_paged(make_config(dual_chunk=DualChunkSpec(96, 32, 64)))
