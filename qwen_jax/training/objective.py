"""What training makes small: the losses of a batch, or of a part of one, and their metrics."""

import dataclasses
import functools
from typing import Any, get_args

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.models.placement import arrange
from qwen_jax.nn.attention import Tokens
from qwen_jax.nn.low_rank import LowRankWeight, cast, merged
from qwen_jax.training.balancing import (
    Pooling,
    RouterSums,
    balance_loss,
    router_z_loss,
    sum_routing,
)
from qwen_jax.training.layers import (
    Params,
    Remat,
    rematerialise,
    run_layers,
    scan_layers,
    stack_layers,
    stacked_shardings,
)
from qwen_jax.training.loss import cross_entropy

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Batch:
    """Tokens to learn from.

    Attributes:
      input_ids: int [B, T].
      targets: int [B, T], what each token is to predict; None for the token after it.
      loss_weights: float [B, T], of the targets; where those are None of the input ids, each as
        what is predicted. None for 1.
      attention_mask: [B, T], 1 for real tokens; padding is neither predicted nor learned from.
      positions: int [B, T]; None for 0..T-1.
      segment_ids: int [B, T], which of several texts in the row a token belongs to; it sees that
        text only, and its last token predicts nothing.
    """

    input_ids: jax.Array
    targets: jax.Array | None = None
    loss_weights: jax.Array | None = None
    attention_mask: jax.Array | None = None
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How a step computes; clipping, schedules and decay are the optimiser's.

    Attributes:
      dtype: of the parameters' copy and the activations.
      scan: whether layers of a kind are compiled once and scanned over their stacked weights, or
        compiled one by one, which spares the copy and, on CPU, time.
      remat: what is kept for the backward pass, as `training.layers.run_layers` has it.
      microbatches: parts of the batch that are computed one after another, their gradients summed
        in float32. The update is that of the whole batch; where a balancing loss counts, the parts
        run forward once more, before, to learn how the whole batch uses the experts.
      z_loss: coefficient of the softmax's squared log denominator, mean over tokens.
      balance_loss: coefficient of the experts' balancing loss; None for the config's.
      balance_pooling: as `training.balancing.balance_loss` has it.
      router_z_loss: coefficient of the routers' squared log denominator.
      mtp_loss: coefficient of the mean cross entropy of the tokens further on, where the model has
        a head for them (arXiv 2412.19437, section 2.2). With 0 the head is not trained.
      block_size: tokens of a device whose logits it holds at once.

    Raises:
      UserError: a value that none of these can have.
    """

    dtype: str = "bfloat16"
    scan: bool = True
    remat: Remat = "full"
    microbatches: int = 1
    z_loss: float = 0.0
    balance_loss: float | None = None
    balance_pooling: Pooling = "layer"
    router_z_loss: float = 0.0
    mtp_loss: float = 0.1
    block_size: int = 1024

    def __post_init__(self):
        known = {
            "dtype": ("float32", "bfloat16"),
            "remat": get_args(Remat),
            "balance_pooling": get_args(Pooling),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"{name} = {getattr(self, name)} is not supported; known: {', '.join(values)}"
                )
        for name in ("z_loss", "balance_loss", "router_z_loss", "mtp_loss"):
            if not (getattr(self, name) or 0.0) >= 0:
                raise UserError(f"{name} = {getattr(self, name)} must not be negative")
        for name in ("block_size", "microbatches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1")


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
    cross_entropy: jax.Array
    log_z_squared: jax.Array
    router: RouterSums | None


def objective(
    model: Decoder, params: Params, batch: Batch, options: TrainOptions, whole: Sums | None = None
) -> tuple[jax.Array, Sums]:
    """What training makes small: float32 [], to be differentiated by `params`.

    Means are over the whole batch, whatever device has it: over the loss weights for the
    vocabulary's terms, over real tokens for the routers'.

    Args:
      model: what is trained.
      params: as `load_pretrained` returns them.
      batch: the batch, or a part of it.
      options: of the step.
      whole: for a part, `sums_ahead` of the whole batch; the parts' objectives add up to the
        batch's.

    Returns:
      The objective, and the sums of `batch`.
    """
    params = _as_computed(model, params, options)
    hidden, tokens, router = _run(model, params, batch, options)
    tied = model.config.tie_word_embeddings
    head = params["embed_tokens" if tied else "lm_head"]["weight"]
    if isinstance(head, LowRankWeight):
        head = merged(head, head.dtype)
    targets, weights = _targets(batch, len(hidden))
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
    loss, *ahead = _share(jnp.stack(totals), whole.weights)
    if ahead:
        loss += options.mtp_loss * jnp.stack(ahead).mean()
    if router is not None:
        balance = balance_loss(router, options.balance_pooling, whole.router)
        loss += _balance_coefficient(model, options) * balance
        loss += options.router_z_loss * router_z_loss(router, whole.router)
    return loss, sums


def sums_ahead(model: Decoder, params: Params, parts: Batch, options: TrainOptions) -> Sums:
    """Of a batch in parts, what `objective` of each has to know of the whole.

    Args:
      parts: with a leading axis.

    Returns:
      The batch's sums; cross entropies are 0. The experts' use costs a forward pass of all parts
      and is 0 where no loss asks for it.
    """
    params = _as_computed(model, params, options)

    def part_sums(batch: Batch) -> Sums:
        steps = _num_predictions(model, options)
        weights = _sum_rows(_targets(batch, steps)[1])
        router = jax.eval_shape(lambda: _run(model, params, batch, options)[2])
        if router is not None and _balance_coefficient(model, options):
            router = _run(model, params, batch, options)[2]
        elif router is not None:
            router = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), router)
            router = router.replace(tokens=_routed_tokens(batch, router.tokens, steps))
        return Sums(weights, jnp.zeros_like(weights), jnp.zeros(()), router)

    sums = jax.lax.map(part_sums, parts)
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), sums)


def metrics_of(sums: Sums, options: TrainOptions) -> Metrics:
    """What is reported of a batch with these sums. Losses are before their coefficients.

    Returns:
      "loss" (the mean cross entropy in nats), "tokens" (the sum of loss weights) and "z_loss";
      where tokens further on are learned "mtp_loss", the mean over them; with experts
      "balance_loss", "router_z_loss" and "expert_counts", int32 [sparse layers, E].
    """
    loss, *ahead = _share(sums.cross_entropy, sums.weights)
    metrics = {
        "loss": loss,
        "tokens": sums.weights[0],
        "z_loss": _share(sums.log_z_squared, sums.weights[0]),
    }
    if ahead:
        metrics["mtp_loss"] = jnp.stack(ahead).mean()
    if sums.router is not None:
        metrics |= {
            "balance_loss": balance_loss(sums.router, options.balance_pooling),
            "router_z_loss": router_z_loss(sums.router),
            "expert_counts": sums.router.counts,
        }
    return metrics


def _as_computed(model: Decoder, params: Params, options: TrainOptions) -> Params:
    config = model.config
    with jax.named_scope("cast"):
        params = cast(params, options.dtype)
        if options.scan:
            params = stack_layers(config, params)
            if model.mesh is not None:
                places = stacked_shardings(config, model.mesh, params)
                params = jax.lax.with_sharding_constraint(params, places)
    return params


def _run(
    model: Decoder, params: Params, batch: Batch, options: TrainOptions
) -> tuple[list[jax.Array], Tokens, RouterSums | None]:
    """What the output head reads, for the next token and each further on, and the routers' sums."""
    variables = {"params": params}
    x, tokens = model.apply(
        variables,
        batch.input_ids,
        batch.attention_mask,
        batch.positions,
        batch.segment_ids,
        method="begin",
    )
    run = scan_layers if options.scan else run_layers
    x, router = run(model, params, x, tokens, options.remat)
    hidden, routers = [model.apply(variables, x, method="finish")], [router]

    def look_ahead(params: Params, x: jax.Array, ids: jax.Array, own: Tokens, step: int) -> Any:
        x, routing = model.apply({"params": params}, x, ids, own, step, method="look_ahead")
        if routing is None:
            return x, None
        return x, jax.tree.map(lambda a: a[None], sum_routing(routing, own.real))

    next_ids, has_next = batch.input_ids, _real(batch)
    for step in range(_num_predictions(model, options) - 1):
        # A text's last token joins a stranger behind it; no other token sees what comes of that,
        # and it does not count among those that are routed.
        next_ids, has_next = _shift(next_ids), _shift(has_next) & _follows(batch)
        own = tokens.replace(real=arrange(tokens, has_next))
        head = functools.partial(look_ahead, step=step)
        with jax.named_scope("mtp"):
            head = rematerialise(head, options.remat, in_loop=False)
            x, router = head(params, hidden[-1], arrange(tokens, next_ids), own)
        hidden.append(x)
        routers.append(router)
    routers = [router for router in routers if router is not None]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routers) if routers else None
    return hidden, tokens, joined


