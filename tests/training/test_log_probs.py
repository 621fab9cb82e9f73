"""Log-probabilities in blocks against the logits as a whole, in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qwen_jax.sharding.axes import Layout, as_mesh
from qwen_jax.training.log_probs import log_probs
from tests.training.test_loss import largest_array

B, T, D, V = 4, 10, 16, 48


def draw():
    rng = np.random.default_rng(0)
    x, head = (rng.normal(size=s).astype(np.float32) for s in ((B, T, D), (V, D)))
    return x, head, rng.integers(0, V, (B, T)), rng.normal(size=(B, T)).astype(np.float32)


def reference(x, head, targets, cotangents, temperature):
    x, head = (torch.tensor(a, requires_grad=True) for a in (x, head))
    logs = torch.log_softmax(x @ head.T / temperature, -1)
    found = logs.gather(-1, torch.as_tensor(targets)[..., None])[..., 0]
    found.backward(torch.as_tensor(cotangents))
    return found.detach().numpy(), x.grad.numpy(), head.grad.numpy()


def run(x, head, targets, cotangents, **options):
    @jax.jit
    def both(x, head):
        found, back = jax.vjp(lambda x, head: log_probs(x, head, targets, **options), x, head)
        return found, *back(jnp.asarray(cotangents))

    return both(x, head)


def close(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


@pytest.mark.parametrize(("block_size", "temperature"), [(7, 1.0), (16, 0.7), (1000, 2.0)])
def test_values_and_gradients_equal_those_of_whole_logits(block_size, temperature):
    arrays = draw()
    ours = run(*arrays, block_size=block_size, temperature=temperature)
    close(ours, reference(*arrays, temperature))


@pytest.mark.parametrize("mesh", ["fsdp:2,context:2,tensor:2", "expert:2,tensor:4"])
def test_on_a_mesh_they_are_those_of_one_device(mesh):
    arrays = draw()
    ours = run(*arrays, block_size=3, temperature=0.7, layout=Layout(as_mesh(mesh)))
    close(ours, reference(*arrays, 0.7))


def test_a_target_outside_the_vocabulary_has_no_number_and_asks_for_no_gradient():
    x, head, targets, cotangents = draw()
    cotangents[1, 2] = 0
    expected = run(x, head, targets, cotangents)
    for bad in (-1, V):
        targets[1, 2] = bad
        found, *gradients = run(x, head, targets, cotangents)
        assert np.isnan(found[1, 2])
        assert np.isnan(found).sum() == 1
        close(gradients, expected[1:])


def test_large_logits_do_not_overflow_and_bfloat16_is_summed_in_float32():
    x, head, targets, cotangents = draw()
    x = 300 * x
    expected = reference(x, head, targets, cotangents, 1.0)
    for ours, theirs in zip(run(x, head, targets, cotangents), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    x, head = (jnp.asarray(a, jnp.bfloat16) for a in (x / 300, head))
    wide = (np.array(a, np.float32) for a in (x, head))
    found, *gradients = run(x, head, targets, cotangents, block_size=4)
    expected, *wanted = reference(*wide, targets, cotangents, 1.0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert ours.dtype == jnp.bfloat16
        # The gradients of the logits and the result are rounded to 8 bits, and no sum.
        error = np.linalg.norm(np.asarray(ours, np.float32) - theirs)
        assert error < 2**-8 * np.linalg.norm(theirs)


def test_no_array_of_the_program_has_the_size_of_all_logits():
    B, T, D, V, block_size = 4, 64, 8, 512, 32
    shape = jax.ShapeDtypeStruct
    arguments = (shape((B, T, D), jnp.float32), shape((V, D), jnp.float32))
    targets = shape((B, T), jnp.int32)

    def loss(x, head, targets):
        return (log_probs(x, head, targets, block_size=block_size) ** 2).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments, targets).compile()
    assert largest_array(compiled) == block_size * V
