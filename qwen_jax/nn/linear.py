"""Linear maps. Every product with a weight goes through `linear`."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.nn.low_rank import LowRankWeight, add_update, base_of
from qwen_jax.nn.quantized import QuantizedWeight, dequantize
from qwen_jax.sharding.axes import Layout

Weight = jax.Array | QuantizedWeight | LowRankWeight

# Numbers of a quantised weight that are dense at once: a few megabytes, which caches hold.
_DENSE_AT_ONCE = 1 << 20
# Up to so many rows a weight is large beside them.
_FEW_ROWS = 64


def linear(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`x @ weight.T + bias`.

    Weights stay output-major, as checkpoints hold them: loading moves bytes without transposing,
    and a matrix-vector product reads each row in order.

    Args:
      x: [..., in].
      weight: [out, in]; a quantised one is dequantised to x's dtype here and dropped again. The
        update of a low-rank one is computed in its own dtype and added last, as PEFT does.
      bias: [out] or None.
      out_dtype: of the product, x's by default.

    Returns:
      [..., out].
    """
    out_dtype = out_dtype or x.dtype
    base = base_of(weight)
    multiply = _multiply_quantized if isinstance(base, QuantizedWeight) else _multiply
    y = multiply(x, base, out_dtype)
    y = y if bias is None else y + bias
    if isinstance(weight, LowRankWeight):
        a, b = weight.a, weight.b
        update = _multiply(_multiply(x.astype(a.dtype), a, a.dtype), b, b.dtype)
        y = add_update(y, update, weight.scale)
    return y


def _multiply(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    if 1 < math.prod(x.shape[:-1]) <= _FEW_ROWS:
        return _multiply_few(x, weight, out_dtype)
    return _multiply_rows(x, weight, out_dtype)


def _multiply_rows(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=out_dtype
    )


# Compiled, so that a call by itself does not trace the branches anew.
@functools.partial(jax.jit, static_argnames="out_dtype", inline=True)
def _multiply_few(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """As `_multiply_rows`; on a CPU as `weight @ x.T`.

    XLA's CPU kernels pack the matrix on the right, which is to be the small one. Without barriers
    its compiler turns the product round again.
    """

    def by_weight(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        columns = jax.lax.optimization_barrier(rows.T)
        y = jnp.dot(weight, columns, preferred_element_type=out_dtype)
        return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], len(weight))

    by_row = functools.partial(_multiply_rows, out_dtype=out_dtype)
    return jax.lax.platform_dependent(x, weight, cpu=by_weight, default=by_row)


def _multiply_quantized(x: jax.Array, weight: QuantizedWeight, out_dtype: jnp.dtype) -> jax.Array:
    """The product by blocks of rows, so that a block at a time is dense.

    It takes a loop: XLA would otherwise unpack all layers of a model ahead of their turn, and in a
    decode loop ahead of its first turn, and hold the dense copies at once.
    """
    n_out, n_in = weight.shape
    most = max(min(_DENSE_AT_ONCE // n_in, n_out // 2), 1)
    size = next(size for size in range(most, 0, -1) if n_out % size == 0)

    # The backward pass dequantises again instead of keeping every block.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(start: jax.Array) -> jax.Array:
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        part = jax.tree.map(rows, weight.replace(group_of=None))
        return _multiply(x, dequantize(part.replace(group_of=weight.group_of), x.dtype), out_dtype)

    blocks = jax.lax.map(block, jnp.arange(0, n_out, size))
    return jnp.moveaxis(blocks, 0, -2).reshape(*x.shape[:-1], n_out)


def as_rows(x: jax.Array, layout: Layout | None) -> jax.Array:
    """[..., n] -> [rows, n], where no mesh lays out the axes: XLA's CPU compiler then neither
    transposes activations for the gradients of weights nor multiplies row by row of a batch."""
    return x.reshape(-1, x.shape[-1]) if layout is None else x


def as_dense(weight: Weight, dtype: jnp.dtype) -> jax.Array | LowRankWeight:
    """A quantised weight in `dtype`, a dense one as it is; a low-rank one with such a base."""
    if isinstance(weight, LowRankWeight):
        return weight.replace(base=as_dense(weight.base, dtype))
    return dequantize(weight, dtype) if isinstance(weight, QuantizedWeight) else weight


def fetch_param(
    module: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...]
):
    """The parameter `name` of `module`; float32 of `shape` when it is being initialised.

    A given parameter is returned as it is, since a leaf need not be a dense array of that shape.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


class Linear(nn.Module):
    """Declares `weight` [features, in] and, with `use_bias`, `bias` [features].

    Attributes:
      features: output width.
      use_bias: whether there is a bias.
      stddev: of the normal distribution that initialises the weight.
    """

    features: int
    use_bias: bool = False
    stddev: float = 0.02

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., features]."""
        init = nn.initializers.normal(self.stddev)
        weight = fetch_param(self, "weight", init, (self.features, x.shape[-1]))
        bias = None
        if self.use_bias:
            bias = fetch_param(self, "bias", nn.initializers.zeros, (self.features,))
        return linear(x, weight, bias)
