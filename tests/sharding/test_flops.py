"""Formulas against a count over the traced model, and both against products counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from configs.models import get_preset
from qwen_jax.config import HeadKind, LayerKind, ModelConfig
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.nn.attend import Mask, attend
from qwen_jax.nn.cache import init_cache
from qwen_jax.nn.kernels.paged import init_pages, paged_attend
from qwen_jax.nn.kernels.splash import splash_attend
from qwen_jax.nn.moe import Dispatch
from qwen_jax.sharding.flops import analytic_flops, count_flops, extrapolate, seen_pairs
from qwen_jax.training.stacking import segments

# Sides of blocks of scores: of attention block by block, and of plain attention in order.
BLOCK, ROWS = 256, 128


def model_of(preset, layers, **fields):
    """The first layers of a published model with a small vocabulary, so that layers matter."""
    config = get_preset(preset).with_layers(range(layers))
    return dataclasses.replace(config, vocab_size=512, **fields)


CASES = {
    "dense": model_of("qwen3-0.6b", 2),
    "experts": model_of("qwen3-30b-a3b", 2),
    "shared expert": model_of("qwen1.5-moe-a2.7b", 2),
    "hybrid": model_of("qwen3-next-80b-a3b-instruct", 4),
    "dense hybrid": model_of("qwen3.5-0.8b", 4),
    "score": model_of("qwen3-0.6b", 1, head=HeadKind.SCORE, num_labels=7),
    "two-layer score": model_of("qwen3-0.6b", 1, head=HeadKind.TWO_LAYER_SCORE, num_labels=7),
    "no head": model_of("qwen3-0.6b", 1, head=HeadKind.NONE),
}


def traced(config, mode, batch, length, turns=None):
    dispatch = None
    if config.moe is not None:
        dispatch = Dispatch.GATHER if mode == "decode" else Dispatch.RAGGED
        turns = batch * config.moe.num_experts_per_tok if mode == "decode" else turns
    model, params = Decoder(config, dispatch=dispatch), parameter_shapes(config)
    ids = jax.ShapeDtypeStruct((batch, 1 if mode == "decode" else length), jnp.int32)
    cache = None
    if mode == "decode":
        cache = jax.eval_shape(lambda: init_cache(config, batch, length, jnp.float32))

    def run(params, ids, cache):
        at = "all" if mode == "train" else "last"
        out = model.apply({"params": params}, ids, cache=cache, logits_at=at)
        return out.hidden_states[-1] if out.logits is None else out.logits

    def train(params, ids, cache):
        return jax.grad(lambda params: run(params, ids, cache).sum())(params)

    function = train if mode == "train" else run
    return count_flops(jax.make_jaxpr(function)(params, ids, cache), turns)


def unseen_flops(config, mode, batch, length):
    """What attention spends on keys that a query does not see: it meets all up to its block's end.

    A whole number of blocks.
    """
    blocks = length // ROWS
    pairs = batch * (ROWS**2 * blocks * (blocks + 1) // 2 - seen_pairs("prefill", length))
    layers = sum(kind is not LayerKind.LINEAR_ATTENTION for kind in config.layer_types)
    flops = 4 * config.num_attention_heads * config.head_dim * pairs * layers
    return flops * {"train": 3, "prefill": 1, "decode": 0}[mode]


@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
@pytest.mark.parametrize("case", CASES)
def test_the_formulas_give_what_the_traced_model_multiplies(case, mode):
    config = CASES[case]
    expected = sum(analytic_flops(config, mode, 2, 256).values())
    expected += unseen_flops(config, mode, 2, 256)
    # In linear attention, sums over a chunk without a term in the formula.
    bound = 1e-12 if config.delta is None else {"train": 1e-3, "prefill": 2e-4}.get(mode, 1e-12)
    np.testing.assert_allclose(traced(config, mode, 2, 256), expected, rtol=bound)


@pytest.mark.parametrize(("mode", "products"), [("prefill", 2), ("train", 7)])
def test_long_texts_multiply_whole_blocks_and_in_training_the_scores_twice(mode, products):
    """Of a block's keys all are met; the backward pass computes the scores again, of 7 products."""
    config, blocks = CASES["dense"], 8
    parts = analytic_flops(config, mode, 1, blocks * BLOCK)
    pairs = BLOCK**2 * blocks * (blocks + 1) // 2
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    parts["attention"] = products * 2 * heads * pairs
    count = traced(config, mode, 1, blocks * BLOCK, turns=(blocks + 1) / 2)
    np.testing.assert_allclose(count, sum(parts.values()), rtol=1e-3)


