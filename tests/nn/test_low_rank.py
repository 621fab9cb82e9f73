"""Weights with a low-rank update: products against PEFT's, experts against merged ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from jax.extend.core import jaxprs_in_params

from qwen_jax.errors import UserError
from qwen_jax.nn.linear import linear
from qwen_jax.nn.low_rank import (
    LowRankWeight,
    attach,
    cast,
    detach,
    merge,
    unmerge,
)
from qwen_jax.nn.moe import Dispatch, mix_experts
from qwen_jax.nn.quantized import dequantize, quantize
from qwen_jax.nn.router import Routing, limit_capacity
from qwen_jax.sharding.axes import parameter_axes

E, K, D, F, R, N = 5, 2, 16, 8, 3, 23
RNG = np.random.default_rng(0)


def draw(*shape):
    return (RNG.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)


def low_rank(*shape, base=None):
    *outer, n_out, n_in = shape
    base = draw(*shape) if base is None else base
    scale = RNG.uniform(0.5, 2, outer).astype(np.float32)
    return LowRankWeight(base, draw(*outer, R, n_in), draw(*outer, n_out, R), scale)


def by_hand(leaf):
    """The weight in float64."""
    base = leaf.base if isinstance(leaf.base, np.ndarray) else dequantize(leaf.base, jnp.float32)
    base, a, b, scale = (np.asarray(x, np.float64) for x in (base, leaf.a, leaf.b, leaf.scale))
    return base + scale[..., None, None] * (b @ a)


def close(ours, expected, tolerance=5e-6):
    expected = np.asarray(expected)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_a_product_is_that_of_peft_in_every_dtype(base, adapter):
    module = torch.nn.Sequential(torch.nn.Linear(D, F))
    config = peft.LoraConfig(r=R, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(module, config).base_model.model[0]
    layer.base_layer.to(getattr(torch, base))
    for part in (layer.lora_A, layer.lora_B):
        part.to(getattr(torch, adapter))
    torch.manual_seed(1)
    x = torch.randn(N, D).to(getattr(torch, base))
    with torch.no_grad():
        expected = layer(x)

    def ours(tensor):
        return jnp.asarray(tensor.detach().float().numpy(), str(tensor.dtype).split(".")[1])

    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    leaf = LowRankWeight(ours(weight), ours(a), ours(b), jnp.float32(5 / R))
    y = linear(ours(x), leaf, ours(bias))
    assert str(y.dtype) == base
    # The sums of products are rounded to bfloat16 in another order at most.
    close(np.asarray(y, np.float32), expected.float(), 1e-6 if base == "float32" else 4e-3)


def make_experts(bits=None):
    shapes = {"gate_proj": (E, F, D), "up_proj": (E, F, D), "down_proj": (E, D, F)}
    experts = {}
    for name, shape in shapes.items():
        base = None if bits is None else quantize(draw(*shape), bits, 8)
        experts[name] = low_rank(*shape, base=base)
    return experts


@functools.partial(jax.jit, static_argnames="method")
def run(x, logits, experts, method):
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), K)
    none = jnp.zeros((), jnp.int32)
    routing = Routing(logits, chosen.astype(jnp.int32), weights, jnp.zeros(E, jnp.int32), none)
    capacity = None
    if method is Dispatch.CAPACITY:
        capacity = len(x)
        routing = limit_capacity(routing, capacity)
    return mix_experts(x, routing, experts, method, capacity)


def merged_experts(experts):
    return {name: by_hand(leaf).astype(np.float32) for name, leaf in experts.items()}


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("method", Dispatch)
def test_every_dispatch_runs_experts_with_updates_as_if_they_were_merged(method, bits):
    experts = make_experts(bits)
    x, logits = draw(N, D) * 4, draw(N, E) * 4
    expected = run(x, logits, merged_experts(experts), Dispatch.DENSE)
    close(run(x, logits, experts, method), expected)


@pytest.mark.parametrize("method", Dispatch)
def test_gradients_of_updates_are_those_of_the_merged_weights(method):
    experts = make_experts()
    x, logits, weigh = draw(N, D) * 4, draw(N, E) * 4, draw(N, D)
    bases = {name: leaf.base for name, leaf in experts.items()}
    updates = {name: (leaf.a, leaf.b) for name, leaf in experts.items()}

    def loss(updates):
        leaves = {
            name: experts[name].replace(base=bases[name], a=a, b=b)
            for name, (a, b) in updates.items()
        }
        return jnp.sum(run(x, logits, leaves, method) * weigh)

    ours = jax.jit(jax.grad(loss))(updates)
    wanted = jax.grad(lambda w: jnp.sum(run(x, logits, w, Dispatch.DENSE) * weigh))(
        merged_experts(experts)
    )
    for name, leaf in experts.items():
        dw = leaf.scale[:, None, None] * np.asarray(wanted[name])
        close(ours[name][0], np.swapaxes(leaf.b, 1, 2) @ dw, 2e-5)
        close(ours[name][1], dw @ np.swapaxes(leaf.a, 1, 2), 2e-5)


def shapes_in_loops(jaxpr):
    """Shapes that the loops of a jaxpr carry, those of jaxprs within included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield from (out.aval.shape for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_in_loops(inner)


def test_no_gradient_is_made_of_frozen_experts():
    experts = make_experts()
    x, logits = draw(N, D), draw(N, E)

    def loss(part, name):
        return jnp.sum(run(x, logits, {**experts, "up_proj": part(name)}, Dispatch.SORTED))

    leaf = experts["up_proj"]
    of_update = jax.make_jaxpr(jax.grad(lambda b: loss(lambda b: leaf.replace(b=b), b)))(leaf.b)
    of_base = jax.make_jaxpr(jax.grad(lambda w: loss(lambda w: leaf.replace(base=w), w)))(leaf.base)
    assert (E, F, D) not in set(shapes_in_loops(of_update.jaxpr))
    assert (E, F, D) in set(shapes_in_loops(of_base.jaxpr))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_base_is_added_to_as_it_is_dequantised(bits):
    leaf = low_rank(12, D, base=quantize(draw(12, D), bits, 8))
    x = draw(N, D)
    close(linear(x, leaf), x @ by_hand(leaf).T)
    assert leaf.shape == (12, D)
    assert leaf.ndim == 2
    assert leaf.dtype == np.float32


def tree():
    return {
        "q": {"weight": draw(6, D), "bias": draw(6)},
        "experts": {"weight": draw(E, F, D)},
        "norm": {"weight": draw(D)},
    }


def adapter_for(params):
    return {
        name: {"weight": low_rank(*params[name]["weight"].shape).replace(base=None)}
        for name in ("q", "experts")
    }


def test_an_adapter_is_laid_over_and_taken_off_without_copies():
    params = tree()
    adapter = adapter_for(params)
    over = attach(params, adapter)
    assert over["q"]["weight"].base is params["q"]["weight"]
    assert over["norm"]["weight"] is params["norm"]["weight"]
    plain, off = detach(over)
    for ours, expected in ((plain, params), (off, adapter)):
        assert jax.tree.structure(ours) == jax.tree.structure(expected)
        assert all(map(lambda a, b: a is b, jax.tree.leaves(ours), jax.tree.leaves(expected)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_rounds_the_exact_sum_once(dtype):
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), tree())
    over = attach(params, adapter_for(params))
    merged = merge(over)
    for name in ("q", "experts"):
        leaf = over[name]["weight"]
        exact = by_hand(leaf.replace(base=np.asarray(leaf.base, np.float32)))
        assert merged[name]["weight"].dtype == dtype
        # A float32 sum of products before the rounding to bfloat16 moves few of its ties.
        ours = np.asarray(merged[name]["weight"], np.float32)
        expected = np.asarray(jnp.asarray(exact, jnp.float32).astype(dtype), np.float32)
        if dtype == "bfloat16":
            assert np.mean(ours == expected) > 0.99
        else:
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
    assert merged["norm"]["weight"] is params["norm"]["weight"]


def test_unmerging_gives_back_base_and_adapter():
    params = tree()
    adapter = adapter_for(params)
    back, off = detach(unmerge(merge(attach(params, adapter)), adapter))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), back, params)
    jax.tree.map(np.testing.assert_array_equal, off, adapter)


