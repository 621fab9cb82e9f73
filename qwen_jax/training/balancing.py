"""What keeps a router's experts evenly used and its logits small: the losses, and their options.

All of a batch's tokens may be balanced together, or those of a part of it by themselves, which asks
for more: where rows differ in kind, experts that specialise are even in the whole and not in a part
(arXiv 2501.11873). One loss does both, by the groups that tokens are counted in.

A value of 1 is even use, whatever the number of experts and of choices.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from qwen_jax.config import MoeSpec
from qwen_jax.training.checks import Bounds, check_fields
from qwen_jax.training.routing_sums import GLOBAL, Grouping, RouterSums

Group = Literal["sequence", "micro", "device", "global", "shuffled", "buffer"]
Pooling = Literal["layer", "model"]
Form = Literal["all", "first"]
BiasUpdate = Literal["sign", "proportional"]

# The grouping that counts for each group; a buffer adds micro-batches up.
_COUNTED_IN = {"buffer": "micro"}
DOMAIN = "domain"


def grouping_of(group: Group) -> str:
    """The name of the grouping that a group's tokens are counted in."""
    return _COUNTED_IN.get(group, group)


@dataclasses.dataclass(frozen=True)
class BalanceOptions:
    """How a run keeps its experts in use.

    Groups are "sequence", each row of the batch by itself; "micro", `microbatch_rows` rows after
    one another; "device", the rows of each device that shares the batch out; "global", all of it,
    however it is computed; "shuffled", as many tokens as in a micro-batch, drawn of all; "buffer",
    each micro-batch against what it and those before it in the step have counted (arXiv 2501.11873,
    section 3).

    Attributes:
      loss: coefficient of the balancing loss; None for the config's, whose unit is transformers'.
      group: what it balances.
      form: "all" counts each of a token's choices, which with one choice is Switch's loss (arXiv
        2101.03961); "first" the first alone, as GShard does (arXiv 2006.16668).
      pooling: "layer" for the mean of the layers' losses; "model" to pool their tokens first and
        multiply with k, as transformers does. Layers that each use few experts look even where
        those differ.
      complement: coefficient of a second such loss, weak beside another way of balancing.
      complement_group: what that balances; the default is DeepSeek-V3's (arXiv 2412.19437).
      microbatch_rows: rows of a micro-batch.
      z_loss: coefficient of the routers' squared log denominator (arXiv 2202.08906).
      similarity: coefficient of `similarity_loss`.
      bias_rate: by how much a step moves the bias of each expert's score, in a model whose config
        has one (`moe.score_bias`), against its load (arXiv 2408.15664); 0 for not at all.
      bias_update: "sign" moves it by the rate; "proportional" by the rate times what is missing of
        the even share, as a part of that share.
      bias_group: whose counts move it. Of several groups it is the mean of their moves.
      figures: whether `router_figures` are made in each step.
      num_domains: how many domains the rows of batches are of, for figures; a run counts the
        sources of its data where they are mixed by weight.

    Raises:
      UserError: a value that none of these can have.
    """

    loss: float | None = None
    group: Group = "global"
    form: Form = "all"
    pooling: Pooling = "layer"
    complement: float = 0.0
    complement_group: Group = "sequence"
    microbatch_rows: int = 1
    z_loss: float = 0.0
    similarity: float = 0.0
    bias_rate: float = 0.0
    bias_update: BiasUpdate = "sign"
    bias_group: Group = "global"
    figures: bool = True
    num_domains: int = 0

    def __post_init__(self):
        coefficient, groups = Bounds(least=0), get_args(Group)
        check_fields(
            self,
            loss=coefficient,
            group=groups,
            form=get_args(Form),
            pooling=get_args(Pooling),
            complement=coefficient,
            complement_group=groups,
            microbatch_rows=Bounds(least=1),
            z_loss=coefficient,
            similarity=coefficient,
            bias_rate=coefficient,
            bias_update=get_args(BiasUpdate),
            bias_group=groups,
            num_domains=coefficient,
        )

    def coefficient(self, spec: MoeSpec) -> float:
        """Of the balancing loss."""
        if self.loss is not None:
            return self.loss
        # Where use is even, transformers' loss is k.
        unit = spec.num_experts_per_tok if self.pooling == "layer" else 1
        return spec.aux_loss_coef * unit

    def groupings(self, spec: MoeSpec) -> tuple[str, ...]:
        """The names of the groupings that tokens are counted in, "global" first."""
        asked = [GLOBAL]
        if self.coefficient(spec):
            asked.append(self.group)
        if self.complement:
            asked.append(self.complement_group)
        if self.bias_rate:
            asked.append(self.bias_group)
        if self.figures:
            asked.append("micro")
            if self.num_domains:
                asked.append(DOMAIN)
        return tuple(dict.fromkeys(grouping_of(group) for group in asked))

    def without_figures(self) -> "BalanceOptions":
        """What is made small, and nothing else."""
        return dataclasses.replace(self, figures=False)


