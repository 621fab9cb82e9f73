"""The router and every way of running experts, against float64 loops and transformers' blocks."""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
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
from qwen_jax.nn import moe
from qwen_jax.nn.moe import (
    Dispatch,
    Routing,
    capacity_of,
    choose_dispatch,
    limit_capacity,
    mix_experts,
    route,
)
from qwen_jax.nn.sparse_moe import SparseMoe

D, F = 16, 10
BLOCKS = (Dispatch.SORTED, Dispatch.GATHER)
REFERENCES = {
    "qwen2_moe": (transformers.Qwen2MoeConfig, Qwen2MoeSparseMoeBlock),
    "qwen3_moe": (transformers.Qwen3MoeConfig, Qwen3MoeSparseMoeBlock),
    "qwen3_next": (transformers.Qwen3NextConfig, Qwen3NextSparseMoeBlock),
}


def make_spec(E=6, k=2, renormalise=True, shared=None):
    return MoeSpec((0,), E, k, F, renormalise, shared)


def random_layer(spec, num_tokens, seed=0):
    """Tokens, router and experts, outputs of unit scale."""
    rng = np.random.default_rng(seed)
    E = spec.num_experts

    def draw(*shape):
        return (rng.standard_normal(shape) * 2 / shape[-1] ** 0.5).astype(np.float32)

    experts = {
        "gate_proj": draw(E, F, D),
        "up_proj": draw(E, F, D),
        "down_proj": draw(E, D, F),
    }
    return draw(num_tokens, D) * D**0.5 / 2, draw(E, D), experts


@functools.partial(jax.jit, static_argnames=("spec", "method", "capacity"))
def run(x, router, experts, spec, method, real=None, capacity=None):
    """Router and experts; `CAPACITY` with room for all unless told otherwise."""
    routing = route(x, router, spec, real)
    if method is Dispatch.CAPACITY:
        capacity = capacity or len(x)
        routing = limit_capacity(routing, capacity, real)
    return mix_experts(x, routing, experts, method, capacity), routing


def brute_force(x, router, experts, spec, capacity=None, real=None):
    """Output, counts and drops of a loop over tokens in float64."""
    x, router = x.astype(np.float64), router.astype(np.float64)
    experts = {name: leaf.astype(np.float64) for name, leaf in experts.items()}
    out, counts, dropped = np.zeros_like(x), np.zeros(spec.num_experts, int), 0
    for n, token in enumerate(x):
        if real is not None and not real[n]:
            continue
        p = np.exp(router @ token)
        p /= p.sum()
        chosen = np.argsort(-p)[: spec.num_experts_per_tok]
        total = p[chosen].sum() if spec.renormalise else 1
        for e in chosen:
            counts[e] += 1
            if capacity is not None and counts[e] > capacity:
                dropped += 1
                continue
            gate = experts["gate_proj"][e] @ token
            hidden = gate / (1 + np.exp(-gate)) * (experts["up_proj"][e] @ token)
            out[n] += p[e] / total * (experts["down_proj"][e] @ hidden)
    return out, counts, dropped


def close(ours, expected, tolerance=5e-6):
    expected = np.asarray(expected)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


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
    model = SparseMoe(make_config(spec), method, factor)

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
    model = SparseMoe(make_config(spec), method, factor)
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


@pytest.mark.parametrize("method", BLOCKS)
def test_gradients_are_summed_in_float32_over_the_blocks_of_an_expert(method):
    """Each token pulls the same way, so that a sum in bfloat16 would stop growing."""
    spec = make_spec(1, 1, renormalise=False)
    _, router, experts = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), random_layer(spec, 1))
    x = jnp.broadcast_to(random_layer(spec, 1)[0], (2048, D)).astype(jnp.bfloat16)

    def loss(experts):
        y = run(x, router, experts, spec, method)[0]
        return jnp.sum(y.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))(experts)

    def single(experts):
        return jnp.sum(run(x[:1], router, experts, spec, Dispatch.DENSE)[0].astype(jnp.float32))

    # One token's gradient, from the same bfloat16 products, 2048 times.
    one = jax.jit(jax.grad(single))(experts)
    expected = jax.tree.map(lambda a: 2048 * np.asarray(a, np.float32), one)
    jax.tree.map(lambda a, b: close(np.asarray(a, np.float32), b, 1e-2), gradient, expected)


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
    for factor in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=f"^capacity_factor = {factor} must be above 0"):
            capacity_of(8, make_spec(), factor)


def test_capacity_and_its_factor_belong_to_one_method():
    spec = make_spec()
    x, router, experts = random_layer(spec, 4)
    routing = route(x, router, spec)
    with pytest.raises(ValueError, match="capacity = None with dispatch 'capacity'"):
        mix_experts(x, routing, experts, Dispatch.CAPACITY)
    with pytest.raises(ValueError, match="capacity = 4 with dispatch 'sorted'"):
        mix_experts(x, routing, experts, Dispatch.SORTED, 4)
    for method, factor in ((Dispatch.CAPACITY, None), (Dispatch.DENSE, 1.0)):
        with pytest.raises(UserError, match="give a factor with dispatch = capacity, and only the"):
            SparseMoe(make_config(spec), method, factor).init(jax.random.key(0), x[None])


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


def equations(jaxpr, loops=0):
    """The equations of a program and of those inside of it, and how many loops each stands in."""
    for equation in jaxpr.eqns:
        parts = jax.tree.leaves(
            equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        )
        programs = [
            part for part in (getattr(v, "jaxpr", v) for v in parts) if hasattr(part, "eqns")
        ]
        if not programs:
            yield equation, loops
        for program in programs:
            yield from equations(program, loops + (equation.primitive.name == "while"))


