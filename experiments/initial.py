"""Parameters that small models begin with."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.models.decoder import parameter_shapes


def draw_params(config: ModelConfig, key: jax.Array) -> Any:
    """Matrices of the variance 1 / inputs, those that write to the residual 0.7 times that size.

    Routers are drawn from the config's `initializer_range`, as large models' are; their biases are
    0, and norms 1.
    """

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.ndim == 1:
            return jnp.zeros(leaf.shape) if name.endswith("bias") else jnp.ones(leaf.shape)
        writes = name.endswith(("o_proj/weight", "down_proj/weight"))
        size = (0.7 if writes else 1.0) / math.sqrt(leaf.shape[-1])
        if name.endswith("mlp/gate/weight"):
            size = config.initializer_range
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return size * jax.random.normal(own, leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))
