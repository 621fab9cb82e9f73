"""The router and every way of running experts, against float64 loops and transformers' blocks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from qwen_jax.config import LayerKind, ModelConfig, MoeSpec
from qwen_jax.errors import UserError
from qwen_jax.nn.moe import Dispatch, choose_dispatch, mix_experts
from qwen_jax.nn.router import RouterOptions, Routing, capacity_of, limit_capacity, route
from qwen_jax.nn.sparse_moe import SparseMoe
from tests.nn.expert_layers import (
    BLOCKS,
    D,
    F,
    brute_force,
    close,
    make_spec,
    random_layer,
    run,
)

REFERENCES = {
    "qwen2_moe": (transformers.Qwen2MoeConfig, Qwen2MoeSparseMoeBlock),
    "qwen3_moe": (transformers.Qwen3MoeConfig, Qwen3MoeSparseMoeBlock),
    "qwen3_next": (transformers.Qwen3NextConfig, Qwen3NextSparseMoeBlock),
}


CASES = {
    "plain": (make_spec(6, 2), 37),
    "not renormalised": (make_spec(6, 3, renormalise=False), 37),
    "sixty experts, most in use": (make_spec(60, 4, renormalise=False), 37),
    "more experts than choices": (make_spec(60, 4), 3),
    "one choice": (make_spec(6, 1, renormalise=False), 21),
    "one choice, renormalised": (make_spec(6, 1), 21),
    "all experts": (make_spec(5, 5, renormalise=False), 19),
    "one expert": (make_spec(1, 1, renormalise=False), 19),
    "one token": (make_spec(8, 3), 1),
    "full blocks": (make_spec(4, 4), 64),
}


@pytest.mark.parametrize("method", Dispatch)
@pytest.mark.parametrize("case", CASES)
def test_every_method_equals_a_loop_over_tokens(case, method):
    spec, num_tokens = CASES[case]
    layer = random_layer(spec, num_tokens)
    expected, counts, _ = brute_force(*layer, spec)
    y, routing = run(*layer, spec, method)
    close(y, expected)
    np.testing.assert_array_equal(routing.counts, counts)
    assert routing.dropped == 0
    assert (y.dtype, routing.experts.dtype, routing.counts.dtype) == ("float32", "int32", "int32")


@pytest.mark.parametrize("method", Dispatch)
def test_all_tokens_may_choose_the_same_experts(method):
    spec = make_spec(6, 2)
    x, router, experts = random_layer(spec, 37)
    # Positive tokens: two experts are always the likeliest, the other four have no token.
    x, router = np.abs(x), router - 1.0
    router[3] += 3.0
    router[1] += 2.0
    expected, counts, _ = brute_force(x, router, experts, spec)
    assert counts.tolist() == [0, 37, 0, 37, 0, 0]
    close(run(x, router, experts, spec, method)[0], expected)


@pytest.mark.parametrize("renormalise", [False, True])
def test_weights_are_sorted_and_sum_to_one_only_when_renormalised(renormalise):
    spec = make_spec(60, 4, renormalise)
    x, router, _ = random_layer(spec, 50)
    routing = route(x, router, spec)
    logits = torch.as_tensor(x) @ torch.as_tensor(router).T
    values, indices = torch.topk(torch.softmax(logits, -1), 4)
    if renormalise:
        values /= values.sum(-1, keepdim=True)
    np.testing.assert_array_equal(routing.experts, indices)
    np.testing.assert_allclose(routing.weights, values, rtol=2e-6)
    assert np.all(np.diff(routing.weights, axis=-1) <= 0)
    sums = np.asarray(routing.weights.sum(-1))
    assert np.all(np.abs(sums - 1) < 1e-6) if renormalise else np.all(sums < 0.99)


def random_reference(family, renormalise):
    """A block of transformers, all of its tensors random, and what it is in our words."""
    make_config, make_block = REFERENCES[family]
    config = make_config(
        hidden_size=D,
        moe_intermediate_size=F,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=renormalise,
        **({} if family == "qwen3_moe" else {"shared_expert_intermediate_size": 14}),
    )
    config._experts_implementation = "eager"
    torch.manual_seed(1)
    block = make_block(config)
    for parameter in block.parameters():
        parameter.data = 2 * torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
    spec = make_spec(6, 3, renormalise, None if family == "qwen3_moe" else 14)
    return block, spec


def to_params(tensors):
    """Our parameter tree of a transformers block's tensors, or of their gradients."""
    tensors = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    gate, up = np.split(tensors.pop("experts.gate_up_proj"), 2, axis=1)
    stacks = {"gate_proj": gate, "up_proj": up, "down_proj": tensors.pop("experts.down_proj")}
    params = {"experts": {name: {"weight": stack} for name, stack in stacks.items()}}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[last] = tensor
    return params