def test_a_sliding_window_leaves_its_pairs():
    window, length = 5, 32
    seen = sum(max(t - window, -1) < s <= t for t in range(length) for s in range(length))
    assert seen_pairs("prefill", length, window) == seen
    assert seen_pairs("prefill", length) == length * (length + 1) // 2
    assert seen_pairs("decode", length, window) == window
    full = model_of("qwen3-0.6b", 2)
    kinds = (LayerKind.SLIDING_ATTENTION, LayerKind.FULL_ATTENTION)
    sliding = dataclasses.replace(full, layer_types=kinds, sliding_window=window)
    heads = 4 * full.num_attention_heads * full.head_dim
    parts = analytic_flops(sliding, "prefill", 3, length)
    assert parts["attention"] == 3 * heads * (seen + length * (length + 1) // 2)


def test_remat_runs_the_layers_once_more_and_not_the_head():
    plain = analytic_flops(CASES["hybrid"], "train", 2, 64)
    remat = analytic_flops(CASES["hybrid"], "train", 2, 64, remat=True)
    assert remat["head"] == plain["head"]
    assert all(remat[part] == plain[part] * 4 / 3 for part in plain if part != "head")


def test_a_count_over_loops_branches_and_remat_is_the_sum_by_hand():
    x = jnp.ones((4, 4))

    def function(x, n):
        y, _ = jax.lax.scan(lambda y, _: (y @ x, None), x, None, length=5)
        y = jax.lax.cond(n > 1, lambda y: y @ x @ x, lambda y: y @ x, y)
        y = jax.lax.fori_loop(0, n, lambda _, y: y @ x, y)
        return jnp.sum(jax.jit(lambda y: y @ x)(y))

    one = 2 * 4**3
    jaxpr = jax.make_jaxpr(function)(x, 3)
    assert count_flops(jaxpr, turns=3) == (5 + 2 + 3 + 1) * one
    with pytest.raises(ValueError, match="`turns`"):
        count_flops(jaxpr)

    def loss(x, function):
        return jnp.sum(function(x @ x))

    def block(y):
        return jnp.sin(y @ y)

    plain = count_flops(jax.make_jaxpr(jax.grad(lambda x: loss(x, block)))(x))
    remat = count_flops(jax.make_jaxpr(jax.grad(lambda x: loss(x, jax.checkpoint(block))))(x))
    assert (plain, remat) == (6 * one, 7 * one)


def test_a_count_inside_shard_map_is_of_all_devices():
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    mesh = jax.sharding.AbstractMesh((4,), ("a",))
    spec = jax.P("a")
    sharded = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    count = count_flops(jax.make_jaxpr(sharded)(jax.ShapeDtypeStruct((8, 6), jnp.float32)))
    assert count == 4 * 2 * 2 * 6 * 2


def test_figures_extrapolate_over_patterns_that_repeat():
    kinds = (LayerKind.SLIDING_ATTENTION,) * 3 + (LayerKind.FULL_ATTENTION,) * 4
    config = dataclasses.replace(CASES["dense"], layer_types=kinds, sliding_window=8)
    for each in (config, get_preset("qwen3-next-80b-a3b-instruct")):

        def figure(model: ModelConfig):
            return sum(analytic_flops(model, "prefill", 1, 64).values())

        np.testing.assert_allclose(
            extrapolate(each, segments(each), figure), figure(each), rtol=1e-12
        )


def test_kernels_take_the_products_of_the_function_that_they_stand_for():
    q, k = (jnp.zeros((2, 256, heads, 128)) for heads in (4, 2))
    mask = Mask(jnp.tile(jnp.arange(256), (2, 1)))

    def count(function, *arguments, **options):
        return count_flops(jax.make_jaxpr(function)(*arguments), **options)

    def plain(q, k, v):
        return attend(q, k, v, mask, method="plain")[0].sum()

    forward = count(plain, q, k, k)
    for in_order in (True, False):

        def by_kernel(q, k, v, in_order=in_order):
            return splash_attend(q, k, v, mask, in_order=in_order)[0].sum()

        assert count(by_kernel, q, k, k) == forward
        assert count(by_kernel, q, k, k, seen=0.75) == 0.75 * forward
        # A gradient has 4 products for the 2 of the forward pass; the kernels, which keep no
        # scores, compute two of theirs twice more, and one once more.
        assert count(jax.grad(plain, (0, 1, 2)), q, k, k) == 3 * forward
        assert count(jax.grad(by_kernel, (0, 1, 2)), q, k, k) == 4.5 * forward


def test_decoding_over_pages_takes_the_products_of_all_slots():
    q, k = jnp.zeros((2, 1, 4, 128)), jnp.zeros((2, 512, 2, 128))
    slots = jnp.zeros((2, 1), jnp.int32)
    pages = init_pages(2, 512, 2, 128, jnp.float32)
    kernel = jax.make_jaxpr(lambda q, pages: paged_attend(q, pages, slots, 2))(q, pages)
    plain = jax.make_jaxpr(lambda q, k: attend(q, k, k, Mask(slots))[0])(q, k)
    assert count_flops(kernel) == count_flops(plain) > 0


def test_a_kernel_that_is_not_known_is_named():
    def double(x):
        def kernel(x_ref, y_ref):
            y_ref[...] = 2 * x_ref[...]

        return pl.pallas_call(kernel, out_shape=x, name="doubling")(x)

    with pytest.raises(ValueError, match="kernel doubling takes is not known"):
        count_flops(jax.make_jaxpr(double)(jnp.zeros(8)))
