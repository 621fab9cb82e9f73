"""The gated feed-forward block."""

import flax.linen as nn
import jax

from qwen_jax.config import ModelConfig
from qwen_jax.nn.linear import Linear, as_rows
from qwen_jax.sharding.axes import TOKENS, Layout, constrain


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, without biases (arXiv 2002.05202).

    Attributes:
      config: of the model.
      width: F; None for `config.intermediate_size`.
    """

    config: ModelConfig
    width: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, layout: Layout | None = None) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `layout` says where they lie on a mesh."""
        F, D = self.width or self.config.intermediate_size, self.config.hidden_size
        std = self.config.initializer_range
        shape = x.shape
        x = as_rows(x, layout)
        gate = Linear(F, stddev=std, name="gate_proj")(x)
        up = Linear(F, stddev=std, name="up_proj")(x)
        hidden = constrain(nn.silu(gate) * up, layout, *TOKENS, "width")
        return Linear(D, stddev=std, name="down_proj")(hidden).reshape(shape)
