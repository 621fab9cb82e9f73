"""Losses that keep a router's experts evenly used and its logits small."""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.nn.moe import Routing

Pooling = Literal["layer", "model"]


@flax.struct.dataclass
class RouterSums:
    """What the losses need of routed tokens; of several layers, with a leading axis each.

    Attributes:
      counts: int32 [..., E], tokens that chose each expert.
      probabilities: float32 [..., E], the sum over tokens of the router's softmax.
      log_z_squared: float32 [...], of the squared logarithm of its denominator.
      tokens: int32 [...], how many; padding is nowhere counted.
    """

    counts: jax.Array
    probabilities: jax.Array
    log_z_squared: jax.Array
    tokens: jax.Array


def sum_routing(routing: Routing, real: jax.Array | None = None) -> RouterSums:
    """The sums of one layer; `real` bool [B, T], None for all."""
    logits = routing.logits.astype(jnp.float32)
    real = jnp.ones(logits.shape[:-1], bool) if real is None else real
    token_axes = tuple(range(logits.ndim - 1))
    probabilities = jax.nn.softmax(logits, axis=-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return RouterSums(
        counts=routing.counts,
        probabilities=jnp.sum(probabilities, axis=token_axes, where=real[..., None]),
        log_z_squared=jnp.sum(log_z**2, where=real),
        tokens=jnp.sum(real, dtype=jnp.int32),
    )


def balance_loss(
    sums: RouterSums, pooling: Pooling = "layer", whole: RouterSums | None = None
) -> jax.Array:
    """`E * sum_i f_i P_i` (arXiv 2101.03961), over the tokens of all devices.

    f_i is the number of choices of expert i by a token, with no gradient, and P_i its mean
    probability. Even use gives k, the number of choices of a token.

    Args:
      sums: of L layers, with a leading axis.
      pooling: "layer" for the mean of the layers' losses; "model" to pool their tokens first, as
        transformers does. Layers that each use few experts look even where those differ.
      whole: where `sums` are of a part of a batch, those of all of it; f_i and the means are then
        over the whole, and the parts' losses add up to its loss.

    Returns:
      float32 [].
    """
    whole = sums if whole is None else whole
    counts, probabilities, tokens = whole.counts, sums.probabilities, whole.tokens
    if pooling == "model":
        counts, probabilities, tokens = (
            a.sum(axis=0, keepdims=True) for a in (counts, probabilities, tokens)
        )
    tokens = jnp.maximum(tokens, 1)[:, None].astype(jnp.float32)
    E = counts.shape[-1]
    return E * jnp.sum((counts / tokens) * (probabilities / tokens), axis=-1).mean()


def router_z_loss(sums: RouterSums, whole: RouterSums | None = None) -> jax.Array:
    """The mean over tokens and layers of `logsumexp(logits)**2` (arXiv 2202.08906), float32 [].

    `whole` as for `balance_loss`.
    """
    tokens = (sums if whole is None else whole).tokens
    return sums.log_z_squared.sum() / jnp.maximum(tokens.sum(), 1)
