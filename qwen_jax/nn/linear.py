"""Linear maps. Every product with a weight goes through `linear`."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


def linear(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`x @ weight.T + bias`.

    Weights stay output-major, as checkpoints hold them: loading moves bytes without transposing,
    and a matrix-vector product reads each row in order.

    Args:
      x: [..., in].
      weight: [out, in].
      bias: [out] or None.
      out_dtype: of the product, x's by default.

    Returns:
      [..., out].
    """
    y = jax.lax.dot_general(
        x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=out_dtype or x.dtype
    )
    return y if bias is None else y + bias


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
