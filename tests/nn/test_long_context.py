"""Attention beyond a model's length, against its definition pair by pair in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen_jax.config import FarSpec, LayerKind
from qwen_jax.hf_config import read_hf_config
from qwen_jax.models.placement import check_call, place
from qwen_jax.nn.attention import Attention
from qwen_jax.nn.rope import attention_factor, inverse_frequencies
from qwen_jax.rope_scaling import parse_rope_flag, with_rope_scaling
from tests.test_hf_config import published

# The trained length is 16.
LENGTH, TRAINED, HEADS, KEY_HEADS, CHANNELS, WIDTH = 48, 16, 4, 2, 8, 12


@pytest.fixture(scope="module")
def plain():
    return dataclasses.replace(
        read_hf_config(published("Qwen3-0.6B")),
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=CHANNELS,
        layer_types=(LayerKind.FULL_ATTENTION,),
        max_position_embeddings=TRAINED,
    )


def chunked(chunk, local):
    """The distance that Dual Chunk Attention lets a query at m have from a key at n."""
    length = chunk - local

    def of(m, n):
        chunks = m // length - n // length
        places = (m % length, min(m % length + length, chunk), min(2 * length - 1, chunk))
        return places[min(chunks, 2)] - n % length

    return of


def stretched(window, place):
    """Beyond a window, the distance between where `place` puts the two."""

    def of(m, n):
        return m - n if m - n < window else place(m) - place(n) + window - place(window)

    return of


def with_sinks(window, sinks):
    """That of a text without what is between its first tokens and the window; None there."""

    def of(m, n):
        if m - n < window:
            return m - n
        return min(m, sinks + window - 1) - n if n < sinks else None

    return of


def logn(m):
    return max(1.0, np.log(m + 1) / np.log(TRAINED))


# Of --rope: the distance of a pair (None where it is not seen), what a query multiplies scores
# by, and the window.
METHODS = {
    "none": (None, None, None),
    "none,window=5": (None, None, 5),
    "none,logn=true": (None, logn, None),
    "linear:4": (None, None, None),
    "ntk:4": (None, None, None),
    "yarn:4,original=16": (None, None, None),
    "yarn_by_rotations:4,original=16,beta_fast=3": (None, None, None),
    "ntk_by_parts:4,original=16,logn=true,window=9": (None, logn, 9),
    "dynamic:2": (None, None, None),
    "stepped_ntk,original=16,logn=16,window=7": (None, logn, 7),
    "dynamic_yarn,original=16,beta_fast=3": (None, None, None),
    "proportional,partial_rotary_factor=0.5": (None, None, None),
    "resonance_yarn:4,original=16": (None, None, None),
    "dca": (chunked(12, 1), None, None),
    "dca,original=32": (chunked(24, 2), None, None),
    "dca,chunk_size=10,local_size=4,logn=true": (chunked(10, 4), logn, None),
    "rerope,window=9": (stretched(9, lambda x: 0), None, None),
    "rerope,window=9,stretch=3,logn=true": (stretched(9, lambda x: x / 3), logn, None),
    "self_extend:4,original=16": (stretched(8, lambda x: x // 4), None, None),
    "self_extend:3,window=7": (stretched(7, lambda x: x // 3), None, None),
    "sinks,original=16": (with_sinks(12, 4), None, None),
    "sinks,window=5,sinks=2,logn=true": (with_sinks(5, 2), logn, None),
    "dca,temperature=true": (chunked(12, 1), lambda m: (0.1 * np.log(3) + 1) ** 2, None),
}


@pytest.mark.parametrize("text", METHODS)
def test_attention_is_what_the_method_says_pair_by_pair(text, plain):
    check(with_rope_scaling(plain, parse_rope_flag(text)), *METHODS[text])


def test_far_keys_have_a_temperature_once(plain):
    config = with_rope_scaling(plain, parse_rope_flag("yarn:4,original=16"))
    config = dataclasses.replace(config, far=FarSpec(9, 3.0))
    assert config.rope.attention_factor > 1.1
    check(config, stretched(9, lambda x: x / 3), None, None)


def check(config, *method):
    """Random weights and inputs through `Attention` and through `brute`."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, LENGTH, WIDTH)).astype(np.float32)
    module = Attention(config, config.layer_types[0])
    _, tokens, _ = place(config, None, check_call(np.zeros((1, LENGTH), np.int32)), None)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, tokens, None)["params"]
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype("f4"), shapes)
    got, _ = module.apply({"params": params}, x, tokens, None)
    want = brute(config, params, x[0].astype(np.float64), *method)
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def brute(config, params, x, distance_of, scale_of, window):
    """[T, D] -> [T, D], a pair of tokens at a time."""

    def project(name, heads, normed):
        y = (x @ np.asarray(params[name]["weight"], np.float64).T).reshape(LENGTH, heads, CHANNELS)
        if not normed:
            return y
        y /= np.sqrt((y**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
        return y * np.asarray(params[f"{name[0]}_norm"]["weight"], np.float64)

    q, k = project("q_proj", HEADS, True), project("k_proj", KEY_HEADS, True)
    v = project("v_proj", KEY_HEADS, False)
    frequencies = np.asarray(inverse_frequencies(config.rope, CHANNELS, LENGTH), np.float64)
    temperature = float(attention_factor(config.rope, LENGTH)) ** 2
    out = np.zeros((LENGTH, HEADS, CHANNELS))
    for m in range(LENGTH):
        first = 0 if window is None else max(0, m - window + 1)
        scores = []
        for n in range(first, m + 1):
            distance = m - n if distance_of is None else distance_of(m, n)
            if distance is None:
                scores.append(np.full(HEADS, -np.inf))
                continue
            turned = turn(q[m], distance * frequencies)
            keys = np.repeat(k[n], HEADS // KEY_HEADS, axis=0)
            scores.append((turned * keys).sum(axis=-1) * temperature / np.sqrt(CHANNELS))
        scores = np.stack(scores) * (1 if scale_of is None else scale_of(m))
        weights = np.exp(scores - scores.max(axis=0))
        weights /= weights.sum(axis=0)
        values = np.repeat(v[first : m + 1], HEADS // KEY_HEADS, axis=1)
        out[m] = (weights[..., None] * values).sum(axis=0)
    return out.reshape(LENGTH, -1) @ np.asarray(params["o_proj"]["weight"], np.float64).T


def turn(x, angles):
    """[H, d] by the angles of its pairs (i, i + d/2)."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
