"""Keys and values in int8, each vector with a scale of its own, and what attention needs of them.

A vector x [d] of one token and one head is kept as round(x / s) with s = max|x| / 127, so that no
entry is off by more than max|x| / 254. The grid is symmetric, since it needs no second number: a
scale is a factor of a score, or of a weight, and so attention multiplies those and never a vector.

One scale a token and head, because it is known as soon as the token is: what is written never
changes, rows can be cut off, rewound and handed on, and a prompt read at once leaves the cache that
it leaves token by token. KIVI (arXiv 2402.02750) and KVQuant (arXiv 2401.18079) scale keys by
channel, over many tokens, for the sake of channels that stand out, and wait for those tokens. Here
such a channel sets the step of its whole vector: in a random model whose keys are about 1, one pair
of channels with a bias of 30 makes the KL of its predictions 40 times as large, of 100 500 times
(0.004 nats). So with qkv biases and no norm of keys measure it first: `tools.evaluate --text=FILE
--cache_dtype=int8`.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

# The largest integer; -128 stays unused, so that the grid is symmetric.
_LARGEST = 127


@flax.struct.dataclass
class Int8Vectors:
    """[B, S, K, d] numbers, `scales * values`; attributes are named as those of an array.

    Attributes:
      values: int8 [B, S, K, d].
      scales: float32 [B, S, K]. In 16 bits they would save 2 bytes of d + 4, and be off by half as
        much again as the integers.
      dtype: that the numbers are read in. Static.
    """

    values: jax.Array
    scales: jax.Array
    dtype: jnp.dtype = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, S, K, d]."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Memory of both arrays."""
        arrays = jax.tree.leaves(self)
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

    def astype(self, dtype: jnp.dtype) -> "Int8Vectors":
        """The same, read in another dtype; nothing is copied."""
        return self.replace(dtype=jnp.dtype(dtype))


Vectors = jax.Array | Int8Vectors


def zero_vectors(shape: tuple[int, ...], dtype: jnp.dtype) -> Int8Vectors:
    """Zeros [B, S, K, d]."""
    zeros = jnp.zeros(shape, jnp.int8)
    return Int8Vectors(zeros, jnp.zeros(shape[:-1], jnp.float32), jnp.dtype(dtype))


def round_vectors(x: jax.Array, dtype: jnp.dtype) -> Int8Vectors:
    """x [B, S, K, d] in int8, to be read in `dtype`; a vector that is not finite stays NaN."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / _LARGEST
    # What is too small to divide by becomes zeros.
    small = scales < jnp.finfo(jnp.float32).tiny
    values = jnp.round(x / jnp.where(small, jnp.inf, scales)[..., None]).astype(jnp.int8)
    scales = jnp.where(jnp.isfinite(scales), scales, jnp.nan)
    return Int8Vectors(values, scales, jnp.dtype(dtype))


def dense(x: Vectors) -> jax.Array:
    """The numbers themselves: a copy of all, for what can read nothing else."""
    if not isinstance(x, Int8Vectors):
        return x
    return (x.values.astype(jnp.float32) * x.scales[..., None]).astype(x.dtype)


def factors(x: Vectors) -> jax.Array:
    """x without its scales, which integers of 8 bits are in any dtype exactly."""
    return x.values.astype(x.dtype) if isinstance(x, Int8Vectors) else x


def times_scales(scores: jax.Array, x: Vectors) -> jax.Array:
    """float32 `scores` [B, K, G, T, S] of x's vectors, or weights of them, times their scales."""
    if not isinstance(x, Int8Vectors):
        return scores
    return scores * jnp.swapaxes(x.scales, 1, 2)[:, :, None, None, :]
