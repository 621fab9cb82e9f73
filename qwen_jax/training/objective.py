"""What training makes small: a loss of a batch or a part of one, its sums, and their metrics.

An `Objective` is a value that the train step is made with. `NEXT_TOKEN` predicts the next token and
is what pretraining and fine-tuning take; others stand in files of their own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.models.placement import arrange
from qwen_jax.training.balancing import RouterSums, balance_loss, router_z_loss
from qwen_jax.training.batch import Batch, targets_of
from qwen_jax.training.forward import (
    as_computed,
    forward,
    num_predictions,
    output_head,
    router_sums,
)
from qwen_jax.training.loss import cross_entropy
from qwen_jax.training.stacking import Params
from qwen_jax.training.step_options import TrainOptions

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step makes small, as three pure functions.

    A batch is any pytree of arrays with the rows of the batch as first axis: a step with
    microbatches, and a mesh, split that one. Sums are any pytree whose parts' add up to the
    batch's.

    Attributes:
      loss: of (model, params, batch, options, whole, beside) the loss, float32 [], and the sums of
        the batch. `whole` is None, or for a part of a batch what `ahead` makes of all of it; the
        parts' losses then add up to the batch's. `beside` is what the state has of that name.
      ahead: of (model, params, parts, options, beside), parts with a leading axis, the sums of the
        whole batch, as far as `loss` reads them.
      metrics: of (sums, options) what is reported, "loss" and "tokens" among it.
      token_losses: whether `z_loss` and `mtp_loss` of the options are among what is made small;
        else a step refuses options that ask for one.
    """

    loss: Callable[..., tuple[jax.Array, Any]]
    ahead: Callable[..., Any]
    metrics: Callable[[Any, TrainOptions], Metrics]
    token_losses: bool = False


@flax.struct.dataclass
class Sums:
    """What texts add up to; the sums of a batch's parts add up to the batch's.

    Attributes:
      weights, cross_entropy: float32 [n], of the targets, and their cross entropy so weighted: of
        the next token, and of each further on that is learned.
      log_z_squared: float32 [], weighted, of the next token's softmax.
      router: of the sparse layers, first to last, and behind them of the head for tokens further
        on; None without experts.
    """

    weights: jax.Array
    cross_entropy: jax.Array | float = 0.0
    log_z_squared: jax.Array | float = 0.0
    router: RouterSums | None = None


def objective(
    model: Decoder,
    params: Params,
    batch: Batch,
    options: TrainOptions,
    whole: Sums | None = None,
    beside: None = None,
) -> tuple[jax.Array, Sums]:
    """The loss of predicting tokens: float32 [], to be differentiated by `params`.

    Means are over the whole batch, whatever device has it: over the loss weights for the
    vocabulary's terms, over real tokens for the routers'.

    Args:
      model: what is trained.
      params: as `load_pretrained` returns them.
      batch: the batch, or a part of it.
      options: of the step.
      whole: for a part, `sums_ahead` of the whole batch; the parts' objectives add up to the
        batch's.
      beside: not read.

    Returns:
      The objective, and the sums of `batch`.
    """
    params = as_computed(model, params, options)
    hidden, tokens, router = forward(model, params, batch, options)
    head = output_head(model, params)
    targets, weights = targets_of(batch, len(hidden))
    totals, entropies, squares = [], [], []
    for step, x in enumerate(hidden):
        with jax.named_scope("loss"):
            total, sums = cross_entropy(
                x,
                head,
                arrange(tokens, targets[step]),
                arrange(tokens, weights[step]),
                z_loss=0.0 if step else options.z_loss,
                block_size=options.block_size,
                layout=tokens.layout,
            )
        totals.append(total)
        entropies.append(sums["cross_entropy"])
        squares.append(sums["log_z_squared"])
    sums = Sums(_sum_rows(weights), jnp.stack(entropies), squares[0], router)
    whole = sums if whole is None else whole
    loss, *ahead = share(jnp.stack(totals), whole.weights)
    if ahead:
        loss += options.mtp_loss * jnp.stack(ahead).mean()
    return loss + router_loss(model, router, options, whole.router), sums


