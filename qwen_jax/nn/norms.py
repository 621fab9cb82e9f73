"""Root-mean-square normalisation."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.nn.linear import fetch_param


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`weight * x / rms(x)` over the last axis.

    Normalises in float32 and casts back before the weight is applied, where the reference casts:
    in bfloat16 the order shows in the logits.

    Args:
      x: [..., n].
      weight: [n].
      eps: added to the mean square.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight * normed.astype(x.dtype)


class RMSNorm(nn.Module):
    """Declares `weight` [n] over the last axis and applies `rms_norm`."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., n] -> [..., n]."""
        weight = fetch_param(self, "weight", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, weight, self.eps)
