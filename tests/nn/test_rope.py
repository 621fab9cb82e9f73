"""Inverse frequencies against transformers' own, closed forms and published values."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from qwen_jax.config import RopeKind, RopeSpec
from qwen_jax.hf_config import read_hf_config
from qwen_jax.nn.rope import inverse_frequencies, rotate, rotation

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The test draws the numbers of both lists.
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 40961,
    "short_factor": [],
    "long_factor": [],
}


def minimal_config(head_dim, scaling):
    return {
        "model_type": "qwen3",
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40960,
        "rope_scaling": scaling,
    }


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        YARN,
        {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
        {**YARN, "original_max_position_embeddings": 64, "factor": 0.5},
        LLAMA3,
        {**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 40.0},
        LONGROPE,
        {**LONGROPE, "attention_factor": 1.5},
        {"rope_type": "proportional", "partial_rotary_factor": 0.3},
        {"rope_type": "proportional", "partial_rotary_factor": 0.0},
        {"rope_type": "proportional", "factor": 3.0},
    ],
    ids=lambda scaling: (scaling or {}).get("rope_type", "default"),
)
@pytest.mark.parametrize("length", [None, 40961, 200_000])
def test_frequencies_equal_transformers(scaling, head_dim, length):
    if scaling is not None and "short_factor" in scaling:
        rng = np.random.default_rng(head_dim)
        names = ("short_factor", "long_factor")
        scaling = scaling | {name: rng.uniform(1, 9, head_dim // 2).tolist() for name in names}
    raw = minimal_config(head_dim, scaling)
    reference = Qwen3Config(**{k: v for k, v in raw.items() if k != "model_type"})
    if scaling is None:
        expected, factor = Qwen3RotaryEmbedding.compute_default_rope_parameters(reference)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](reference, seq_len=length)
    spec = read_hf_config(raw).rope
    ours = inverse_frequencies(spec, head_dim, length or 1)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=5e-7)
    assert spec.attention_factor == pytest.approx(factor, rel=1e-12)


def test_yarn_of_the_qwen_cards_has_the_published_ramp():
    """Factor 4 from 32768 at base 1e6: the ramp spans pairs 23 to 40, cos and sin grow by 14%."""
    spec = read_hf_config(minimal_config(128, YARN)).rope
    assert spec.attention_factor == pytest.approx(1.138629, abs=1e-6)
    plain = inverse_frequencies(RopeSpec(theta=1e6), 128)
    ratio = plain / inverse_frequencies(spec, 128)
    np.testing.assert_allclose(ratio[:24], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[40:], 4, rtol=1e-6)
    assert np.all(np.diff(ratio[23:41]) > 0)


def test_dynamic_is_plain_up_to_the_trained_length():
    spec = RopeSpec(1e4, RopeKind.DYNAMIC, 4.0, original_max_position_embeddings=100)
    plain = inverse_frequencies(RopeSpec(1e4), 32)
    for length in (1, 99, 100):
        np.testing.assert_allclose(inverse_frequencies(spec, 32, length), plain, rtol=5e-7)
    assert np.all(np.asarray(inverse_frequencies(spec, 32, 101))[1:] < plain[1:])


def rope(head_dim=128, **scaling):
    return read_hf_config(minimal_config(head_dim, scaling)).rope


def wavelengths(spec, dim=128, length=None):
    return 2 * np.pi / np.asarray(inverse_frequencies(spec, dim, length), np.float64)


@pytest.mark.parametrize("factor", [2.0, 7.5])
def test_ntk_leaves_the_fastest_pair_and_divides_the_slowest(factor):
    ratio = wavelengths(rope(rope_type="ntk", factor=factor)) / wavelengths(RopeSpec(theta=1e6))
    np.testing.assert_allclose(ratio[[0, -1]], [1, factor], rtol=1e-6)
    # A geometric series between them.
    np.testing.assert_allclose(np.diff(np.log(ratio)), np.log(factor) / 63, rtol=1e-3)


def test_ntk_is_the_dynamic_kind_at_the_length_with_its_base():
    """transformers' dynamic NTK with factor f has at n tokens the base of f n / L - (f - 1)."""
    dynamic = rope(rope_type="dynamic", factor=2.0)
    static = rope(rope_type="ntk", factor=2.0 * 100_000 / 40_960 - 1)
    got = inverse_frequencies(dynamic, 128, 100_000)
    np.testing.assert_allclose(got, inverse_frequencies(static, 128), rtol=1e-5)


def test_ntk_by_parts_is_yarn_without_its_temperature():
    options = {"factor": 4.0, "original_max_position_embeddings": 32768}
    by_parts, yarn = (rope(rope_type=name, **options) for name in ("ntk_by_parts", "yarn"))
    np.testing.assert_array_equal(
        inverse_frequencies(by_parts, 128), inverse_frequencies(yarn, 128)
    )
    assert by_parts.attention_factor == 1


def test_the_paper_s_ramp_is_linear_in_rotations_and_that_of_llama3():
    options = {"factor": 8.0, "original_max_position_embeddings": 8192}
    ours = rope(rope_type="yarn_by_rotations", beta_slow=1.0, beta_fast=4.0, **options)
    llama3 = rope(**LLAMA3)
    np.testing.assert_array_equal(inverse_frequencies(ours, 128), inverse_frequencies(llama3, 128))
    assert ours.attention_factor == pytest.approx(0.1 * np.log(8) + 1)
    assert llama3.attention_factor == 1
    # Section 3.2 of the paper: gamma of theta and 1 - gamma of theta / s.
    plain = np.asarray(inverse_frequencies(RopeSpec(theta=1e6), 128), np.float64)
    gamma = np.clip((8192 * plain / (2 * np.pi) - 1) / 3, 0, 1)
    expected = (1 - gamma) * plain / 8 + gamma * plain
    np.testing.assert_allclose(inverse_frequencies(ours, 128), expected, rtol=1e-6)
    assert 0 < ((gamma > 0) & (gamma < 1)).sum() < 64


