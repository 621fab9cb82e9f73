"""The routers' losses against transformers' and against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from qwen_jax.config import MoeSpec
from qwen_jax.errors import UserError
from qwen_jax.nn.router import route
from qwen_jax.training.balancing import BalanceOptions, balance_loss, router_z_loss
from qwen_jax.training.routing_sums import sum_routing

L, B, T, E, k = 3, 2, 9, 6, 2
SPEC = MoeSpec(layers=tuple(range(L)), num_experts=E, num_experts_per_tok=k, intermediate_size=8,
               renormalise=True)  # fmt: skip


def router_sums(logits, real=None, spec=SPEC):
    """Of layers whose router is the identity."""
    E = spec.num_experts
    layers = [sum_routing(route(x, jnp.eye(E), spec, real), real) for x in logits]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def draw():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (L, B, T, E)).astype(np.float32)
    return logits, np.arange(T) < np.array([[T], [5]])


@pytest.mark.parametrize("padded", [False, True])
def test_pooled_balance_and_its_gradient_equal_the_reference(padded):
    logits, real = draw()
    theirs = torch.tensor(logits, requires_grad=True)
    mask = torch.as_tensor(real.astype(np.int64)) if padded else None
    layers = tuple(x.flatten(0, 1) for x in theirs)
    expected = load_balancing_loss_func(layers, E, k, mask)
    expected.backward()

    def loss(logits):
        return balance_loss(router_sums(logits, real if padded else None), SPEC, pooling="model")

    ours, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(ours, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=0, atol=1e-7)


def test_balance_by_layer_is_the_mean_of_the_reference_on_each():
    logits, real = draw()
    mask = torch.as_tensor(real.astype(np.int64))
    each = [
        load_balancing_loss_func((torch.as_tensor(x).flatten(0, 1),), E, k, mask).item()
        for x in logits
    ]
    ours = balance_loss(router_sums(logits, real), SPEC, pooling="layer")
    np.testing.assert_allclose(ours, np.mean(each) / k, rtol=1e-6)


def test_even_use_costs_1_by_layer_and_k_of_the_model_and_collapse_what_it_leaves_unused():
    even = np.zeros((L, 1, E, E), np.float32)
    # Token t prefers experts t and t + 1, with nearly all of its probability.
    t = np.arange(E)
    even[..., t, t] = even[..., t, (t + 1) % E] = 30
    sums = router_sums(even)
    np.testing.assert_allclose(balance_loss(sums, SPEC), 1, rtol=1e-6)
    np.testing.assert_allclose(balance_loss(sums, SPEC, pooling="model"), k, rtol=1e-6)
    collapsed = np.zeros((E // k, 1, 8, E), np.float32)
    for i, layer in enumerate(collapsed):
        layer[..., k * i : k * i + k] = 30
    sums = router_sums(collapsed)
    np.testing.assert_allclose(balance_loss(sums, SPEC, pooling="layer"), E / k, rtol=1e-6)
    # Layers that collapse on different experts look even where they are pooled.
    np.testing.assert_allclose(balance_loss(sums, SPEC, pooling="model"), k, rtol=1e-6)


def test_router_z_loss_is_the_mean_over_real_tokens():
    logits, real = draw()
    squares = torch.logsumexp(torch.as_tensor(logits), -1).numpy() ** 2
    ours = router_z_loss(router_sums(logits, real))
    np.testing.assert_allclose(ours, squares[:, real].mean(), rtol=1e-6)


def test_a_batch_of_padding_costs_nothing():
    logits, real = draw()
    sums = router_sums(logits, np.zeros_like(real))
    both = (balance_loss(sums, SPEC, pooling=pooling) for pooling in ("layer", "model"))
    assert [*both, router_z_loss(sums)] == [0, 0, 0]


def test_with_one_choice_the_router_learns_from_this_loss():
    spec = dataclasses.replace(SPEC, num_experts_per_tok=1)
    logits, _ = draw()
    gradient = jax.grad(lambda logits: balance_loss(router_sums(logits, spec=spec), spec))(logits)
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize(
    ("field", "setting", "message"),
    [
        ("pooling", "x", "pooling = x is not supported; known: layer, model"),
        ("loss", float("nan"), "loss = nan must be finite, at least 0"),
    ],
)
def test_options_that_are_none_are_refused(field, setting, message):
    with pytest.raises(UserError, match=f"^{message}"):
        BalanceOptions(**{field: setting})
