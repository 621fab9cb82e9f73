"""Next-token cross entropy in blocks of tokens, so that the logits are never whole."""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.sharding.axes import HIDDEN, TOKENS, Layout, on_shards
from qwen_jax.training.vocabulary import (
    HEAD,
    exponentials_of,
    is_target,
    logits_of,
    of_targets,
    weighted_sums,
)


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
    return _run(x, head, targets, weights, z_loss, block_size, layout, gradients=False)


def _sums_forward(x, head, targets, weights, z_loss, block_size, layout):
    *sums, dx, dhead = _run(x, head, targets, weights, z_loss, block_size, layout, gradients=True)
    return tuple(sums), (dx, dhead, jnp.zeros((), x.dtype), jnp.zeros((), head.dtype))


def _sums_backward(z_loss, block_size, layout, saved, cotangents):
    dx, dhead, like_x, like_head = saved
    scale = cotangents[0]
    return (scale * dx).astype(like_x.dtype), (scale * dhead).astype(like_head.dtype), None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _run(x, head, targets, weights, z_loss, block_size, layout, gradients):
    """The three sums, and with gradients those of the first: float32 [B, T, D] and [V, D]."""

    def shard(x, head, targets, weights):
        def block(x, targets):
            logits = logits_of(x, head)
            exponentials, total, log_z = exponentials_of(logits, layout)
            entropy = log_z - of_targets(logits, targets, layout)
            # Of log_z: the probabilities. Of log_z**2: twice log_z as much.
            scale = (1 + 2 * z_loss * log_z) / total
            dlogits = scale[:, None] * exponentials - is_target(targets, len(head), layout)
            return (entropy + z_loss * log_z**2, entropy, log_z**2), dlogits

        return weighted_sums(
            block,
            x,
            head,
            (targets,),
            weights,
            block_size=block_size,
            layout=layout,
            gradients=gradients,
        )

    made = (HIDDEN, ("vocabulary", "hidden")) if gradients else ()
    return on_shards(
        shard,
        layout,
        in_axes=(HIDDEN, HEAD, TOKENS, TOKENS),
        out_axes=((), (), (), *made),
    )(x, head, targets, weights)
