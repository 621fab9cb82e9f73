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


def zero_centered_rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`(1 + weight) * x / rms(x)` over the last axis, cast back last; arguments as `rms_norm`."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * (1 + weight.astype(jnp.float32))).astype(x.dtype)


class RMSNorm(nn.Module):
    """Declares `weight` [n] over the last axis and applies one of the norms.

    Attributes:
      eps: added to the mean square.
      zero_centered: whether the factor is 1 + weight.
    """

    eps: float
    zero_centered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., n] -> [..., n]."""
        init = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        weight = fetch_param(self, "weight", init, (x.shape[-1],))
        norm = zero_centered_rms_norm if self.zero_centered else rms_norm
        return norm(x, weight, self.eps)
