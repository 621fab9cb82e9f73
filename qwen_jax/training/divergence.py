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
    is_target,
    log_denominator,
    logits_of,
    of_targets,
    sum_vocabulary,
    weighted_sums,
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
        def block(x, teacher_x, targets):
            logits = logits_of(x, head)
            log_z = log_denominator(logits, layout)
            entropy = log_z - of_targets(logits, targets, layout)
            soft = logits / temperature
            soft -= log_denominator(soft, layout)[:, None]
            wanted = logits_of(teacher_x, teacher_head, temperature)
            wanted -= log_denominator(wanted, layout)[:, None]
            p = jnp.exp(wanted)
            kl = sum_vocabulary(p * (wanted - soft), layout)
            dlogits = mix * temperature * (jnp.exp(soft) - p)
            if mix != 1:
                hit = is_target(targets, len(head), layout)
                dlogits += (1 - mix) * (jnp.exp(logits - log_z[:, None]) - hit)
            return (mix * temperature**2 * kl + (1 - mix) * entropy, kl, entropy), dlogits

        return weighted_sums(
            block,
            x,
            head,
            (teacher_x, targets),
            weights,
            block_size=block_size,
            layout=layout,
            gradients=gradients,
        )

    made = (HIDDEN, ("vocabulary", "hidden")) if gradients else ()
    return on_shards(
        shard,
        layout,
        in_axes=(HIDDEN, HEAD, HIDDEN, HEAD, TOKENS, TOKENS),
        out_axes=((), (), (), *made),
    )(x, head, teacher_x, teacher_head, targets, weights)
