"""Small models with every tensor random, on one device, which the meshes are held against."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import DeltaSpec, LayerKind, ModelConfig, MoeSpec
from qwen_jax.models.decoder import Decoder, parameter_shapes

_MOE = MoeSpec(
    layers=(0, 1),
    num_experts=8,
    num_experts_per_tok=3,
    intermediate_size=16,
    renormalise=True,
    shared_intermediate_size=24,
)

_FULL, _LINEAR = LayerKind.FULL_ATTENTION, LayerKind.LINEAR_ATTENTION


def make_config(**changes) -> ModelConfig:
    fields = {
        "family": "qwen3",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": (_FULL, _FULL),
        "max_position_embeddings": 256,
        "qkv_bias": True,
        "qk_norm": True,
    }
    return ModelConfig(**fields | changes)


CONFIGS = {
    "dense": make_config(tie_word_embeddings=True),
    "moe": make_config(moe=_MOE),
    "hybrid": make_config(
        layer_types=(_LINEAR, _FULL),
        output_gate=True,
        zero_centered_norm=True,
        delta=DeltaSpec(2, 8, 8, 8, 4),
        moe=_MOE,
    ),
}


def random_params(config: ModelConfig, seed: int = 0):
    """Weights that keep activations near one; vectors away from what they are initialised to."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = rng.standard_normal(leaf.shape)
        if leaf.ndim > 1 and "embed" not in name:
            values *= leaf.shape[-1] ** -0.5
        elif "norm" in name:
            values = 0.3 * values + (not config.zero_centered_norm or "linear_attn" in name)
        elif leaf.ndim == 1:
            values *= 0.5
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))


def random_batch(config: ModelConfig, rows: int = 3, length: int = 12, seed: int = 1):
    """Token ids, and a mask with padding on the left, on the right, and nowhere."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (rows, length))
    mask = np.ones((rows, length), bool)
    mask[1, :4] = False
    mask[2, length - 5 :] = False
    return ids, mask


def one_device(config: ModelConfig):
    return Decoder(config), random_params(config)
