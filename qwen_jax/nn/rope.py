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
    """Cosines and sines by position, each float32 [B, T, r/2], attention factor included.

    r is the number of rotated channels, the first ones of a head. `in_float32` is the spec's.
    """

    cos: jax.Array
    sin: jax.Array
    in_float32: bool = flax.struct.field(pytree_node=False, default=False)


def inverse_frequencies(
    spec: RopeSpec, rotary_dim: int, length: jax.Array | int | None = None
) -> jax.Array | np.ndarray:
    """Radians per position of each pair of channels.

    Args:
      spec: which frequencies.
      rotary_dim: r, the number of rotated channels.
      length: tokens in the text, for kinds that depend on it; int [] or [B], may be traced.

    Returns:
      float32 [r/2], or [B, r/2] for lengths [B] that matter.
    """
    # The exponents are rounded to float32 before the power is taken, as the reference does.
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    powers = np.power(np.float64(spec.theta), exponents.astype(np.float64))
    match spec.kind:
        case RopeKind.DEFAULT:
            return (1.0 / powers).astype(np.float32)
        case RopeKind.LINEAR:
            return (1.0 / powers / spec.factor).astype(np.float32)
        case RopeKind.YARN:
            return _yarn(spec, rotary_dim, powers)
        case RopeKind.DYNAMIC:
            return _dynamic_ntk(spec, rotary_dim, exponents, length)
        case RopeKind.STEPPED_NTK:
            return _stepped_ntk(spec, rotary_dim, exponents, length)


def _yarn(spec: RopeSpec, rotary_dim: int, powers: np.ndarray) -> np.ndarray:
    """YaRN (arXiv 2309.00071), its ramp over the index of the pair as transformers has it."""
    low, high = (
        rotary_dim * math.log(spec.original_max_position_embeddings / (rotations * 2 * math.pi))
        / (2 * math.log(spec.theta))
        for rotations in (spec.beta_fast, spec.beta_slow)
    )  # fmt: skip
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0, 1)
    return (ramp / (spec.factor * powers) + (1 - ramp) / powers).astype(np.float32)


def _dynamic_ntk(
    spec: RopeSpec, rotary_dim: int, exponents: np.ndarray, length: jax.Array | int
) -> jax.Array:
    """Dynamic NTK: the base grows with the text once that is longer than the trained length."""
    trained = spec.original_max_position_embeddings
    stretch = jnp.maximum(jnp.asarray(length, jnp.float32), trained) * (spec.factor / trained)
    theta = spec.theta * (stretch - (spec.factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    return 1.0 / theta[..., None] ** exponents


# Doublings of the trained length that `stepped_ntk` knows: more than any text can have.
_STEPS = 24


def _stepped_ntk(
    spec: RopeSpec, rotary_dim: int, exponents: np.ndarray, length: jax.Array | int
) -> jax.Array:
    """Qwen1's dynamic NTK: the base grows whenever the text doubles past the trained length.

    The factor is 2 ** ceil(log2(length / trained) + 1) - 1: 1, 3, 7, ... .
    """
    factors = 2.0 ** np.arange(1, _STEPS + 2) - 1
    thetas = spec.theta * factors ** (rotary_dim / (rotary_dim - 2))
    table = (1.0 / thetas[:, None] ** exponents.astype(np.float64)).astype(np.float32)
    ends = spec.original_max_position_embeddings * 2.0 ** np.arange(_STEPS)
    step = (jnp.asarray(length)[..., None] > ends).sum(axis=-1)
    return jnp.asarray(table)[step]


def rotation(
    spec: RopeSpec, rotary_dim: int, positions: jax.Array, length: jax.Array | int | None = None
) -> Rotation:
    """The rotation of tokens at `positions` [B, T]; `length` as in `inverse_frequencies`."""
    frequencies = inverse_frequencies(spec, rotary_dim, length)
    if frequencies.ndim == 2:
        frequencies = frequencies[:, None]
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return Rotation(
        cos=jnp.cos(angles) * spec.attention_factor,
        sin=jnp.sin(angles) * spec.attention_factor,
        in_float32=spec.in_float32,
    )


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotates the first r channels of `x` [B, T, heads, d].

    Casts cos and sin to its dtype first, or works in float32, as the reference does.
    """
    dtype = jnp.float32 if by.in_float32 else x.dtype
    cos = by.cos[:, :, None, :].astype(dtype)
    sin = by.sin[:, :, None, :].astype(dtype)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)


def logn_scale(positions: jax.Array, trained: int) -> jax.Array:
    """What queries at `positions` are multiplied by: log(position + 1) / log(trained), at least 1.

    Keeps the entropy of attention over more keys than in training (Qwen1's `use_logn_attn`).
    """
    return jnp.maximum(jnp.log(positions.astype(jnp.float32) + 1) / math.log(trained), 1.0)