def sums_ahead(
    model: Decoder, params: Params, parts: Batch, options: TrainOptions, beside: None = None
) -> Sums:
    """Of a batch in parts, what `objective` of each has to know of the whole.

    Args:
      parts: with a leading axis.
      beside: not read.

    Returns:
      The batch's sums; cross entropies are 0. The experts' use costs a forward pass of all parts
      and is 0 where no loss asks for it.
    """

    def count(batch: Batch) -> Sums:
        return Sums(_sum_rows(targets_of(batch, num_predictions(model, options))[1]))

    return ahead_of(count)(model, params, parts, options)


def metrics_of(sums: Sums, options: TrainOptions) -> Metrics:
    """What is reported of a batch with these sums. Losses are before their coefficients.

    Returns:
      "loss" (the mean cross entropy in nats), "tokens" (the sum of loss weights) and "z_loss";
      where tokens further on are learned "mtp_loss", the mean over them; and `router_metrics`.
    """
    loss, *ahead = share(sums.cross_entropy, sums.weights)
    metrics = {
        "loss": loss,
        "tokens": sums.weights[0],
        "z_loss": share(sums.log_z_squared, sums.weights[0]),
    }
    if ahead:
        metrics["mtp_loss"] = jnp.stack(ahead).mean()
    return metrics | router_metrics(sums.router, options)


NEXT_TOKEN = Objective(objective, sums_ahead, metrics_of, token_losses=True)


def ahead_of(
    count: Callable[[Any], Any], rows: Callable[[Any], Batch] = lambda batch: batch
) -> Callable[..., Any]:
    """`Objective.ahead` of what can be counted without a model, and of the routers.

    Args:
      count: of a part of a batch, those of its sums that `loss` reads, but for the `router`'s.
      rows: of a part, its texts.
    """

    def ahead(
        model: Decoder, params: Params, parts: Any, options: TrainOptions, beside: Any = None
    ) -> Any:
        params = as_computed(model, params, options)

        def part_sums(part: Any) -> Any:
            router = _router_ahead(model, params, rows(part), options)
            return count(part).replace(router=router)

        sums = jax.lax.map(part_sums, parts)
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), sums)

    return ahead


def router_loss(
    model: Decoder, router: RouterSums | None, options: TrainOptions, whole: RouterSums | None
) -> jax.Array | float:
    """The routers' losses with their coefficients, float32 []; 0 without experts.

    Args:
      router: of a batch, or of a part of one.
      whole: of the whole batch.
    """
    if router is None:
        return 0.0
    balance = balance_loss(router, options.balance_pooling, whole)
    loss = _balance_coefficient(model, options) * balance
    return loss + options.router_z_loss * router_z_loss(router, whole)


def _router_ahead(
    model: Decoder, params: Params, batch: Batch, options: TrainOptions
) -> RouterSums | None:
    """Of a part of a batch, what `router_loss` has to know of it before; `params` as computed."""
    counted = model.config.moe is not None and bool(_balance_coefficient(model, options))
    return router_sums(model, params, batch, options, counted)


def router_metrics(router: RouterSums | None, options: TrainOptions) -> Metrics:
    """With experts "balance_loss", "router_z_loss", "expert_counts", int32 [sparse layers, E]."""
    if router is None:
        return {}
    return {
        "balance_loss": balance_loss(router, options.balance_pooling),
        "router_z_loss": router_z_loss(router),
        "expert_counts": router.counts,
    }


def check_no_token_losses(model: Decoder, options: TrainOptions) -> None:
    """Refuses losses that only `NEXT_TOKEN` has.

    Raises:
      UserError: the options ask for one.
    """
    asked = {"z_loss": options.z_loss, "mtp_loss": model.config.mtp_layers and options.mtp_loss}
    for name, value in asked.items():
        if value:
            raise UserError(
                f"step.{name} = {value} is for next-token training alone; set it to 0 here"
            )


def share(total: jax.Array, count: jax.Array) -> jax.Array:
    """`total / count`, 0 of nothing: a batch with nothing to learn has loss 0 and no gradients."""
    return total * jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)


def _balance_coefficient(model: Decoder, options: TrainOptions) -> float:
    given = options.balance_loss
    return model.config.moe.aux_loss_coef if given is None else given


def _sum_rows(weights: list[jax.Array]) -> jax.Array:
    return jnp.stack([w.sum() for w in weights])
