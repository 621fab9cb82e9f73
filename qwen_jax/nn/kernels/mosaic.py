"""What the compiler of TPU kernels asks of all who call one."""

import contextlib

import jax
import jax.numpy as jnp

# Width of a vector register: what an array's last axis is cut into.
LANES = 128


def kernel_precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """The precision of products for a kernel whose arguments have this dtype.

    That of 16-bit numbers is their own: the compiler refuses a higher one.
    """
    asked = jax.config.jax_default_matmul_precision
    return jax.default_matmul_precision(asked if dtype == jnp.float32 else "default")


def pad_axis(x: jax.Array, axis: int, length: int, value: int = 0) -> jax.Array:
    """`x` with `value` up to `length` on an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)
