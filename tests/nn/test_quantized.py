"""Packed weights: what they stand for, how they are cut and stacked, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import MoeSpec
from qwen_jax.nn.linear import as_dense, linear
from qwen_jax.nn.moe import Dispatch, mix_experts
from qwen_jax.nn.quantized import QuantizedWeight, dequantize, quantize
from qwen_jax.nn.router import route
from tests.checkpoint.quantised_layouts import e4m3


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def on_device(leaf):
    return jax.tree.map(jnp.asarray, leaf)


def by_hand(leaf: QuantizedWeight) -> np.ndarray:
    """The weight that a leaf [out, in] stands for, a number at a time."""
    out = np.zeros(leaf.shape, np.float32)
    for o, i in np.ndindex(*leaf.shape):
        g = i // leaf.group_size if leaf.group_of is None else leaf.group_of[i]
        if leaf.bits == 4:
            code = float((int(leaf.values[o, i // 2]) >> 4 * (i % 2)) & 15)
        else:
            code = e4m3(int(leaf.values[o, i])) if leaf.float8 else float(leaf.values[o, i])
        zero = 0 if leaf.zeros is None else int(leaf.zeros[o, g])
        out[o, i] = np.float32(code - zero) * np.float32(leaf.scales[o, g])
    return out


def random_leaf(rng, kind: str, out: int = 6, n_in: int = 20, group: int = 8) -> QuantizedWeight:
    groups = -(-n_in // group)
    scales = rng.uniform(0.01, 0.1, (out, groups)).astype(np.float16)
    zeros, group_of = rng.integers(0, 256, (out, groups), np.uint8), None
    if kind == "float8":
        values = rng.normal(size=(out, n_in)).astype(jnp.float8_e4m3fn).view(np.uint8)
        return QuantizedWeight(values, scales.astype(np.float32), None, None, 8, group, True)
    if kind == "scattered":
        group_of = rng.integers(0, groups, n_in).astype(np.int32)
    bits = 8 if kind == "uint8" else 4
    values = rng.integers(0, 256, (out, n_in * bits // 8), np.uint8)
    return QuantizedWeight(values, scales, zeros >> (8 - bits), group_of, bits, group)


KINDS = ("uint4", "scattered", "uint8", "float8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_weight_stands_for_what_its_description_says(rng, kind):
    leaf = random_leaf(rng, kind)
    expected = by_hand(leaf)
    assert leaf.shape == expected.shape
    np.testing.assert_array_equal(dequantize(leaf, np.float32), expected)
    np.testing.assert_array_equal(jax.jit(dequantize, static_argnums=1)(
        on_device(leaf), jnp.float32), expected)  # fmt: skip
    in_16_bits = np.asarray(dequantize(on_device(leaf), jnp.bfloat16))
    np.testing.assert_array_equal(in_16_bits, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_experts_are_taken_as_of_a_dense_weight(rng, kind):
    leaves = [random_leaf(rng, kind) for _ in range(3)]
    stack = jax.tree.map(lambda *arrays: np.stack(arrays), *leaves)
    dense = np.stack([by_hand(leaf) for leaf in leaves])
    assert stack.shape == dense.shape
    np.testing.assert_array_equal(dequantize(stack, np.float32), dense)
    rows = np.array([4, 0, 5])
    for index in (1, slice(1, 3), (2, slice(1, 4)), (slice(None), rows), (1, rows)):
        np.testing.assert_array_equal(dequantize(stack[index], np.float32), dense[index])
    np.testing.assert_array_equal(dequantize(leaves[0][2:5], np.float32), dense[0, 2:5])

    def one_expert(stack, index):
        expert = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, False), stack)
        return dequantize(expert, jnp.float32)

    np.testing.assert_array_equal(jax.jit(one_expert)(on_device(stack), 2), dense[2])


def test_bits_of_floats_are_not_taken_for_integers(rng):
    floats, integers = random_leaf(rng, "float8"), random_leaf(rng, "uint8")
    assert floats.typed_values.dtype == jnp.float8_e4m3fn
    assert integers.typed_values.dtype == floats.values.dtype == np.uint8
    assert jax.tree.structure(floats) != jax.tree.structure(floats.replace(float8=False))
    for cut in (floats[1:3], on_device(floats), jax.tree.map(np.stack, floats)):
        assert cut.float8


def test_inputs_are_not_indexed(rng):
    leaf = random_leaf(rng, "uint4")
    for index in ((0, 1), (slice(None), slice(0, 2)), (..., 0)):
        with pytest.raises(IndexError, match="leading axes"):
            leaf[index]


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_with_a_packed_weight_is_that_with_the_dense_one(rng, kind):
    leaf = random_leaf(rng, kind)
    x, bias = rng.normal(size=(2, 3, 20)).astype(np.float32), np.ones(6, np.float32)
    expected = x.astype(np.float64) @ by_hand(leaf).T.astype(np.float64) + bias
    for run in (linear, jax.jit(linear)):
        np.testing.assert_allclose(run(x, on_device(leaf), bias), expected, atol=1e-5)
    dense = by_hand(leaf)
    np.testing.assert_array_equal(as_dense(on_device(leaf), jnp.float32), dense)
    np.testing.assert_array_equal(as_dense(jnp.asarray(dense), jnp.bfloat16), dense)


def test_gradients_reach_the_input_of_a_packed_weight(rng):
    leaf = random_leaf(rng, "uint4")
    x = rng.normal(size=(3, 20)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: linear(x, on_device(leaf)).sum()))(x)
    np.testing.assert_allclose(gradient, np.tile(by_hand(leaf).sum(0), (3, 1)), atol=1e-5)


DEPTH = 8


def packed_ones(kind: str, *shape: int) -> QuantizedWeight:
    if kind != "fp8":
        return quantize(np.ones(shape, np.float32), {"int8": 8, "int4": 4}[kind])
    bits = np.ones(shape, jnp.float8_e4m3fn).view(np.uint8)
    scales = np.ones((*shape[:-1], shape[-1] // 128), np.float32)
    return QuantizedWeight(bits, scales, None, None, 8, 128, float8=True)


def temporaries(run, *arguments) -> int:
    """Bytes that the compiled program needs besides its arguments and results."""
    return jax.jit(run).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("use", ["layers", "loop over layers", "gradient"])
def test_dense_copies_of_all_layers_never_live_at_once(use, kind):
    size = 512
    leaves = [packed_ones(kind, size, size) for _ in range(DEPTH)]

    def forward(x, leaves):
        for leaf in leaves:
            x = jnp.tanh(linear(x, leaf))
        return x

    def repeated(x, leaves):
        return jax.lax.fori_loop(0, 5, lambda _, x: forward(x, leaves), x)

    def gradient(x, leaves):
        return jax.grad(lambda x: forward(x, leaves).sum())(x)

    run = {"layers": forward, "loop over layers": repeated, "gradient": gradient}[use]
    x = jax.ShapeDtypeStruct((1, size), jnp.float32)
    one_layer = size * size * 4
    assert temporaries(run, x, leaves) < 1.5 * one_layer


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("method", [Dispatch.SORTED, Dispatch.GATHER])
def test_dense_copies_of_all_experts_never_live_at_once(method, kind):
    E, size, tokens = 16, 256, 4
    spec = MoeSpec((0,), E, 2, size, True)
    names = ("gate_proj", "up_proj", "down_proj")
    layers = [
        {name: packed_ones(kind, E, size, size) for name in names} for _ in range(DEPTH)
    ]  # fmt: skip

    def forward(x, gate, layers):
        for experts in layers:
            x = jnp.tanh(mix_experts(x, route(x, gate, spec), experts, method))
        return x

    x, gate = jax.ShapeDtypeStruct((tokens, size), jnp.float32), np.ones((E, size), np.float32)
    one_expert = len(names) * size * size * 4
    assert temporaries(forward, x, gate, layers) < 1.5 * one_expert


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n_in", [256, 128, 72, 200])
def test_quantising_errs_by_half_a_step_at_most(rng, bits, n_in):
    weight = rng.normal(size=(2, 5, n_in)).astype(np.float32) + 0.3
    weight[1, 2] = 0
    weight[0, 3] = np.abs(weight[0, 3]) + 1  # One sign only.
    leaf = quantize(weight, bits)
    assert leaf.shape == weight.shape
    assert leaf.values.nbytes == weight.size * bits // 8
    group = min(128, n_in)
    for index in np.ndindex(2, 5):
        row, got = weight[index], by_hand(leaf[index[0]][index[1] : index[1] + 1])[0]
        for start in range(0, n_in, group):
            part = row[start : start + group]
            low, high = min(part.min(), 0), max(part.max(), 0)
            step = max(-low, high) / 127 if bits == 8 else (high - low) / 15
            error = np.abs(got[start : start + group] - part)
            # Rounding the zero shifts the grid of 4 bits by up to half a step more at its ends.
            assert error.max() <= step * (0.5 if bits == 8 else 1) + 1e-6
            assert np.median(error) <= step / 2


def test_what_is_on_the_grid_is_kept_exactly():
    codes = np.arange(256).reshape(2, 128) % 16
    weight = ((codes - 5) * 0.25).astype(np.float32)
    np.testing.assert_array_equal(dequantize(quantize(weight, 4), np.float32), weight)
    codes = np.arange(-127, 128, dtype=np.float32)[None]
    np.testing.assert_array_equal(
        dequantize(quantize(codes * 0.5, 8, 255), np.float32), codes * 0.5
    )


def test_tiny_and_zero_groups_do_not_become_nan():
    for bits in (4, 8):
        for value in (0.0, 1e-42, -1e-42):
            weight = np.full((2, 8), value, np.float32)
            np.testing.assert_allclose(
                dequantize(quantize(weight, bits), np.float32), weight, atol=1e-41
            )


def test_an_odd_number_of_inputs_does_not_fit_into_nibbles():
    with pytest.raises(ValueError, match="4 bits"):
        quantize(np.ones((2, 7), np.float32), 4)
