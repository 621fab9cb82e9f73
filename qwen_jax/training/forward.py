"""A pass of training: parameters in the dtype that is computed with, what the output head reads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.models.decoder import Decoder
from qwen_jax.models.placement import arrange
from qwen_jax.nn.low_rank import LowRankWeight, cast, merged
from qwen_jax.nn.tokens import Tokens
from qwen_jax.training.balancing import RouterSums, sum_routing
from qwen_jax.training.batch import Batch, follows, real_tokens, shift
from qwen_jax.training.layers import rematerialise, run_layers, scan_layers
from qwen_jax.training.stacking import (
    Params,
    is_stacked,
    shardings_of,
    stack_layers,
    unstack_layers,
)
from qwen_jax.training.step_options import TrainOptions


def as_computed(model: Decoder, params: Params, options: TrainOptions) -> Params:
    """`params` as `forward` takes them: in the step's dtype, stacked where layers are scanned.

    They may lie stacked already, or not.
    """
    config = model.config
    with jax.named_scope("cast"):
        params = cast(params, options.dtype)
        if not options.scan:
            return unstack_layers(params)
        if not is_stacked(params):
            params = stack_layers(config, params)
        if model.mesh is not None:
            places = shardings_of(config, model.mesh, params)
            params = jax.lax.with_sharding_constraint(params, places)
    return params


def forward(
    model: Decoder, params: Params, batch: Batch, options: TrainOptions
) -> tuple[list[jax.Array], Tokens, RouterSums | None]:
    """A pass over a batch.

    Args:
      model: what is run.
      params: of `as_computed`.
      batch: the batch, or a part of it.
      options: of the step.

    Returns:
      What the output head reads, [B', T', D], for the next token and each further on; where the
      tokens stand, for `placement.arrange` and `restore`; and the sums of the sparse layers'
      routers, first to last, and behind them of the head for tokens further on.
    """
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

    next_ids, has_next = batch.input_ids, real_tokens(batch)
    for step in range(num_predictions(model, options) - 1):
        # A text's last token joins a stranger behind it; no other token sees what comes of that,
        # and it does not count among those that are routed.
        next_ids, has_next = shift(next_ids), shift(has_next) & follows(batch)
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


def output_head(model: Decoder, params: Params) -> jax.Array:
    """The dense matrix [V, D] that turns hidden states into logits."""
    tied = model.config.tie_word_embeddings
    head = params["embed_tokens" if tied else "lm_head"]["weight"]
    return merged(head, head.dtype) if isinstance(head, LowRankWeight) else head


def router_sums(
    model: Decoder, params: Params, batch: Batch, options: TrainOptions, counted: bool
) -> RouterSums | None:
    """The sums of a batch's routers alone; without `counted` 0 but for the number of tokens.

    Args:
      params: of `as_computed`.
      counted: whether the use of experts is wanted, which costs a pass.
    """
    router = jax.eval_shape(lambda: forward(model, params, batch, options)[2])
    if router is None or counted:
        return router and forward(model, params, batch, options)[2]
    router = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), router)
    steps = num_predictions(model, options)
    return router.replace(tokens=_routed_tokens(batch, router.tokens, steps))


def _routed_tokens(batch: Batch, like: jax.Array, steps: int) -> jax.Array:
    """How many tokens each sparse layer routes, those of the head last."""
    real = has_next = real_tokens(batch)
    ahead = []
    for _ in range(steps - 1):
        has_next = shift(has_next) & follows(batch)
        ahead.append(has_next.sum())
    layers = [real.sum()] * (len(like) - len(ahead)) + ahead
    return jnp.stack(layers).astype(like.dtype)


def num_predictions(model: Decoder, options: TrainOptions) -> int:
    """How many tokens each token predicts: the next, and those of the head for more."""
    return 1 + (model.config.mtp_layers if options.mtp_loss else 0)