@pytest.mark.parametrize("length", [1, 32_768, 32_769, 100_000])
def test_dynamic_yarn_is_yarn_with_the_factor_that_the_length_needs(length):
    original = {"original_max_position_embeddings": 32768}
    dynamic = rope(rope_type="dynamic_yarn", **original)
    factor = max(length / 32768, 1.0)
    static = rope(rope_type="yarn", factor=factor, **original)
    lengths = np.array([length, 5])
    got = inverse_frequencies(dynamic, 128, lengths)
    np.testing.assert_allclose(got[0], inverse_frequencies(static, 128), rtol=1e-6)
    np.testing.assert_allclose(got[1], inverse_frequencies(RopeSpec(theta=1e6), 128), rtol=1e-6)
    positions = np.array([[0, 7, 4000], [0, 7, 4000]])
    by = rotation(dynamic, 128, positions, lengths)
    wanted = rotation(static, 128, positions[:1])
    np.testing.assert_allclose(by.cos[:1], wanted.cos, atol=2e-3)
    np.testing.assert_allclose(by.cos[:, 0], np.ones((2, 64)) * by.cos[:, 0, :1], rtol=1e-6)
    temperatures = [static.attention_factor, 1]
    np.testing.assert_allclose(by.cos[:, 0, 0], temperatures, rtol=1e-6)
    assert rotation(dynamic, 128, positions, length).cos[0, 0, 0] == by.cos[0, 0, 0]


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "ntk", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        YARN,
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_resonance_rounds_the_wavelengths_of_any_kind(scaling):
    name = scaling["rope_type"].replace("default", "")
    resonant = rope(**scaling | {"rope_type": f"resonance_{name}".removesuffix("_")})
    turns = np.asarray(inverse_frequencies(rope(**scaling), 128, 50_000)) > 0
    with np.errstate(divide="ignore"):
        lengths, plain = (wavelengths(s, 128, 50_000) for s in (resonant, rope(**scaling)))
    np.testing.assert_allclose(lengths[turns], np.round(plain[turns]), rtol=1e-6)
    assert np.isinf(lengths[~turns]).all()
    assert resonant.attention_factor == rope(**scaling).attention_factor
    # So that what is a wavelength apart is rotated alike.
    fastest = round(float(lengths[0]))
    by = rotation(resonant, 128, np.array([[3, 3 + 1000 * fastest]]), 50_000)
    np.testing.assert_allclose(by.cos[0, 0, 0], by.cos[0, 1, 0], atol=1e-3)


def test_without_turning_pairs_positions_are_not_seen():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 3, 2, 16)).astype(np.float32)
    spec = rope(16, rope_type="proportional", partial_rotary_factor=0.0)
    turned = rotate(x, rotation(spec, 16, np.array([[0, 5, 70_000]])))
    np.testing.assert_array_equal(turned, x)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 32)).astype(np.float32)
    spec = RopeSpec(theta=500.0)

    def turned(x, position):
        return np.asarray(rotate(x, rotation(spec, 32, np.array([[position]]))))[0, 0, 0]

    np.testing.assert_allclose(np.linalg.norm(turned(q, 77)), np.linalg.norm(q), rtol=1e-5)
    products = [turned(q, p + 9) @ turned(k, p) for p in (0, 5, 300)]
    np.testing.assert_allclose(products, products[0], atol=1e-4)
    assert abs(turned(q, 10) @ turned(k, 0) - products[0]) > 1e-2


def test_rotation_equals_transformers_far_out():
    """Angles of 100,000 radians: the product with the position must be float32 in both."""
    positions = np.array([[0, 1, 4095, 32767, 131071]])
    config = Qwen3Config(head_dim=128, rope_theta=1e6, max_position_embeddings=131072)
    cos, sin = Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.as_tensor(positions))
    ours = rotation(RopeSpec(theta=1e6), 128, positions)
    # The powers of the base may differ in the last bit, which 131071 positions magnify to 8e-3.
    np.testing.assert_allclose(ours.cos, cos[..., :64], atol=1e-2)
    np.testing.assert_allclose(ours.sin, sin[..., :64], atol=1e-2)
    np.testing.assert_allclose(ours.cos[:, :3], cos[:, :3, :64], atol=3e-4)


@pytest.mark.parametrize("in_float32", [False, True])
def test_half_precision_is_rounded_where_the_spec_says(in_float32):
    x = torch.randn(2, 9, 3, 8, dtype=torch.bfloat16)
    positions = np.tile(np.arange(9), (2, 1))
    by = rotation(RopeSpec(in_float32=in_float32), 8, positions)
    cos, sin = (torch.tensor(np.tile(t, 2))[:, :, None] for t in (by.cos, by.sin))
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    if in_float32:
        expected = (x.float() * cos + turned.float() * sin).bfloat16()
    else:
        expected = x * cos.bfloat16() + turned * sin.bfloat16()
    ours = rotate(jnp.asarray(x.float().numpy(), jnp.bfloat16), by)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(ours, np.float32), expected.float())
