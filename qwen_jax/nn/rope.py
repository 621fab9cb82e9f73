"""Rotary position embedding (arXiv 2104.09864) and the ways of stretching it.

A `RopeSpec` becomes inverse frequencies; positions and frequencies become a `Rotation`, which
turns queries and keys. Channels pair as (i, i + d/2), the layout of all Qwen text models.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import RopeKind, RopeSpec


@flax.struct.dataclass
class Rotation:
    """Cosines and sines by position, each float32 [B, T, d/2], attention factor included."""

    cos: jax.Array
    sin: jax.Array


def inverse_frequencies(
    spec: RopeSpec, head_dim: int, length: jax.Array | int | None = None
) -> jax.Array | np.ndarray:
    """Radians per position of each pair of channels.

    Args:
      spec: which frequencies.
      head_dim: d, the number of rotated channels.
      length: tokens in the longest text, for kinds that depend on it; may be traced.

    Returns:
      float32 [d/2].
    """
    # The exponents are rounded to float32 before the power is taken, as the reference does.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(spec.theta), exponents.astype(np.float64))
    match spec.kind:
        case RopeKind.DEFAULT:
            return (1.0 / powers).astype(np.float32)
        case RopeKind.LINEAR:
            return (1.0 / powers / spec.factor).astype(np.float32)
        case RopeKind.YARN:
            return _yarn(spec, head_dim, powers)
        case RopeKind.DYNAMIC:
            return _dynamic_ntk(spec, head_dim, exponents, length)


def _yarn(spec: RopeSpec, head_dim: int, powers: np.ndarray) -> np.ndarray:
    """YaRN (arXiv 2309.00071), its ramp over the index of the pair as transformers has it."""
    low, high = (
        head_dim * math.log(spec.original_max_position_embeddings / (rotations * 2 * math.pi))
        / (2 * math.log(spec.theta))
        for rotations in (spec.beta_fast, spec.beta_slow)
    )  # fmt: skip
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return (ramp / (spec.factor * powers) + (1 - ramp) / powers).astype(np.float32)


def _dynamic_ntk(
    spec: RopeSpec, head_dim: int, exponents: np.ndarray, length: jax.Array | int
) -> jax.Array:
    """Dynamic NTK: the base grows with the text once that is longer than the trained length."""
    trained = spec.original_max_position_embeddings
    stretch = jnp.maximum(jnp.asarray(length, jnp.float32), trained) * (spec.factor / trained)
    theta = spec.theta * (stretch - (spec.factor - 1)) ** (head_dim / (head_dim - 2))
    return 1.0 / theta**exponents


def rotation(
    spec: RopeSpec, head_dim: int, positions: jax.Array, length: jax.Array | int | None = None
) -> Rotation:
    """The rotation of tokens at `positions` [B, T]; `length` as in `inverse_frequencies`."""
    frequencies = inverse_frequencies(spec, head_dim, length)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return Rotation(
        cos=jnp.cos(angles) * spec.attention_factor, sin=jnp.sin(angles) * spec.attention_factor
    )


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotates `x` [B, T, heads, d]; casts cos and sin to its dtype first, as the reference does."""
    cos = by.cos[:, :, None, :].astype(x.dtype)
    sin = by.sin[:, :, None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