def make_config(spec, **fields):
    return ModelConfig(
        **{
            "family": "any",
            "vocab_size": 8,
            "hidden_size": D,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "layer_types": (LayerKind.FULL_ATTENTION,),
            "moe": spec,
            **fields,
        }
    )


def detached(block):
    return {name: tensor.detach() for name, tensor in block.state_dict().items()}


@pytest.mark.parametrize("method", Dispatch)
@pytest.mark.parametrize(
    ("family", "renormalise"),
    [("qwen2_moe", False), ("qwen3_moe", True), ("qwen3_next", True), ("qwen3_moe", False)],
)
def test_output_and_gradients_equal_transformers(family, renormalise, method):
    block, spec = random_reference(family, renormalise)
    rng = np.random.default_rng(2)
    x, cotangent = rng.standard_normal((2, 2, 13, D)).astype(np.float32)
    x_torch = torch.tensor(x, requires_grad=True)
    expected = block(x_torch)
    expected.backward(torch.as_tensor(cotangent))

    factor = 2.0 if method is Dispatch.CAPACITY else None  # k = 3 of 6: room for all.
    model = SparseMoe(make_config(spec), method, RouterOptions(capacity_factor=factor))

    def loss(params, x):
        y, routing = model.apply({"params": params}, x)
        return jnp.sum(y * cotangent), (y, routing.dropped)

    params = to_params(detached(block))
    run_both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (y, dropped)), (gradients, dx) = run_both(params, x)
    assert dropped == 0
    close(y, expected.detach())
    close(dx, x_torch.grad)
    wanted = to_params({name: p.grad for name, p in block.named_parameters()})
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    jax.tree.map(close, gradients, wanted)


@pytest.mark.parametrize("method", Dispatch)
def test_bfloat16_is_no_further_from_the_truth_than_transformers(method):
    block, spec = random_reference("qwen2_moe", renormalise=False)
    block = block.to(torch.bfloat16)
    x = torch.randn((1, 64, D), generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    with torch.no_grad():
        _, _, chosen = block.gate(x)
        theirs = block(x).float().numpy()[0]
        truth = block.float()(x.float()).numpy()[0]
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), to_params(detached(block)))
    factor = 2.0 if method is Dispatch.CAPACITY else None
    model = SparseMoe(make_config(spec), method, RouterOptions(capacity_factor=factor))
    x = jnp.asarray(x.float().numpy(), jnp.bfloat16)
    y, routing = jax.jit(model.apply)({"params": params}, x)
    assert y.dtype == routing.logits.dtype == routing.weights.dtype == jnp.bfloat16
    # A logit rounded the other way may change the choice: then the outputs differ rightly.
    same = np.all(np.asarray(routing.experts[0]) == chosen.numpy(), axis=-1)
    assert same.mean() > 0.9
    ours = np.asarray(y[0], np.float32)

    def error(out):
        return np.sqrt(np.mean((out - truth)[same] ** 2))

    assert error(ours) < 1.1 * error(theirs)


@pytest.mark.parametrize("method", Dispatch)
@pytest.mark.parametrize("case", ["sixty experts, most in use", "one token", "full blocks"])
def test_gradients_of_every_method_equal_those_of_dense(case, method):
    spec, num_tokens = CASES[case]
    layer = random_layer(spec, num_tokens)
    cotangent = random_layer(spec, num_tokens, seed=5)[0]

    def loss(x, router, experts, method):
        return jnp.sum(run(x, router, experts, spec, method)[0] * cotangent)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    jax.tree.map(close, gradient(*layer, method), gradient(*layer, Dispatch.DENSE))


@pytest.mark.parametrize("method", Dispatch)
def test_a_single_renormalised_choice_gives_the_router_no_gradient(method):
    spec = make_spec(6, 1, renormalise=True)
    x, router, experts = random_layer(spec, 21)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(router, spec):
        return jnp.sum(run(x, router, experts, spec, method)[0])

    assert np.abs(gradient(router, spec)).max() < 1e-5
    free = dataclasses.replace(spec, renormalise=False)
    assert np.abs(gradient(router, free)).max() > 1e-2


