"""Figures of how experts are used: balance, its cost, specialisation, and how sure a router is.

All are of counts or of `routing_sums`, for a batch in training, or for texts that a checkpoint
reads. Loads are [..., E], how many choices each expert got.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from qwen_jax.config import MoeSpec
from qwen_jax.training.balancing import DOMAIN
from qwen_jax.training.routing_sums import RouterSums

# Below this part of the mean load an expert counts as dead.
_DEAD = 0.01
CAPACITY_FACTORS = (1.0, 1.25, 2.0)
_MOST_DEVICES = 64

Figures = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Packed(Figures):
    """Figures in one array, since each output of a compiled step costs its caller some time.

    Attributes:
      joined: float32 [n], all values.
      shapes: names and shapes, in their order.
    """

    joined: jax.Array
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, name: str) -> jax.Array:
        start = 0
        for own, shape in self.shapes:
            stop = start + math.prod(shape)
            if own == name:
                return self.joined[start:stop].reshape(shape)
            start = stop
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def pack(figures: Figures) -> Packed:
    """Figures of one type, as they are to leave a compiled function."""
    joined = jnp.concatenate([figure.reshape(-1) for figure in figures.values()])
    return Packed(joined, tuple((name, figure.shape) for name, figure in figures.items()))


def max_violation(loads: jax.Array) -> jax.Array:
    """MaxVio [...]: by what part of the mean load the largest is above it (arXiv 2408.15664)."""
    # Counts times E may be more than an int32 holds.
    loads = loads.astype(jnp.float32)
    total = loads.sum(axis=-1)
    multiple = loads.max(axis=-1) * loads.shape[-1] / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, multiple - 1, 0)


def load_figures(loads: jax.Array) -> dict[str, jax.Array]:
    """How even loads are, float32 [...] each.

    Returns:
      "load_entropy", of the shares of all choices, as a part of that of even use, 1 with one
      expert; "load_cv", the coefficient of variation, standard deviation over mean; "load_gini",
      Gini's coefficient, 0 for even use and 1 - 1 / E where one expert has all; "dead_experts", how
      many have less than 1% of the mean load; and "drop_" with a capacity factor, what part of all
      choices an expert's capacity would drop, were there one: the even share times the factor,
      rounded up.
    """
    E = loads.shape[-1]
    loads = loads.astype(jnp.float32)
    total = loads.sum(axis=-1, keepdims=True)
    some = jnp.where(total > 0, total, 1)
    shares = loads / some
    terms = {
        "load_entropy": entr(shares) / math.log(E) if E > 1 else jnp.ones_like(shares),
        "load_cv": ((loads * E - total) / some) ** 2 / E,
        "load_gini": jnp.sort(shares, axis=-1) * (2 * jnp.arange(1, E + 1) - E - 1) / E,
        "dead_experts": loads < _DEAD * total / E,
    }
    for factor in CAPACITY_FACTORS:
        over = loads - jnp.ceil(factor * total / E)
        terms[f"drop_{factor:g}"] = jnp.maximum(over, 0) / some
    # In the step of a small model a sum costs as much as its numbers: one for all.
    sums = jnp.sum(jnp.stack([term.astype(jnp.float32) for term in terms.values()]), axis=-1)
    figures = dict(zip(terms, sums, strict=True))
    return figures | {"load_cv": jnp.sqrt(figures["load_cv"])}


def overload(loads: jax.Array, devices: int) -> jax.Array:
    """[...], by what part the busiest of so many devices that share the experts is above the mean.

    All wait for it, so that the experts' part of a step takes so much longer. Each device has as
    many experts, in their order.
    """
    shared = loads.reshape(*loads.shape[:-1], devices, -1).sum(axis=-1)
    return max_violation(shared)


def information(counts: jax.Array) -> jax.Array:
    """[...], mutual information in bits of rows and columns, of how often they meet [..., R, C].

    Of domains and experts it is how far the experts specialise: 0 where each domain uses all alike.
    """
    joint = counts.astype(jnp.float32)
    total = joint.sum(axis=(-2, -1), keepdims=True)
    joint /= jnp.where(total > 0, total, 1)
    apart = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    ratio = jnp.where(joint > 0, joint, 1) / jnp.where(joint > 0, apart, 1)
    return jnp.sum(joint * jnp.log2(ratio), axis=(-2, -1))


def co_activation(together: jax.Array) -> jax.Array:
    """[..., E, E], of the tokens that chose the expert of a row, the part that chose the column's.

    Args:
      together: `TokenSums.together`.
    """
    own = jnp.diagonal(together, axis1=-2, axis2=-1)[..., None]
    return together / jnp.where(own > 0, own, 1)


def shared_devices(num_experts: int) -> tuple[int, ...]:
    """Numbers of devices, powers of 2 up to 64, that can share so many experts evenly."""
    counts = (1 << n for n in range(1, _MOST_DEVICES.bit_length()))
    return tuple(count for count in counts if num_experts % count == 0)


def router_figures(sums: RouterSums, spec: MoeSpec) -> Figures:
    """All figures of a batch or of several, [L] each unless it says otherwise.

    Args:
      sums: with those of each token.
      spec: of the layers.

    Returns:
      "load" [L, E], as multiples of the even share; "max_vio", of micro-batches "max_vio_micro";
      `load_figures`; "overload_" with a number of devices, "router_entropy" (nats),
      "top_probability", "margin", "logit_scale" (the root of the logits' mean variance over
      experts), "log_z", "pair_share" (the largest part of an expert's tokens that another one
      shares), and where rows have domains "domain_information" (bits) and "domain_share" [L,
      domains, E], what part of a domain's choices each expert has.
    """
    loads = sums.counts
    even = loads.mean(axis=-1, keepdims=True)
    figures = {
        "load": loads / jnp.where(even > 0, even, 1),
        "max_vio": max_violation(loads),
        **load_figures(loads),
    }
    if "micro" in sums.groups:
        figures["max_vio_micro"] = _mean_violation(sums.groups["micro"].counts)
    for devices in shared_devices(spec.num_experts):
        figures[f"overload_{devices}"] = overload(loads, devices)
    if sums.each is not None:
        tokens, each = jnp.maximum(sums.tokens, 1), sums.each
        apart = 1 - jnp.eye(spec.num_experts)
        figures |= {
            "router_entropy": each.entropy / tokens,
            "top_probability": each.top_probability / tokens,
            "margin": each.margin / tokens,
            "logit_scale": jnp.sqrt(each.logit_variance / tokens),
            "log_z": each.log_z / tokens,
            "pair_share": (co_activation(each.together) * apart).max(axis=(-2, -1)),
        }
    if DOMAIN in sums.groups:
        counts = sums.groups[DOMAIN].counts
        figures["domain_information"] = information(counts)
        figures["domain_share"] = counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return figures


# What is of a batch, or of its parts, by itself.
_OF_BATCH = ("max_vio", "max_vio_micro")


def of_batch(figures: Figures) -> Figures:
    """The figures of a batch that those of several together do not tell."""
    return {name: figures[name] for name in _OF_BATCH if name in figures}


def over_batches(whole: Figures, each: Sequence[Figures]) -> Figures:
    """Figures of several batches together, beside the means of what is of one by itself."""
    own = {
        name: jnp.mean(jnp.stack([figures[name] for figures in each]), axis=0)
        for name in _OF_BATCH
        if name in whole
    }
    found = {**whole, **own}
    return found | {"max_vio_batch": own["max_vio"], "max_vio": whole["max_vio"]}


def _mean_violation(counts: jax.Array) -> jax.Array:
    """MaxVio of loads [..., G, E], the mean over the groups that have any."""
    some = counts.sum(axis=-1) > 0
    return max_violation(counts).sum(axis=-1) / jnp.maximum(some.sum(axis=-1), 1)
