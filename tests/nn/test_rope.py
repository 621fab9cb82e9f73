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
    ],
    ids=lambda scaling: (scaling or {}).get("rope_type", "default"),
)
@pytest.mark.parametrize("length", [None, 40961, 200_000])
def test_frequencies_equal_transformers(scaling, head_dim, length):
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
