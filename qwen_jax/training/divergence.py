"""How far a student's predictions are from a teacher's, in blocks, so that logits are never whole.

As in `loss.cross_entropy`, the pass that is differentiated makes the gradients at once, while it
has a block's probabilities.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.sharding.axes import HIDDEN, TOKENS, Layout, on_shards
from qwen_jax.training.vocabulary import (
    HEAD,
    back_through_logits,
    in_blocks,
    is_target,
    log_denominator,
    logits_of,
    mesh_axes,
    of_targets,
    reduce_gradients,
    sum_vocabulary,
)


def divergence(
    x: jax.Array,
    head: jax.Array,
    teacher_x: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    temperature: float = 1.0,
    mix: float = 1.0,
    block_size: int = 1024,
    layout: Layout | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum over tokens of `weight * (mix * T**2 * KL + (1 - mix) * cross entropy)`.

    KL is that of the student from the teacher, sum of p * log(p / q) with the teacher's p and the
    student's q, both of logits divided by the temperature T (arXiv 1503.02531, section 2); T**2
    keeps the size of its gradients. The cross entropy is the targets', at temperature 1. Softmax
    and sums are in float32; gradients are for `x` and `head` only.

    Args:
      x, teacher_x: [B, T, D] and [B, T, D'], hidden states behind the final norms.
      head, teacher_head: [V, D] and [V, D'], of one vocabulary.
      targets: int [B, T]. One outside the vocabulary makes the sums NaN, unless its weight is 0.
      weights: float [B, T], 0 for what is not learned.
      temperature: T.
      mix: the share of the teacher's part.
      block_size: tokens of a device whose logits, of both models, it holds at once.
      layout: of the tokens by "batch" and "length", whose shards divide them, and of the heads by
        "vocabulary".

    Returns:
      float32 [], to be differentiated; and the weighted sums "kl" and "cross_entropy", which have
      no gradients.
    """
    weights = weights.astype(jnp.float32)
    total, kl, entropy = _sums(
        x, head, teacher_x, teacher_head, targets, weights, temperature, mix, block_size, layout
    )
    return total, {"kl": kl, "cross_entropy": entropy}


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _sums(x, head, teacher_x, teacher_head, targets, weights, *settings):
    return _run(x, head, teacher_x, teacher_head, targets, weights, *settings, gradients=False)


def _sums_forward(x, head, teacher_x, teacher_head, targets, weights, *settings):
    *sums, dx, dhead = _run(
        x, head, teacher_x, teacher_head, targets, weights, *settings, gradients=True
    )
    return tuple(sums), (dx, dhead, jnp.zeros((), x.dtype), jnp.zeros((), head.dtype))


def _sums_backward(temperature, mix, block_size, layout, saved, cotangents):
    dx, dhead, like_x, like_head = saved
    scale = cotangents[0]
    dx, dhead = (scale * dx).astype(like_x.dtype), (scale * dhead).astype(like_head.dtype)
    return dx, dhead, None, None, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _run(
    x, head, teacher_x, teacher_head, targets, weights, temperature, mix, block_size, layout,
    gradients,
):  # fmt: skip
    """The three sums, and with gradients those of the first: float32 [B, T, D] and [V, D]."""

    def shard(x, head, teacher_x, teacher_head, targets, weights):
        def body(carry, block):
            sums, dhead = carry
            x, teacher_x, targets, weights = block
            logits = logits_of(x, head)
            log_z = log_denominator(logits, layout)
            entropy = log_z - of_targets(logits, targets, layout)
            soft = logits / temperature
            soft -= log_denominator(soft, layout)[:, None]
            wanted = logits_of(teacher_x, teacher_head, temperature)
            wanted -= log_denominator(wanted, layout)[:, None]
            p = jnp.exp(wanted)
            kl = sum_vocabulary(p * (wanted - soft), layout)
            total = mix * temperature**2 * kl + (1 - mix) * entropy
            terms = jnp.stack([total, kl, entropy])
            sums += jnp.where(weights != 0, weights * terms, 0).sum(axis=1)
            if not gradients:
                return (sums, dhead), None
            dlogits = mix * temperature * (jnp.exp(soft) - p)
            if mix != 1:
                hit = is_target(targets, len(head), layout)
                dlogits += (1 - mix) * (jnp.exp(logits - log_z[:, None]) - hit)
            dx, more = back_through_logits(weights[:, None] * dlogits, x, head)
            return (sums, dhead + more), dx

        dhead = jnp.zeros(head.shape, jnp.float32) if gradients else None
        start, arrays = (jnp.zeros(3, jnp.float32), dhead), (x, teacher_x, targets, weights)
        (sums, dhead), dx = in_blocks(body, start, arrays, block_size)
        sums = tuple(jax.lax.psum(sums, mesh_axes(layout, *TOKENS)))
        return (*sums, *reduce_gradients(dx, dhead, layout)) if gradients else sums

    made = (HIDDEN, ("vocabulary", "hidden")) if gradients else ()
    return on_shards(
        shard,
        layout,
        in_axes=(HIDDEN, HEAD, HIDDEN, HEAD, TOKENS, TOKENS),
        out_axes=((), (), (), *made),
    )(x, head, teacher_x, teacher_head, targets, weights)
