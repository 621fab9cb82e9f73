"""Rotary position embedding (arXiv 2104.09864) and the ways of stretching it.

A `RopeSpec` becomes inverse frequencies; positions and frequencies become a `Rotation`, which
turns queries and keys. Channels pair as (i, i + d/2), the layout of all Qwen text models.
"""

import math
from typing import Any

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
            found = 1.0 / powers
        case RopeKind.LINEAR:
            found = 1.0 / powers / spec.factor
        case RopeKind.NTK:
            theta = _stretched(spec.theta, spec.factor, rotary_dim)
            found = 1.0 / theta ** exponents.astype(np.float64)
        case RopeKind.DYNAMIC:
            found = _dynamic_ntk(spec, rotary_dim, exponents, length)
        case RopeKind.STEPPED_NTK:
            found = _stepped_ntk(spec, rotary_dim, exponents, length)
        case RopeKind.YARN:
            found = _by_parts(spec, rotary_dim, powers, spec.factor)
        case RopeKind.DYNAMIC_YARN:
            found = _by_parts(spec, rotary_dim, powers, _overrun(spec, length)[..., None])
        case RopeKind.LONGROPE:
            beyond = jnp.asarray(length)[..., None] > spec.original_max_position_embeddings
            short, long = (
                (1.0 / (np.array(factors) * powers)).astype(np.float32)
                for factors in (spec.short_factors, spec.long_factors)
            )
            found = jnp.where(beyond, long, short)
        case RopeKind.PROPORTIONAL:
            turns = np.arange(len(powers)) < int(spec.partial_rotary_factor * rotary_dim // 2)
            found = np.where(turns, 1.0 / powers / spec.factor, 0.0)
    if spec.resonance:
        found = _resonant(found)
    return found.astype(np.float32)


def attention_factor(spec: RopeSpec, length: jax.Array | int | None = None) -> jax.Array | float:
    """What cos and sin are multiplied by: a number, or float32 as `length`, which is as above."""
    if spec.kind is RopeKind.DYNAMIC_YARN:
        return 0.1 * jnp.log(_overrun(spec, length)) + 1
    return spec.attention_factor


def _stretched(theta: float, factor: float | np.ndarray | jax.Array, rotary_dim: int) -> Any:
    """NTK-aware scaling: the base with which the slowest pair is `factor` times as slow."""
    return theta * factor ** (rotary_dim / (rotary_dim - 2))


def _overrun(spec: RopeSpec, length: jax.Array | int) -> jax.Array:
    """A text's length in trained lengths, float32, at least 1."""
    length = jnp.asarray(length, jnp.float32)
    return jnp.maximum(length / spec.original_max_position_embeddings, 1)


def _by_parts(
    spec: RopeSpec, rotary_dim: int, powers: np.ndarray, factor: float | jax.Array
) -> np.ndarray | jax.Array:
    """NTK-by-parts, YaRN's frequencies (arXiv 2309.00071): the slower, the more interpolated."""
    trained = spec.original_max_position_embeddings
    if spec.by_rotations:
        rotations = trained / (2 * math.pi * powers)
        ramp = (spec.beta_fast - rotations) / (spec.beta_fast - spec.beta_slow)
    else:
        low, high = (
            rotary_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))
            for rotations in (spec.beta_fast, spec.beta_slow)
        )
        if spec.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001
        ramp = (np.arange(rotary_dim // 2) - low) / (high - low)
    ramp = np.clip(ramp, 0, 1)
    return ramp / (factor * powers) + (1 - ramp) / powers


def _resonant(frequencies: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Resonance RoPE (arXiv 2403.00071): each wavelength a whole number of positions.

    What turns has then no phase in a long text that a short one has not. Pairs that do not turn
    stay so.
    """
    xp = np if isinstance(frequencies, np.ndarray) else jnp
    turns = frequencies > 0
    lengths = xp.maximum(xp.round(2 * math.pi / xp.where(turns, frequencies, 1)), 1)
    return xp.where(turns, 2 * math.pi / lengths, 0)


def _dynamic_ntk(
    spec: RopeSpec, rotary_dim: int, exponents: np.ndarray, length: jax.Array | int
) -> jax.Array:
    """Dynamic NTK: the base grows with the text once that is longer than the trained length."""
    trained = spec.original_max_position_embeddings
    stretch = jnp.maximum(jnp.asarray(length, jnp.float32), trained) * (spec.factor / trained)
    theta = _stretched(spec.theta, stretch - (spec.factor - 1), rotary_dim)
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
    thetas = _stretched(spec.theta, factors, rotary_dim)
    table = (1.0 / thetas[:, None] ** exponents.astype(np.float64)).astype(np.float32)
    ends = spec.original_max_position_embeddings * 2.0 ** np.arange(_STEPS)
    step = (jnp.asarray(length)[..., None] > ends).sum(axis=-1)
    return jnp.asarray(table)[step]


def rotation(
    spec: RopeSpec,
    rotary_dim: int,
    positions: jax.Array,
    length: jax.Array | int | None = None,
    scaled: bool = True,
) -> Rotation:
    """The rotation of tokens at `positions` [B, T]; `length` as in `inverse_frequencies`.

    Without `scaled` it has no attention factor, for what is rotated already.
    """
    frequencies = inverse_frequencies(spec, rotary_dim, length)
    if frequencies.ndim == 2:
        frequencies = frequencies[:, None]
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    factor = attention_factor(spec, length) if scaled else 1.0
    if jnp.ndim(factor):
        factor = factor[:, None, None]
    return Rotation(
        cos=jnp.cos(angles) * factor,
        sin=jnp.sin(angles) * factor,
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
