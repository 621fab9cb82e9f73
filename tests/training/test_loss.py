"""Cross entropy in blocks against the logits as a whole, in PyTorch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qwen_jax.training.loss import cross_entropy

B, T, D, V = 3, 22, 16, 72


def draw(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, T, D)).astype(dtype)
    head = rng.normal(size=(V, D)).astype(dtype)
    targets = rng.integers(0, V, (B, T))
    weights = rng.uniform(0, 2, (B, T)).astype(np.float32) * (rng.uniform(size=(B, T)) < 0.7)
    return x, head, targets, weights


def reference(x, head, targets, weights, z_loss):
    """The sum, its parts, and its gradients, from whole logits."""
    x, head = (torch.tensor(a, requires_grad=True) for a in (x, head))
    logits = x @ head.T
    entropy = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.as_tensor(targets).flatten(), reduction="none"
    ).view(B, T)
    squares = torch.logsumexp(logits, -1) ** 2
    weights = torch.as_tensor(weights)
    total = (weights * (entropy + z_loss * squares)).sum()
    total.backward()
    parts = [(weights * a).sum().item() for a in (entropy, squares)]
    return total.item(), parts, x.grad.numpy(), head.grad.numpy()


@pytest.mark.parametrize("block_size", [1, 16, B * T, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_sums_and_gradients_equal_those_of_whole_logits(block_size, z_loss):
    x, head, targets, weights = draw(block_size)

    def loss(x, head):
        return cross_entropy(x, head, targets, weights, z_loss=z_loss, block_size=block_size)

    total, parts, dx, dhead = reference(x, head, targets, weights, z_loss)
    (ours, sums), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, head)
    np.testing.assert_allclose(ours, total, rtol=1e-6)
    np.testing.assert_allclose(loss(x, head)[0], total, rtol=1e-6)
    np.testing.assert_allclose([sums["cross_entropy"], sums["log_z_squared"]], parts, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], dx, rtol=0, atol=1e-6 * np.abs(dx).max())
    np.testing.assert_allclose(gradients[1], dhead, rtol=0, atol=1e-6 * np.abs(dhead).max())


def test_gradients_follow_what_is_made_of_the_sum():
    x, head, targets, weights = draw()
    grad = jax.grad(lambda x, scale: scale * cross_entropy(x, head, targets, weights)[0])
    np.testing.assert_allclose(grad(x, -2.5), -2.5 * grad(x, 1.0), rtol=1e-6)


def test_large_logits_do_not_overflow():
    x, head, targets, weights = draw()
    x = 300 * x
    total, _, dx, _ = reference(x, head, targets, weights, 0.0)
    ours, gradient = jax.value_and_grad(lambda x: cross_entropy(x, head, targets, weights)[0])(x)
    np.testing.assert_allclose(ours, total, rtol=1e-6)
    np.testing.assert_allclose(gradient, dx, rtol=0, atol=1e-5 * np.abs(dx).max())


def test_what_has_no_weight_may_be_anything():
    x, head, targets, weights = draw()
    weights[:, ::3] = 0
    expected = jax.value_and_grad(lambda x: cross_entropy(x, head, targets, weights)[0])(x)
    other = np.where(weights == 0, -100, targets)
    ours = jax.value_and_grad(lambda x: cross_entropy(x, head, other, weights)[0])(x)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize("bad", [-1, V, 10**6])
def test_a_learned_target_outside_the_vocabulary_gives_no_number(bad):
    x, head, targets, weights = draw()
    targets[1, 2], weights[1, 2] = bad, 1.0
    assert np.isnan(cross_entropy(x, head, targets, weights)[0])


def test_sums_and_gradients_of_bfloat16_are_made_in_float32():
    x, head, targets, weights = draw()
    x, head = (jnp.asarray(a, jnp.bfloat16) for a in (x, head))
    wide = (np.array(a, np.float32) for a in (x, head))
    total, _, dx, dhead = reference(*wide, targets, weights, 0.0)

    def loss(x, head):
        return cross_entropy(x, head, targets, weights, block_size=4)[0]

    ours, gradients = jax.value_and_grad(loss, (0, 1))(x, head)
    np.testing.assert_allclose(ours, total, rtol=1e-6)
    # What is rounded: the gradients of the logits and the result, to 8 bits each, and no sum.
    for gradient, expected in zip(gradients, (dx, dhead), strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(gradient, np.float32) - expected)
        assert error < 2**-8 * np.linalg.norm(expected)


def largest_array(compiled):
    """Numbers in the largest array of any instruction of a compiled program."""
    shapes = re.findall(r"(?:f32|bf16|pred|s32)\[([\d,]+)\]", compiled.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def test_no_array_of_the_program_has_the_size_of_all_logits():
    B, T, D, V, block_size = 4, 64, 8, 512, 32
    shape = jax.ShapeDtypeStruct
    x, head = shape((B, T, D), jnp.float32), shape((V, D), jnp.float32)
    targets, weights = shape((B, T), jnp.int32), shape((B, T), jnp.float32)

    def compiled(block_size):
        def loss(x, head, targets, weights):
            return cross_entropy(x, head, targets, weights, block_size=block_size)[0]

        grad = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return grad.lower(x, head, targets, weights).compile()

    assert largest_array(compiled(B * T)) >= B * T * V
    assert largest_array(compiled(block_size)) == block_size * V
    # Nor are several blocks held at once: of logits and their gradients, beside what else there is.
    temporaries = compiled(block_size).memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * (3 * block_size * V + 2 * V * D + 2 * B * T * D)


def test_memory_with_a_published_vocabulary():
    """Of Qwen3-0.6B's head on 8,192 tokens in bfloat16; with -s it prints rows of a table."""
    B, T, D, V = 2, 4096, 1024, 151_936
    shape = jax.ShapeDtypeStruct
    x, head = shape((B, T, D), jnp.bfloat16), shape((V, D), jnp.bfloat16)
    targets, weights = shape((B, T), jnp.int32), shape((B, T), jnp.float32)

    def temporaries(block_size):
        def loss(x, head, targets, weights):
            return cross_entropy(x, head, targets, weights, block_size=block_size)[0]

        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, head, targets, weights)
        return program.compile().memory_analysis().temp_size_in_bytes

    measured = {size: temporaries(size) for size in (256, 1024, B * T)}
    for size, nbytes in measured.items():
        print(f"\n| {size:,} | {nbytes / 1e9:.2f} |")
    # The head's gradient in float32 is there at any size.
    assert measured[256] < measured[1024] < 0.25 * measured[B * T]
