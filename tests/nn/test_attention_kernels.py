"""Whole models on the kernels of accelerators: TPU ones in the interpreter, and compiled."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunkSpec, FarSpec, LayerKind
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn import attention, ring
from qwen_jax.nn.cache import init_cache
from qwen_jax.nn.kernels import choose
from qwen_jax.nn.kernels.choose import Kernels
from qwen_jax.sharding import aot
from qwen_jax.sharding.axes import as_mesh, parameter_shardings, read_mesh
from qwen_jax.sharding.chips import read_topology
from qwen_jax.sharding.jobs import Job
from qwen_jax.sharding.plan import compile_plan
from qwen_jax.training.objective import TrainOptions
from tests.sharding.models import make_config, random_params

T = 256
SLIDING = make_config(
    layer_types=(LayerKind.FULL_ATTENTION, LayerKind.SLIDING_ATTENTION), sliding_window=100
)
DUAL = make_config(dual_chunk=DualChunkSpec(96, 32, 64))
LEAKY = make_config(far=FarSpec(60, 2.5))
SINKS = make_config(far=FarSpec(60, sinks=4))
MESHES = ("context:2", "fsdp:2,tensor:2")
WIDE = make_config(
    hidden_size=512, intermediate_size=1024, head_dim=128, num_attention_heads=8, vocab_size=1024
)
WIDER = dataclasses.replace(WIDE, head_dim=256)
WIDE_DUAL = dataclasses.replace(WIDE, dual_chunk=DualChunkSpec(768, 256, 512))


@pytest.fixture
def on_tpu(monkeypatch):
    """A function that makes models run as on a TPU, its kernels interpreted, and counts calls."""
    called = []
    kernel = choose.splash_attend

    def counted(*arguments, **promises):
        called.append(promises)
        return kernel(*arguments, **promises)

    monkeypatch.setattr(choose, "splash_attend", counted)

    def run(function, *arguments):
        jax.clear_caches()
        with mock.patch.object(attention, "kernels_on", lambda _: Kernels("tpu", interpret=True)):
            got = function(*arguments)
        jax.clear_caches()
        assert called
        return got

    return run


def batch(config):
    """Ids, and a mask with padding on the left, on the right, and nowhere."""
    rng = np.random.default_rng(1)
    mask = np.ones((3, T), bool)
    mask[1, :70] = False
    mask[2, T - 37 :] = False
    return rng.integers(0, config.vocab_size, (3, T)), mask


def loss_and_gradients(model, params, ids, mask, **texts):
    weights = np.random.default_rng(2).standard_normal((*ids.shape, 96)) * mask[..., None]

    def loss(params):
        out = model.apply({"params": params}, ids, attention_mask=mask, **texts)
        return jnp.sum(out.logits * weights), out.logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits[mask], gradients


def check(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(np.asarray(x) - y) <= 1e-5 * np.linalg.norm(y)


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        *((config, mesh) for config in (SLIDING, DUAL) for mesh in (None, *MESHES)),
        *((config, mesh) for config in (LEAKY, SINKS) for mesh in (None, "context:2")),
    ],
)
def test_a_model_on_tpu_kernels_equals_one_without(config, mesh, on_tpu, monkeypatch):
    monkeypatch.setattr(ring, "_MOST_GATHERED", 0)
    params = random_params(config)
    ids, mask = batch(config)
    want = loss_and_gradients(Decoder(config), params, ids, mask)
    mesh = as_mesh(mesh)
    if mesh is not None:
        params = jax.device_put(params, parameter_shardings(config, mesh, params))
    got = on_tpu(loss_and_gradients, Decoder(config, mesh=mesh), params, ids, mask)
    check(got, want)


def test_texts_in_a_row_on_tpu_kernels_equal_those_without(on_tpu):
    params = random_params(SLIDING)
    ids, mask = (x[:1] for x in batch(SLIDING))
    segments = np.repeat([[0, 1, 2]], [100, 90, 66], axis=1)
    positions = np.concatenate([np.arange(n) for n in (100, 90, 66)])[None]
    texts = {"segment_ids": segments, "positions": positions}
    run = functools.partial(loss_and_gradients, Decoder(SLIDING), params, ids, mask, **texts)
    check(on_tpu(run), run())


@pytest.mark.parametrize("config", [SLIDING, DUAL, LEAKY], ids=["sliding", "dual chunk", "leaky"])
def test_a_prompt_into_a_cache_on_tpu_kernels_equals_one_without(config, on_tpu):
    params, (ids, mask) = random_params(config), batch(config)

    @jax.jit
    def run(params):
        cache = init_cache(config, len(ids), T + 40, jnp.float32)
        apply = functools.partial(Decoder(config).apply, {"params": params})
        first = apply(ids[:, :60], mask[:, :60], cache=cache)
        out = apply(ids[:, 60:], mask[:, 60:], cache=first.cache)
        return out.logits[mask[:, 60:]]

    check(on_tpu(run.__wrapped__, params), run(params))


def test_groups_that_fall_give_no_numbers(on_tpu):
    """The third branch takes older groups to be the first keys."""
    params, (ids, mask) = random_params(DUAL), batch(DUAL)
    positions = np.tile(np.arange(T), (3, 1))
    positions[0, 200] = 3
    logits = on_tpu(
        lambda: Decoder(DUAL).apply({"params": params}, ids, mask, positions=positions).logits
    )
    assert np.isnan(logits[0, 250]).all()
    assert np.isfinite(logits[1:][mask[1:]]).all()


needs_libtpu = pytest.mark.skipif(not aot.has_compiler(), reason="needs libtpu")


@needs_libtpu
@pytest.mark.parametrize(
    "config, mode, mesh",
    [
        (WIDE, "train", "fsdp:2,tensor:2"),
        (WIDE, "train", "context:2,tensor:2"),
        (WIDE, "decode", "data:2,tensor:2"),
        (WIDER, "prefill", "data:2,tensor:2"),
        (
            dataclasses.replace(WIDE, dual_chunk=DualChunkSpec(768, 256, 512)),
            "prefill",
            "context:4",
        ),
        (dataclasses.replace(WIDE, far=FarSpec(512, 8.0)), "train", "context:2,tensor:2"),
    ],
    ids=[
        "train",
        "train over context",
        "decode",
        "prefill of wide heads",
        "prefill in chunks",
        "train with distant keys",
    ],
)
def test_models_compile_for_tpus_with_kernels(config, mode, mesh, monkeypatch):
    monkeypatch.setattr(ring, "_MOST_GATHERED", 0)
    texts = []
    compile_program = aot.compile_program

    def keep(lowered):
        compiled = compile_program(lowered)
        texts.append(compiled.hlo)
        return compiled

    monkeypatch.setattr(aot, "compile_program", keep)
    job = Job(
        config,
        read_topology("v5e:2x2"),
        tuple(read_mesh(mesh).items()),
        mode,
        4,
        2048,
        TrainOptions(),
    )
    plan = compile_plan(job, with_xla_flops=False)
    assert plan.fits
    kernels = {
        "train": ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"),
        "prefill": ("splash_mha_fwd",),
        "decode": ("ragged_paged_attention",),
    }
    for kernel in kernels[mode]:
        assert kernel in texts[0]
    # No scores of all queries and all keys.
    assert "2048,2048]" not in texts[0]


def test_a_model_lowered_for_a_gpu_calls_cudnn(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(attention, "kernels_on", lambda _: Kernels("gpu", 9.0))
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 90100)
    jax.clear_caches()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(WIDE))
    ids, _ = batch(WIDE)
    cache = init_cache(WIDE, 3, T, jnp.bfloat16)
    apply = functools.partial(Decoder(WIDE).apply, {"params": params})

    def text(ids, **more):
        traced = jax.jit(lambda ids: apply(ids, **more).logits).trace(ids)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    programs = [text(ids), text(ids[:, :1], cache=cache)]
    jax.clear_caches()
    for program in programs:
        assert "__cudnn$fmhaSoftmax" in program
