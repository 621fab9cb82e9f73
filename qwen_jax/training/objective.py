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
from qwen_jax.nn.low_rank import LowRankWeight, is_weight, merged
from qwen_jax.training.balancing import (
    Group,
    balance_loss,
    router_z_loss,
    similarity_loss,
)
from qwen_jax.training.batch import Batch, targets_of
from qwen_jax.training.forward import (
    as_computed,
    forward,
    num_predictions,
    output_head,
    router_sums,
)
from qwen_jax.training.loss import cross_entropy
from qwen_jax.training.router_figures import pack, router_figures
from qwen_jax.training.routing_sums import RouterSums
from qwen_jax.training.score_bias import moves_of
from qwen_jax.training.stacking import Params
from qwen_jax.training.step_options import TrainOptions

# Figures of routers are a dict in theirs.
Metrics = dict[str, Any]


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
      metrics: of (model, sums, options) what is reported, "loss" and "tokens" among it.
      of_texts: whether a batch is a `Batch` of rows [B, T] as the model reads them, which can be
        balanced in groups.
      token_losses: whether `z_loss` and `mtp_loss` of the options are among what is made small;
        else a step refuses options that ask for one.
    """

    loss: Callable[..., tuple[jax.Array, Any]]
    ahead: Callable[..., Any]
    metrics: Callable[[Decoder, Any, TrainOptions], Metrics]
    of_texts: bool = False
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
    return loss + router_loss(model, params, router, options, whole.router), sums


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


def metrics_of(model: Decoder, sums: Sums, options: TrainOptions) -> Metrics:
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
    return metrics | router_metrics(model, sums.router, options)


NEXT_TOKEN = Objective(objective, sums_ahead, metrics_of, of_texts=True, token_losses=True)


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
    model: Decoder,
    params: Params,
    router: RouterSums | None,
    options: TrainOptions,
    whole: RouterSums | None,
) -> jax.Array | float:
    """The routers' losses with their coefficients, float32 []; 0 without experts.

    Args:
      model: what is trained.
      params: as computed.
      router: of a batch, or of a part of one.
      options: of the step.
      whole: of the whole batch.
    """
    if router is None:
        return 0.0
    balance = options.balance
    loss = balance.z_loss * router_z_loss(router, whole)
    for coefficient, group in _balanced(model, options):
        loss += coefficient * _balance_loss(model, router, options, group, whole)
    if balance.similarity:
        # Not a sum over tokens: each part of a batch has its share of it.
        total = (router if whole is None else whole).tokens.sum()
        part = router.tokens.sum() / jnp.maximum(total, 1)
        loss += balance.similarity * part * similarity_loss(_router_weights(params))
    return loss


def _balanced(model: Decoder, options: TrainOptions) -> list[tuple[float, Group]]:
    """The balancing losses that count, with their coefficients."""
    balance = options.balance
    both = (
        (balance.coefficient(model.config.moe), balance.group),
        (balance.complement, balance.complement_group),
    )
    return [(coefficient, group) for coefficient, group in both if coefficient]


def _balance_loss(
    model: Decoder,
    router: RouterSums,
    options: TrainOptions,
    group: Group,
    whole: RouterSums | None = None,
) -> jax.Array:
    balance = options.balance
    spec = model.config.moe
    return balance_loss(router, spec, group, balance.form, balance.pooling, whole)


def _router_weights(params: Params) -> list[jax.Array]:
    """Of all routers, [..., E, D] each."""
    return [
        merged(leaf, jnp.float32) if isinstance(leaf, LowRankWeight) else leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("mlp/gate/weight")
    ]


def _router_ahead(
    model: Decoder, params: Params, batch: Batch, options: TrainOptions
) -> RouterSums | None:
    """Of a part of a batch, what `router_loss` has to know of it before; `params` as computed."""
    counted = model.config.moe is not None and bool(_balanced(model, options))
    return router_sums(model, params, batch, options, counted)


def router_metrics(model: Decoder, router: RouterSums | None, options: TrainOptions) -> Metrics:
    """What is reported of routers; nothing without experts.

    Returns:
      "balance_loss", of the group that is balanced, and "router_z_loss", before their coefficients;
      "expert_counts", int32 [sparse layers, E]; with figures "router", `router_figures`, packed;
      where biases are moved "score_bias_moves", float32 [sparse layers, E].
    """
    if router is None:
        return {}
    balance, spec = options.balance, model.config.moe
    group = balance.group if balance.coefficient(spec) else "global"
    metrics: Metrics = {
        "balance_loss": _balance_loss(model, router, options, group),
        "router_z_loss": router_z_loss(router),
        "expert_counts": router.counts,
    }
    if router.each is not None:
        metrics["router"] = pack(router_figures(router, spec))
    if balance.bias_rate:
        metrics["score_bias_moves"] = moves_of(router, balance)
    return metrics


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


def _sum_rows(weights: list[jax.Array]) -> jax.Array:
    return jnp.stack([w.sum() for w in weights])