def make_grouping(
    name: str, shape: tuple[int, int], options: BalanceOptions, devices: int, key: jax.Array
) -> Grouping:
    """Which group each row or token of a whole batch is in.

    Args:
      name: of `BalanceOptions.groupings`, but for the domains, which the data know.
      shape: B and T.
      options: that has the rows of a micro-batch.
      devices: that share the rows out.
      key: to draw from.
    """
    (B, T), rows = shape, options.microbatch_rows
    row = jnp.arange(B, dtype=jnp.int32)
    match name:
        case "global":
            return Grouping()
        case "sequence":
            return Grouping(row, B)
        case "micro":
            return Grouping(row // rows, -(-B // rows))
        case "device":
            share = -(-B // devices)
            return Grouping(row // share, -(-B // share))
        case "shuffled":
            drawn = jax.random.permutation(key, jnp.arange(B * T, dtype=jnp.int32))
            return Grouping(drawn.reshape(B, T) // (rows * T), -(-B // rows))
    raise ValueError(f"{name!r} is no grouping of rows or tokens")


def balance_loss(
    sums: RouterSums,
    spec: MoeSpec,
    group: Group = "global",
    form: Form = "all",
    pooling: Pooling = "layer",
    whole: RouterSums | None = None,
) -> jax.Array:
    """`sum_i f_i P_i` in each group, their mean by tokens (arXiv 2101.03961, 2501.11873).

    f_i is what expert i has of a group's choices, as a multiple of its even share and with no
    gradient; P_i its mean probability. Even use gives 1, and E / k where all tokens
    choose the same.

    Args:
      sums: of L layers, with a leading axis.
      spec: of the layers.
      group, form, pooling: as `BalanceOptions` has them.
      whole: where `sums` are of a part of a batch, those of all of it; f_i and the means are then
        over the whole, and the parts' losses add up to its loss.

    Returns:
      float32 [].
    """
    name = grouping_of(group)
    own = sums.groups[name]
    counted = own if whole is None else whole.groups[name]
    counts = counted.firsts if form == "first" else counted.counts
    probabilities, tokens = own.probabilities, counted.tokens
    if pooling == "model":
        counts, probabilities, tokens = (
            a.sum(axis=0, keepdims=True) for a in (counts, probabilities, tokens)
        )
    total = jnp.maximum(tokens.sum(axis=-1), 1).astype(jnp.float32)
    if group == "buffer":
        counts, tokens = jnp.cumsum(counts, axis=-2), jnp.cumsum(tokens, axis=-1)
    k = 1 if form == "first" else spec.num_experts_per_tok
    share = jnp.maximum(tokens, 1)[..., None] * (k / spec.num_experts)
    losses = jnp.sum(counts / share * probabilities, axis=(-2, -1)) / total
    return losses.mean() * (spec.num_experts_per_tok if pooling == "model" else 1)


def router_z_loss(sums: RouterSums, whole: RouterSums | None = None) -> jax.Array:
    """The mean over tokens and layers of `logsumexp(logits)**2` (arXiv 2202.08906), float32 [].

    `whole` as for `balance_loss`.
    """
    tokens = (sums if whole is None else whole).tokens
    return sums.log_z_squared.sum() / jnp.maximum(tokens.sum(), 1)


def similarity_loss(weights: list[jax.Array]) -> jax.Array:
    """How far routers are from orthogonal, so that like tokens get like experts: float32 [].

    The sum of `|R R^T - I|`, mean over layers (arXiv 2506.14038, with R's rows the experts).

    Args:
      weights: [..., E, D], of one or more layers each.
    """
    losses = []
    for weight in weights:
        weight = weight.astype(jnp.float32)
        products = jnp.einsum("...ed,...fd->...ef", weight, weight)
        losses.append(jnp.abs(products - jnp.eye(weight.shape[-2])).sum(axis=(-2, -1)).reshape(-1))
    return jnp.concatenate(losses).mean()