def arrays(method, gradient):
    """(elements, the operation's name, loops it stands in) of each array that a step makes.

    Of 128 experts and 200 tokens.
    """
    spec = MoeSpec((0,), 128, 2, 5, True)
    x, experts = jnp.ones((200, 6)), {"gate_proj": jnp.ones((128, 5, 6))}
    experts |= {"up_proj": experts["gate_proj"], "down_proj": jnp.ones((128, 6, 5))}
    routing = route(x, jnp.ones((128, 6)), spec)

    def loss(x, weights, experts):
        return jnp.sum(mix_experts(x, routing.replace(weights=weights), experts, method))

    function = jax.grad(loss, argnums=(0, 1, 2)) if gradient else loss
    jaxpr = jax.make_jaxpr(function)(x, routing.weights, experts)
    for equation, loops in equations(jaxpr.jaxpr):
        for variable in equation.outvars:
            elements = np.prod(variable.aval.shape, dtype=int)
            yield elements, equation.primitive.name, loops


@pytest.mark.parametrize("gradient", [False, True])
def test_blocks_hold_nothing_of_size_experts_times_tokens(gradient):
    for method in BLOCKS:
        # The largest array is that of the weights' gradient, or of the tokens.
        largest = max(elements for elements, _, _ in arrays(method, gradient))
        assert largest == (128 * 5 * 6 if gradient else 200 * 6)
    assert max(arrays(Dispatch.DENSE, gradient))[0] >= 128 * 200 * 6


@pytest.mark.parametrize("method", BLOCKS)
def test_a_block_writes_the_gradient_of_one_expert_only(method):
    """Not those of all experts, zero but for one, to be added up."""
    in_loops = [(n, name) for n, name, loops in arrays(method, gradient=True) if loops]
    whole = {name for n, name in in_loops if n == 128 * 5 * 6}
    assert whole == {"dynamic_update_slice"}


def temporaries(E, gradient):
    """Bytes that the compiled `SORTED` takes beside arguments and results, and of the weights."""
    spec = MoeSpec((0,), E, 2, 32, True)
    x, router = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (E, 64)))
    shapes = {"gate_proj": (E, 32, 64), "up_proj": (E, 32, 64), "down_proj": (E, 64, 32)}
    experts = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

    def loss(x, router, experts):
        return jnp.sum(run(x, router, experts, spec, Dispatch.SORTED)[0] ** 2)

    function = jax.grad(loss, argnums=(0, 1, 2)) if gradient else loss
    compiled = jax.jit(function).lower(x, router, experts).compile()
    return compiled.memory_analysis().temp_size_in_bytes, E * 3 * 32 * 64 * 4


@pytest.mark.parametrize("gradient", [False, True])
def test_sorted_takes_the_memory_of_a_few_experts(gradient):
    few, weights_of_few = temporaries(32, gradient)
    many, weights_of_many = temporaries(128, gradient)
    # Beside the router's logits and the table of blocks, E does not show.
    assert many - few < 0.05 * (weights_of_many - weights_of_few)
    assert many < 0.25 * weights_of_many


@pytest.mark.parametrize("method", BLOCKS)
def test_blocks_read_the_chosen_experts_only(method):
    spec = make_spec(60, 4)
    x, router, experts = random_layer(spec, 5)
    _, counts, _ = brute_force(x, router, experts, spec)
    unread = counts == 0
    assert 40 <= unread.sum() < 60
    poisoned = jax.tree.map(lambda a: np.where(unread[:, None, None], np.nan, a), experts)

    def loss(experts):
        y, _ = run(x, router, experts, spec, method)
        return jnp.sum(y**2), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(poisoned)
    close(y, run(x, router, experts, spec, Dispatch.DENSE)[0])
    for leaf in gradient.values():
        assert np.isfinite(leaf).all()
        assert not np.any(leaf[unread])
        assert np.all(np.any(leaf[~unread], axis=(1, 2)))


@flax.struct.dataclass
class Packed:
    """A weight as integers and a scale for each of its rows."""

    codes: jax.Array
    scale: jax.Array


@pytest.mark.parametrize("method", BLOCKS)
def test_a_leaf_may_be_a_pytree_with_integers(method, monkeypatch):
    spec = make_spec(6, 2)
    x, router, experts = random_layer(spec, 9)
    rng = np.random.default_rng(6)
    packed = {
        name: Packed(rng.integers(-9, 9, a.shape, np.int8), np.abs(a[..., :1]) / 9 + 0.01)
        for name, a in experts.items()
    }
    dense = {name: leaf.codes * leaf.scale for name, leaf in packed.items()}
    plain = moe.linear

    def linear(x, leaf):
        return plain(x, leaf.codes * leaf.scale if isinstance(leaf, Packed) else leaf)

    monkeypatch.setattr(moe, "linear", linear)

    def loss(x, router, scales, method):
        leaves = {name: Packed(packed[name].codes, scale) for name, scale in scales.items()}
        if method is Dispatch.DENSE:
            leaves = {name: leaf.codes * leaf.scale for name, leaf in leaves.items()}
        y = mix_experts(x, route(x, router, spec), leaves, method)
        return jnp.sum(y**2), y

    scales = {name: leaf.scale for name, leaf in packed.items()}
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    (_, y), ours = gradient(x, router, scales, method)
    close(y, brute_force(x, router, dense, spec)[0])
    jax.tree.map(close, ours, gradient(x, router, scales, Dispatch.DENSE)[1])


@pytest.mark.parametrize(
    ("num_tokens", "platform", "expected"),
    [
        (1, "cpu", Dispatch.GATHER),
        (16, "cpu", Dispatch.GATHER),
        (17, "cpu", Dispatch.SORTED),
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