@pytest.mark.parametrize("capacity", [1, 3, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity_drops_the_last_tokens_and_counts_them(capacity, padded):
    spec = make_spec(6, 2)
    layer = random_layer(spec, 37)
    real = np.random.default_rng(4).random(37) < 0.6 if padded else None
    expected, counts, dropped = brute_force(*layer, spec, capacity, real)
    assert dropped
    y, _ = run(*layer, spec, Dispatch.CAPACITY, real, capacity)
    close(y, expected)
    limited = limit_capacity(route(*layer[:2], spec, real), capacity, real)
    assert limited.dropped == dropped == np.maximum(counts - capacity, 0).sum()
    np.testing.assert_array_equal(limited.counts, counts)
    # What was dropped is dropped for every method.
    for method in (Dispatch.DENSE, Dispatch.RAGGED, *BLOCKS):
        mixed = jax.jit(mix_experts, static_argnames="method")
        close(mixed(layer[0], limited, layer[2], method=method), expected)


def test_capacity_is_the_even_share_times_the_factor_rounded_up():
    assert capacity_of(100, make_spec(60, 4), 1.0) == 7
    assert capacity_of(60, make_spec(60, 4), 1.25) == 5
    assert capacity_of(1, make_spec(60, 4), 1.25) == 1


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_is_none_is_refused(factor):
    with pytest.raises(UserError, match=f"^capacity_factor = {factor} must be "):
        RouterOptions(capacity_factor=factor)


def test_capacity_and_its_factor_belong_to_one_method():
    spec = make_spec()
    x, router, experts = random_layer(spec, 4)
    routing = route(x, router, spec)
    with pytest.raises(ValueError, match="capacity = None with dispatch 'capacity'"):
        mix_experts(x, routing, experts, Dispatch.CAPACITY)
    with pytest.raises(ValueError, match="capacity = 4 with dispatch 'sorted'"):
        mix_experts(x, routing, experts, Dispatch.SORTED, 4)
    for method, factor in ((Dispatch.CAPACITY, None), (Dispatch.DENSE, 1.0)):
        model = SparseMoe(make_config(spec), method, RouterOptions(capacity_factor=factor))
        with pytest.raises(UserError, match="give a factor with dispatch = capacity, and only the"):
            model.init(jax.random.key(0), x[None])


def test_padding_is_not_counted_and_changes_no_real_token():
    spec = make_spec(6, 2)
    x, router, experts = random_layer(spec, 37)
    real = np.random.default_rng(4).random(37) < 0.6
    for method in (Dispatch.DENSE, Dispatch.RAGGED, *BLOCKS):
        y, routing = run(x, router, experts, spec, method, real)
        alone, _ = run(x[real], router, experts, spec, method)
        close(y[real], alone)
        chosen = np.asarray(routing.experts)[real]
        np.testing.assert_array_equal(routing.counts, np.bincount(chosen.ravel(), minlength=6))


@pytest.mark.parametrize(
    ("num_tokens", "platform", "expected"),
    [
        (1, "cpu", Dispatch.SORTED),
        (16, "gpu", Dispatch.GATHER),
        (17, "gpu", Dispatch.SORTED),
        (16, "tpu", Dispatch.GATHER),
        (17, "tpu", Dispatch.SORTED),
        (2047, "tpu", Dispatch.SORTED),
        (2048, "tpu", Dispatch.RAGGED),
        (2048, "gpu", Dispatch.SORTED),
    ],
)
def test_the_default_gathers_until_experts_repeat_and_never_drops(num_tokens, platform, expected):
    spec = MoeSpec((0,), 128, 8, F, True)
    assert choose_dispatch(num_tokens, spec, platform) is expected
    # Experts in few bits are not unpacked all at once.
    unpacks_few = Dispatch.SORTED if expected is Dispatch.RAGGED else expected
    assert choose_dispatch(num_tokens, spec, platform, packed=True) is unpacks_few


def test_the_module_declares_published_names_and_trains_under_jit():
    config = make_config(make_spec(6, 2, shared=14))
    model = nn.jit(SparseMoe)(config)
    x = random_layer(config.moe, 8)[0].reshape(2, 4, D)
    params = model.init(jax.random.key(0), x)["params"]
    shapes = {
        "/".join(p.key for p in path): a.shape for path, a in jax.tree.leaves_with_path(params)
    }
    assert shapes == {
        "gate/weight": (6, D),
        "experts/gate_proj/weight": (6, F, D),
        "experts/up_proj/weight": (6, F, D),
        "experts/down_proj/weight": (6, D, F),
        "shared_expert/gate_proj/weight": (14, D),
        "shared_expert/up_proj/weight": (14, D),
        "shared_expert/down_proj/weight": (D, 14),
        "shared_expert_gate/weight": (1, D),
    }
    assert all(0.01 < np.std(leaf) < 0.03 for leaf in jax.tree.leaves(params))
    real = np.arange(8).reshape(2, 4) < 7

    def loss(params):
        y, routing = model.apply({"params": params}, x, real)
        return jnp.sum(y**2) + jnp.sum(jax.nn.logsumexp(routing.logits, axis=-1)), routing

    gradient, routing = jax.grad(loss, has_aux=True)(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert isinstance(routing, Routing)
    assert (routing.logits.shape, routing.experts.shape) == ((2, 4, 6), (2, 4, 2))
    assert routing.counts.sum() == 7 * 2
