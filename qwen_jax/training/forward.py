"""A pass of training: parameters in the dtype that is computed with, what the output head reads."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.models.placement import arrange
from qwen_jax.nn.low_rank import LowRankWeight, cast, merged
from qwen_jax.nn.tokens import Tokens
from qwen_jax.sharding.axes import num_shards
from qwen_jax.training.balancing import DOMAIN, make_grouping
from qwen_jax.training.batch import Batch, follows, key_of, real_tokens, shift
from qwen_jax.training.layers import Watch, rematerialise, run_layers, scan_layers
from qwen_jax.training.partition import combine
from qwen_jax.training.routing_sums import ALL_TOKENS, GLOBAL, Grouping, RouterSums, sum_routing
from qwen_jax.training.score_bias import take_apart
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
        # Steps move biases by less than bfloat16 can tell.
        params, biases = take_apart(params)
        params = combine(cast(params, options.dtype), biases)
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
    watch = _watch(model, batch, tokens, options)
    run = scan_layers if options.scan else run_layers
    x, router = run(model, params, x, tokens, options.remat, watch)
    hidden, routers = [model.apply(variables, x, method="finish")], [router]

    def look_ahead(params: Params, x: jax.Array, ids: jax.Array, own: Tokens, step: int) -> Any:
        rngs = watch.rngs(model.config.num_hidden_layers + step)
        x, routing = model.apply(
            {"params": params}, x, ids, own, step, method="look_ahead", rngs=rngs
        )
        if routing is None:
            return x, None
        sums = sum_routing(routing, own.real, watch.groupings, watch.each)
        return x, jax.tree.map(lambda a: a[None], sums)

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


def with_groups(model: Decoder, batch: Batch, options: TrainOptions) -> Batch:
    """`batch` with the groups that its rows or tokens are balanced and counted in.

    A batch that is computed in parts has them beforehand: what is even in all of it is no matter of
    a part.
    """
    spec = model.config.moe
    if spec is None or batch.groups is not None:
        return batch
    balance, groups = options.balance, {}
    devices = 1 if model.mesh is None else num_shards(model.mesh, "batch")
    for name in balance.groupings(spec):
        if name != DOMAIN:
            shape = batch.input_ids.shape
            groups[name] = make_grouping(name, shape, balance, devices, key_of(batch))
        elif batch.domains is not None:
            groups[name] = Grouping(batch.domains, balance.num_domains)
    return batch.replace(groups=groups)


def _watch(model: Decoder, batch: Batch, tokens: Tokens, options: TrainOptions) -> Watch:
    """What a pass asks of its routers."""
    spec, balance = model.config.moe, options.balance
    if spec is None:
        return Watch()
    given = ALL_TOKENS if batch.groups is None else batch.groups
    groups = {name: _arranged(tokens, given[name]) for name in given}
    for name in balance.without_figures().groupings(spec):
        if name not in groups:
            raise UserError(
                f"balance: groups of kind {name} are of rows of texts, which this objective makes "
                "itself; balance all of the batch together (global)"
            )
    key = key_of(batch) if model.router.noise else None
    return Watch(groups, balance.figures, key)


def _arranged(tokens: Tokens, grouping: Grouping) -> Grouping:
    """A grouping of a call's rows or tokens, as the layers have them."""
    ids = grouping.ids
    if ids is None:
        return grouping
    if ids.ndim == 1:
        return grouping.replace(ids=jnp.pad(ids, (0, len(tokens.slots) - len(ids))))
    return grouping.replace(ids=arrange(tokens, ids))


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
    options = dataclasses.replace(options, balance=options.balance.without_figures())
    router = jax.eval_shape(lambda: forward(model, params, batch, options)[2])
    if router is None or counted:
        return router and forward(model, params, batch, options)[2]
    router = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), router)
    # The router's other losses are means over all tokens.
    tokens = _routed_tokens(batch, router.tokens, num_predictions(model, options))
    groups = router.groups | {GLOBAL: router.groups[GLOBAL].replace(tokens=tokens[:, None])}
    return router.replace(groups=groups)


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
