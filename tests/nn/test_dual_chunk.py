"""Dual Chunk Attention against the position rules, evaluated pair by pair in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunkSpec
from qwen_jax.nn import attend as attend_file
from qwen_jax.nn.attend import Mask, attend
from qwen_jax.nn.dual_chunk import (
    chunks,
    dual_chunk_attend,
    key_positions,
    length_scale,
    query_positions,
)
from qwen_jax.nn.kernels import choose

SPEC = DualChunkSpec(chunk_size=12, local_size=4)
# Also: nothing exact across the edge of a chunk, and chunks shorter than that.
SPECS = [SPEC, DualChunkSpec(12, 0), DualChunkSpec(12, 9)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a short text, the last one not full, of queries that are not few."""
    monkeypatch.setattr(attend_file, "_BLOCK", 8)
    monkeypatch.setattr(attend_file, "_BLOCK_OF_FEW", 8)
    monkeypatch.setattr(attend_file, "FEW_QUERIES", 4)


def rotated(x, positions):
    """float64 RoPE of `x` [B, T, heads, d]; channel i pairs with i + d/2."""
    d = x.shape[-1]
    angles = np.asarray(positions)[..., None, None] * 100.0 ** -(np.arange(0, d, 2) / d)
    z = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def brute_force(spec, q, k, v, positions, valid, scale=None):
    """`scale` [B, T, S] of every pair."""
    c, (B, T, H, d) = spec.chunk_size - spec.local_size, q.shape
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((B, T, H, v.shape[-1]))
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(t + 1) if valid[b, s]]
        if not seen:
            continue
        scores = []
        for s in seen:
            i, j = positions[b, t], positions[b, s]
            place = {
                0: i % c,
                1: min(i % c + c, spec.chunk_size),
            }.get(i // c - j // c, min(2 * c - 1, spec.chunk_size))
            turned_q = rotated(q[b, t, h][None, None, None], np.full((1, 1), place)).ravel()
            key = k[b, s, h * k.shape[2] // H]
            turned_k = rotated(key[None, None, None], np.full((1, 1), j % c)).ravel()
            scores.append(turned_q @ turned_k * (d**-0.5 if scale is None else scale[b, t, s]))
        weights = np.exp(scores - np.max(scores))
        out[b, t, h] = weights @ v[b, seen, h * k.shape[2] // H] / weights.sum()
    return out


def rotated_queries(spec, q, positions):
    places = query_positions(spec, jnp.asarray(positions))
    return tuple(rotated(q, x).astype(np.float32) for x in places)


def rotated_keys(spec, k, positions):
    return rotated(k, key_positions(spec, jnp.asarray(positions))).astype(np.float32)


def random_qkv(rng, T, H=4, K=2, d=8):
    shapes = (2, T, H, d), (2, T, K, d), (2, T, K, 6)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def in_order(T):
    return np.tile(np.arange(T), (2, 1))


def run(spec, q, k, v, positions, valid=None, scale=None, key_scale=1):
    """All tokens in one call; slots in the order of tokens."""
    return jax.jit(dual_chunk_attend)(
        rotated_queries(spec, q, positions),
        rotated_keys(spec, k, positions) * np.float32(key_scale),
        v,
        in_order(q.shape[1]),
        valid,
        chunks(spec, positions),
        chunks(spec, positions),
        scale,
    )


@pytest.mark.parametrize("spec", SPECS)
def test_equals_the_position_rules_pair_by_pair(spec):
    q, k, v = random_qkv(np.random.default_rng(0), 60)
    expected = brute_force(spec, q, k, v, in_order(60), np.ones((2, 60), bool))
    np.testing.assert_allclose(run(spec, q, k, v, in_order(60)), expected, atol=3e-6)
    # The rules are not those of plain attention.
    everything = np.concatenate([q, k], axis=2)
    turned = rotated(everything, in_order(60)).astype(np.float32)
    plain, _ = jax.jit(attend)(turned[:, :, :4], turned[:, :, 4:], v, Mask(in_order(60)))
    assert np.abs(plain - expected).max() > 0.1


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_rows(padding):
    q, k, v = random_qkv(np.random.default_rng(1), 45)
    order = in_order(45)
    if padding == "left":
        valid = order >= np.array([[0], [13]])
        positions = np.maximum(order - np.array([[0], [13]]), 0)
    else:
        valid, positions = order < np.array([[31], [45]]), order
    expected = brute_force(SPEC, q, k, v, positions, valid)
    np.testing.assert_allclose(run(SPEC, q, k, v, positions, valid), expected, atol=3e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_distances_are_exact_nearby_and_never_larger_than_a_chunk(spec):
    positions = jnp.arange(100)
    by_age = query_positions(spec, positions)
    keys, of_chunk = key_positions(spec, positions), chunks(spec, positions)
    for i, j in zip(*np.tril_indices(100), strict=True):
        age = min(int(of_chunk[i] - of_chunk[j]), 2)
        distance = int(by_age[age][i] - keys[j])
        assert 0 <= distance <= spec.chunk_size
        if age == 0 or (age == 1 and i - j <= spec.local_size):
            assert distance == i - j


def test_equals_plain_attention_inside_of_the_first_chunk():
    q, k, v = random_qkv(np.random.default_rng(2), 8)
    turned_q, turned_k = (rotated(x, in_order(8)).astype(np.float32) for x in (q, k))
    plain, _ = jax.jit(attend)(turned_q, turned_k, v, Mask(in_order(8)))
    out = run(SPEC, q, k, v, in_order(8))
    np.testing.assert_array_equal(out, plain)


@pytest.mark.parametrize("T, branches", [(8, 1), (9, 3)])
def test_the_first_chunk_costs_one_branch(T, branches, monkeypatch):
    ran = []

    def counted(*arguments):
        jax.debug.callback(lambda: ran.append(1))
        return attend(*arguments)

    monkeypatch.setattr(choose, "attend", counted)
    q, k, v = random_qkv(np.random.default_rng(3), T)
    numbers = chunks(SPEC, in_order(T))
    function = jax.jit(lambda *x: dual_chunk_attend(*x, in_order(T), None, numbers, numbers))
    jax.block_until_ready(function((q, q, q), k, v))
    jax.effects_barrier()
    assert len(ran) == branches


def test_token_by_token_equals_one_pass():
    T = 60
    q, k, v = random_qkv(np.random.default_rng(4), T)
    keys = rotated_keys(SPEC, k, in_order(T))
    queries = rotated_queries(SPEC, q, in_order(T))
    step = jax.jit(dual_chunk_attend)
    outs = []
    for t in range(T):
        filled = np.arange(T) <= t
        cached = (np.where(filled[:, None, None], x, 0) for x in (keys, v))
        outs.append(
            step(
                tuple(x[:, t : t + 1] for x in queries),
                *cached,
                np.full((2, 1), t),
                None,
                chunks(SPEC, np.full((2, 1), t)),
                chunks(SPEC, np.where(filled, in_order(T), 0)),
            )
        )
    expected = run(SPEC, q, k, v, in_order(T))
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, atol=3e-6)


def test_length_scale_grows_with_the_logarithm_beyond_the_trained_length():
    lengths = jnp.array([0, 1, 32, 64, 320])
    spec = DualChunkSpec(12, 4, original_max_position_embeddings=32)
    expected = [1, 1, 1, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(10)]
    np.testing.assert_allclose(length_scale(spec, lengths), expected, rtol=1e-6)
    np.testing.assert_array_equal(length_scale(SPEC, lengths), 1)
    assert length_scale(spec, lengths).dtype == length_scale(SPEC, lengths).dtype == jnp.float32


def test_length_scale_of_keys_and_scores_with_rows_of_their_own():
    """Row 0 is within the trained length; the keys of row 1 came with 30 tokens, then with 40."""
    spec = DualChunkSpec(12, 4, original_max_position_embeddings=10)
    T, lengths = 40, jnp.array([10, 40])
    q, k, v = random_qkv(np.random.default_rng(5), T)
    valid = in_order(T) < np.array([[10], [40]])
    now = [1, 1 + 0.1 * math.log(4)]
    of_keys = np.ones((2, T))
    of_keys[1] = np.where(np.arange(T) < 30, 1 + 0.1 * math.log(3), now[1])
    scale = np.broadcast_to(np.array(now)[:, None, None] * of_keys[:, None, :], (2, T, T)) * 8**-0.5
    expected = brute_force(spec, q, k, v, in_order(T), valid, scale)
    old, new = length_scale(spec, jnp.array([10, 30])), length_scale(spec, lengths)
    key_scale = np.where(np.arange(T) < 30, old[:, None], new[:, None])[..., None, None]
    out = run(spec, q, k, v, in_order(T), valid, 8**-0.5 * new[:, None], key_scale)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    assert np.abs(out - run(spec, q, k, v, in_order(T), valid)).max() > 0.01


def long_text(q, k, v, positions):
    spec = DualChunkSpec(chunk_size=1024, local_size=256)
    numbers = chunks(spec, positions)
    return dual_chunk_attend((q, 2 * q, 3 * q), k, v, positions, None, numbers, numbers)


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_linear_in_length(gradient, monkeypatch):
    monkeypatch.setattr(attend_file, "_BLOCK", 128)

    def loss(*arguments):
        return jnp.sum(jnp.square(long_text(*arguments)))

    function = jax.grad(loss, argnums=(0, 1, 2)) if gradient else long_text

    def temporary_bytes(n):
        x = jax.ShapeDtypeStruct((1, n, 1, 16), jnp.float32)
        positions = jax.ShapeDtypeStruct((1, n), jnp.int32)
        compiled = jax.jit(function).lower(x, x, x, positions).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) / temporary_bytes(2048) < 4.5


def test_gradients_equal_those_of_plain_branches(monkeypatch):
    q, k, v = random_qkv(np.random.default_rng(6), 40)
    queries, k = rotated_queries(SPEC, q, in_order(40)), rotated_keys(SPEC, k, in_order(40))
    numbers = chunks(SPEC, in_order(40))

    def gradients():
        def loss(queries, k, v):
            out = dual_chunk_attend(queries, k, v, in_order(40), None, numbers, numbers)
            return jnp.sum(jnp.sin(3 * out))

        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(queries, k, v))

    blockwise = gradients()
    monkeypatch.setattr(attend_file, "_BLOCK", 512)
    for got, want in zip(blockwise, gradients(), strict=True):
        assert np.isfinite(got).all() and np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_texts_in_a_row_and_keys_in_another_order():
    """Two texts in each row, keys of all of it shuffled, against each text by itself."""
    lengths, T = (25, 20), 45
    q, k, v = random_qkv(np.random.default_rng(7), T)
    positions = np.tile(np.concatenate([np.arange(n) for n in lengths]), (2, 1))
    segments = np.tile(np.repeat(np.arange(2), lengths), (2, 1))
    order = np.stack([np.random.default_rng(i).permutation(T) for i in (8, 9)])

    def shuffled(x):
        return np.take_along_axis(x, order.reshape(2, T, *[1] * (x.ndim - 2)), axis=1)

    out = jax.jit(dual_chunk_attend)(
        rotated_queries(SPEC, q, positions),
        shuffled(np.asarray(rotated_keys(SPEC, k, positions))),
        shuffled(v),
        in_order(T),
        None,
        chunks(SPEC, positions),
        shuffled(chunks(SPEC, positions)),
        key_slots=order,
        query_segments=segments,
        key_segments=shuffled(segments),
    )
    ends = np.cumsum((0, *lengths))
    expected = [
        brute_force(
            SPEC, q[:, i:j], k[:, i:j], v[:, i:j], in_order(j - i), np.ones((2, j - i), bool)
        )
        for i, j in itertools.pairwise(ends)
    ]
    np.testing.assert_allclose(out, np.concatenate(expected, axis=1), atol=3e-6)