def _routed_tokens(batch: Batch, like: jax.Array, steps: int) -> jax.Array:
    """How many tokens each sparse layer routes, those of the head last."""
    real = has_next = _real(batch)
    ahead = []
    for _ in range(steps - 1):
        has_next = _shift(has_next) & _follows(batch)
        ahead.append(has_next.sum())
    layers = [real.sum()] * (len(like) - len(ahead)) + ahead
    return jnp.stack(layers).astype(like.dtype)


def _num_predictions(model: Decoder, options: TrainOptions) -> int:
    return 1 + (model.config.mtp_layers if options.mtp_loss else 0)


def _balance_coefficient(model: Decoder, options: TrainOptions) -> float:
    given = options.balance_loss
    return model.config.moe.aux_loss_coef if given is None else given


def _targets(batch: Batch, count: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """What each token is to predict, [B, T], next and further on, and the float32 weights."""
    ids, targets, weights = batch.input_ids, batch.targets, batch.loss_weights
    weights = jnp.ones(ids.shape) if weights is None else weights.astype(jnp.float32)
    if targets is None:
        targets, weights = _shift(ids), _shift(weights) * _follows(batch)
    else:
        weights *= _real(batch)
    found = [(targets, weights)]
    while len(found) < count:
        targets, weights = _shift(targets), _shift(weights) * _follows(batch)
        found.append((targets, weights))
    return [targets for targets, _ in found], [weights for _, weights in found]


def _follows(batch: Batch) -> jax.Array:
    """bool [B, T], whether a token of the same text stands behind each real one."""
    real = _real(batch)
    follows = real & _shift(real)
    if batch.segment_ids is not None:
        follows &= _shift(batch.segment_ids) == batch.segment_ids
    return follows


def _real(batch: Batch) -> jax.Array:
    if batch.attention_mask is None:
        return jnp.ones(batch.input_ids.shape, bool)
    return batch.attention_mask.astype(bool)


def _shift(a: jax.Array) -> jax.Array:
    """What stands one place further on in each row; 0 behind its end."""
    return jnp.pad(a[:, 1:], ((0, 0), (0, 1)))


def _sum_rows(weights: list[jax.Array]) -> jax.Array:
    return jnp.stack([w.sum() for w in weights])


def _share(total: jax.Array, count: jax.Array) -> jax.Array:
    """`total / count`, 0 of nothing: a batch with nothing to learn has loss 0 and no gradients."""
    return total * jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
