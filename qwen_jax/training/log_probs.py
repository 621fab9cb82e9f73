"""Log-probabilities of given tokens, in blocks, so that the logits are never whole."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.models.decoder import Decoder
from qwen_jax.models.placement import arrange, restore
from qwen_jax.sharding.axes import HIDDEN, TOKENS, Layout, on_shards
from qwen_jax.training.balancing import RouterSums
from qwen_jax.training.batch import Batch, targets_of
from qwen_jax.training.forward import as_computed, forward, output_head
from qwen_jax.training.stacking import Params
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.vocabulary import (
    HEAD,
    back_through_logits,
    in_blocks,
    is_target,
    log_denominator,
    logits_of,
    of_targets,
    reduce_gradients,
)


@flax.struct.dataclass
class Scored:
    """What a model makes of the tokens of a batch.

    Attributes:
      log_probs: float32 [B, T], of each token's target, by default the token after it; where there
        is none, of something else.
      weights: float32 [B, T], of those targets, 0 where there is none or it is not learned.
      router: sums of the sparse layers' routers; None without experts.
    """

    log_probs: jax.Array
    weights: jax.Array
    router: RouterSums | None


def score(
    model: Decoder, params: Params, batch: Batch, options: TrainOptions, temperature: float = 1.0
) -> Scored:
    """The log-probabilities of a batch's targets, differentiable by `params`.

    Args:
      model: with a head for tokens.
      params: as `load_pretrained` returns them, adapters and packed weights included.
      batch: rows as training has them; targets and weights as `Batch` says.
      options: of the step; what it says of losses is not read.
      temperature: that logits are divided by.
    """
    # The head for tokens further on has no part in this.
    options = dataclasses.replace(options, mtp_loss=0.0)
    params = as_computed(model, params, options)
    (x,), tokens, router = forward(model, params, batch, options)
    (targets,), (weights,) = targets_of(batch, 1)
    found = log_probs(
        x,
        output_head(model, params),
        arrange(tokens, targets),
        temperature=temperature,
        block_size=options.block_size,
        layout=tokens.layout,
    )
    rows, columns = targets.shape
    return Scored(restore(tokens, found)[:rows, :columns], weights, router)


def log_probs(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    temperature: float = 1.0,
    block_size: int = 1024,
    layout: Layout | None = None,
) -> jax.Array:
    """Logarithms of the softmax of `x @ head.T / temperature` at the targets: float32 [B, T].

    Softmax and sums are in float32. The backward pass computes the logits again, block by block;
    gradients are for `x` and `head` only.

    Args:
      x: [B, T, D], hidden states behind the final norm.
      head: [V, D].
      targets: int [B, T]. One outside the vocabulary has NaN, and no gradient if none is asked for.
      temperature: more than 0.
      block_size: tokens of a device whose logits it holds at once.
      layout: of the tokens by "batch" and "length", whose shards divide them, and of the head by
        "vocabulary".
    """
    return _log_probs(x, head, targets, temperature, block_size, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _log_probs(x, head, targets, temperature, block_size, layout):
    return _forward(x, head, targets, temperature, block_size, layout)[0]


def _forward(x, head, targets, temperature, block_size, layout):
    def run(x, head, targets):
        def body(_, block):
            x, targets = block
            logits = logits_of(x, head, temperature)
            log_z = log_denominator(logits, layout)
            return None, (of_targets(logits, targets, layout) - log_z, log_z)

        return in_blocks(body, None, (x, targets), block_size)[1]

    found, log_z = on_shards(run, layout, (HIDDEN, HEAD, TOKENS), (TOKENS, TOKENS))(
        x, head, targets
    )
    return found, (x, head, targets, log_z)


def _backward(temperature, block_size, layout, saved, cotangents):
    def run(x, head, targets, log_z, cotangents):
        def body(dhead, block):
            x, targets, log_z, cotangents = block
            probabilities = jnp.exp(logits_of(x, head, temperature) - log_z[:, None])
            dlogits = is_target(targets, len(head), layout) - probabilities
            dlogits *= cotangents[:, None] / temperature
            dx, more = back_through_logits(dlogits, x, head)
            return dhead + more, dx

        start, arrays = jnp.zeros(head.shape, jnp.float32), (x, targets, log_z, cotangents)
        dhead, dx = in_blocks(body, start, arrays, block_size)
        return reduce_gradients(dx, dhead, layout)

    x, head, *_ = saved
    axes = (HIDDEN, HEAD, TOKENS, TOKENS, TOKENS)
    gradients = (HIDDEN, ("vocabulary", "hidden"))
    dx, dhead = on_shards(run, layout, axes, gradients)(*saved, cotangents)
    return dx.astype(x.dtype), dhead.astype(head.dtype), None


_log_probs.defvjp(_forward, _backward)