def test_merging_makes_a_packed_base_dense():
    packed = quantize(draw(12, D), 4, 8)
    leaf = low_rank(12, D, base=packed)
    merged = merge({"q": {"weight": leaf}, "k": {"weight": packed}}, jnp.bfloat16)
    assert merged["k"]["weight"] is packed
    assert merged["q"]["weight"].dtype == jnp.bfloat16
    close(np.asarray(merged["q"]["weight"], np.float32), by_hand(leaf), 4e-3)


def test_what_does_not_fit_is_refused_by_name():
    params = tree()
    adapter = adapter_for(params)
    with pytest.raises(UserError, match=r"for k/weight, which the model has not"):
        attach(params, {"k": adapter["q"]})
    with pytest.raises(UserError, match=r"q/weight has an adapter already"):
        attach(attach(params, adapter), adapter)
    with pytest.raises(UserError, match=r"makes q/weight \[5, 8, 16\], the model \[6, 16\]"):
        attach(params, {"q": adapter["experts"]})


def test_casting_leaves_packed_weights_and_scales():
    leaf = low_rank(12, D, base=quantize(draw(12, D), 8, 8))
    out = cast({"q": {"weight": leaf}, "norm": {"weight": jnp.ones(3)}}, "bfloat16")
    assert out["norm"]["weight"].dtype == jnp.bfloat16
    weight = out["q"]["weight"]
    assert (weight.a.dtype, weight.b.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert weight.scale.dtype == weight.base.scales.dtype == jnp.float32
    assert weight.base.values.dtype == jnp.int8


@pytest.mark.parametrize(
    ("path", "axes"),
    [
        ("self_attn/q_proj/weight/a", (None, "hidden")),
        ("self_attn/q_proj/weight/b", ("heads", None)),
        ("self_attn/q_proj/weight/scale", ()),
        ("self_attn/o_proj/weight/a", (None, "heads")),
        ("self_attn/o_proj/weight/base", ("hidden", "heads")),
        ("self_attn/o_proj/weight/base/scales", ("hidden", "heads")),
        ("mlp/experts/down_proj/weight/a", ("experts", None, "width")),
        ("mlp/experts/down_proj/weight/b", ("experts", "hidden", None)),
        ("mlp/experts/down_proj/weight/scale", ("experts",)),
        ("mlp/experts/down_proj/weight/base/group_of", ("experts", "width")),
        ("linear_attn/a_proj/weight/a", (None, "hidden")),
        ("linear_attn/b_proj/weight/b", ("value_heads", None)),
    ],
)
def test_parts_lie_as_the_axes_of_their_weight(path, axes):
    assert parameter_axes(f"layers_3/{path}") == axes
