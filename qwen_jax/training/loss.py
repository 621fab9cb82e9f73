"""Next-token cross entropy in blocks of tokens, so that the logits are never whole."""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.nn.linear import linear
from qwen_jax.sharding.axes import HIDDEN, TOKENS, Layout, on_shards


def cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    block_size: int = 1024,
    layout: Layout | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum over tokens of `weight * (cross entropy + z_loss * log_z**2)`.

    `log_z` is the logarithm of the softmax's denominator, which the second term (PaLM, arXiv
    2204.02311) keeps near 0. Softmax and sums are in float32. The pass that is differentiated makes
    the gradients at once, while it has a block's probabilities, instead of computing the logits
    again; they are for `x` and `head` only.

    Args:
      x: [B, T, D], hidden states behind the final norm.
      head: [V, D].
      targets: int [B, T]. One outside the vocabulary makes the sums NaN, unless its weight is 0.
      weights: float [B, T], 0 for what is not learned.
      z_loss: coefficient.
      block_size: tokens of a device whose logits it holds at once.
      layout: of the tokens by "batch" and "length", whose shards divide them, and of the head by
        "vocabulary".

    Returns:
      float32 [], to be differentiated; and the weighted sums "cross_entropy" and "log_z_squared",
      which have no gradients.
    """
    weights = weights.astype(jnp.float32)
    total, entropy, squares = _sums(x, head, targets, weights, z_loss, block_size, layout)
    return total, {"cross_entropy": entropy, "log_z_squared": squares}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(x, head, targets, weights, z_loss, block_size, layout):
    return _run(x, head, targets, weights, z_loss, block_size, layout, with_gradients=False)


def _sums_forward(x, head, targets, weights, z_loss, block_size, layout):
    *sums, dx, dhead = _run(
        x, head, targets, weights, z_loss, block_size, layout, with_gradients=True
    )
    return tuple(sums), (dx, dhead, jnp.zeros((), x.dtype), jnp.zeros((), head.dtype))


def _sums_backward(z_loss, block_size, layout, saved, cotangents):
    dx, dhead, like_x, like_head = saved
    scale = cotangents[0]
    return (scale * dx).astype(like_x.dtype), (scale * dhead).astype(like_head.dtype), None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _run(x, head, targets, weights, z_loss, block_size, layout, with_gradients):
    """The three sums, and with gradients those of the first: float32 [B, T, D] and [V, D]."""
    gradients = (HIDDEN, ("vocabulary", "hidden")) if with_gradients else ()
    run = functools.partial(
        _run_shard,
        z_loss=z_loss,
        block_size=block_size,
        layout=layout,
        with_gradients=with_gradients,
    )
    return on_shards(
        run,
        layout,
        in_axes=(HIDDEN, ("vocabulary", None), TOKENS, TOKENS),
        out_axes=((), (), (), *gradients),
    )(x, head, targets, weights)


def _run_shard(x, head, targets, weights, *, z_loss, block_size, layout, with_gradients):
    """What a device does with its tokens [b, t] and its rows [v, D] of the head."""
    across, everyone = _mesh_axes(layout, "vocabulary"), _mesh_axes(layout, *TOKENS)
    first = jax.lax.axis_index(across) * len(head) if across else 0
    vocab_size = len(head) * (jax.lax.axis_size(across) if across else 1)
    n = targets.size
    size = min(block_size, n)

    def cut(a):
        a = a.reshape(n, *a.shape[2:])
        a = jnp.pad(a, ((0, -n % size), *[(0, 0)] * (a.ndim - 1)))
        return a.reshape(-1, size, *a.shape[1:])

    def body(carry, block):
        sums, dhead = carry
        x, targets, weights = block
        logits = linear(x, head, out_dtype=jnp.float32)
        peak = jax.lax.pmax(logits.max(axis=-1), across)
        exponentials = jnp.exp(logits - peak[:, None])
        denominator = jax.lax.psum(exponentials.sum(axis=-1), across)
        log_z = peak + jnp.log(denominator)
        column = targets - first
        here = (column >= 0) & (column < len(head))
        chosen = jnp.take_along_axis(logits, jnp.where(here, column, 0)[:, None], axis=1)[:, 0]
        chosen = jax.lax.psum(jnp.where(here, chosen, 0), across)
        known = (targets >= 0) & (targets < vocab_size)
        entropy = jnp.where(known, log_z - chosen, jnp.nan)
        learned = weights != 0
        terms = jnp.stack([entropy + z_loss * log_z**2, entropy, log_z**2])
        sums += jnp.where(learned, weights * terms, 0).sum(axis=1)
        if not with_gradients:
            return (sums, dhead), None
        # Of log_z: the probabilities. Of log_z**2: twice log_z as much.
        scale = weights * (1 + 2 * z_loss * log_z) / denominator
        hit = jnp.arange(len(head)) == column[:, None]
        dlogits = scale[:, None] * exponentials - jnp.where(hit, weights[:, None], 0)
        dlogits = dlogits.astype(x.dtype)
        multiply = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        dx = multiply(dlogits, head, (((1,), (0,)), ((), ())))
        dhead += multiply(dlogits, x, (((0,), (0,)), ((), ())))
        return (sums, dhead), dx

    dhead = jnp.zeros(head.shape, jnp.float32) if with_gradients else None
    start = (jnp.zeros(3, jnp.float32), dhead)
    (sums, dhead), dx = jax.lax.scan(body, start, (cut(x), cut(targets), cut(weights)))
    sums = tuple(jax.lax.psum(sums, everyone))
    if not with_gradients:
        return sums
    dx = jax.lax.psum(dx.reshape(-1, x.shape[-1])[:n].reshape(x.shape), across)
    # One reduction after all blocks, to where the weight is stored. Tokens lie along that axis too.
    stored = _mesh_axes(layout, "hidden")
    if stored:
        dhead = jax.lax.psum_scatter(dhead, stored, scatter_dimension=1, tiled=True)
    dhead = jax.lax.psum(dhead, tuple(axis for axis in everyone if axis not in stored))
    return *sums, dx, dhead


def _mesh_axes(layout: Layout | None, *logical: str) -> tuple[str, ...]:
    return () if layout is None else layout.axes_of(*logical)
