"""The bias of routers' scores, which balances experts without a loss (arXiv 2408.15664).

It takes part in the choice of experts and not in their weights, so that it has no gradient. A step
moves it by the experts' loads; the optimiser never sees it, and the train state keeps it apart.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.checkpoint.names import SCORE_BIAS
from qwen_jax.config import ModelConfig
from qwen_jax.models.decoder import parameter_shapes
from qwen_jax.training.balancing import BalanceOptions, grouping_of
from qwen_jax.training.partition import partition
from qwen_jax.training.routing_sums import RouterSums
from qwen_jax.training.stacking import Params, stacked_names


def is_score_bias(name: str) -> bool:
    """Of a slash-separated path, whether it is a bias of a router's scores."""
    return name.endswith(SCORE_BIAS)


def take_apart(params: Any) -> tuple[Any, Any]:
    """What may have gradients, and the biases, each with None in the other's places.

    The second is None where there are no biases.
    """
    rest, biases = partition(params, lambda name: not is_score_bias(name))
    return (rest, biases) if jax.tree.leaves(biases) else (params, None)


def fit_biases(config: ModelConfig, params: Params) -> Params:
    """`params` with biases of 0 where the config has some that are not there, and no others."""

    def fit(shapes: Any, tree: Any, name: str) -> Any:
        if not isinstance(shapes, dict):
            return tree
        missing = {key for key in shapes if is_score_bias(f"{name}/{key}")} - tree.keys()
        kept = {
            key: fit(shapes.get(key), value, f"{name}/{key}")
            for key, value in tree.items()
            if key in shapes or not is_score_bias(f"{name}/{key}")
        }
        return kept | {key: jnp.zeros(shapes[key].shape, jnp.float32) for key in missing}

    return fit(parameter_shapes(config), params, "")


def moves_of(sums: RouterSums, options: BalanceOptions) -> jax.Array:
    """What a step adds to the biases, float32 [L, E], of the L layers that sums are of.

    With c_i the choices of expert i in a group and c their mean over experts, a group moves it by
    `rate * sign(c - c_i)`, or in proportion by `rate * (c - c_i) / c`; the paper leaves the scale
    of the second open.
    """
    counts = sums.groups[grouping_of(options.bias_group)].counts.astype(jnp.float32)
    if options.bias_group == "buffer":
        counts = jnp.cumsum(counts, axis=-2)
    mean = counts.mean(axis=-1, keepdims=True)
    missing = mean - counts
    moves = jnp.sign(missing)
    if options.bias_update == "proportional":
        moves = missing / jnp.where(mean > 0, mean, 1)
    groups = jnp.maximum(jnp.sum(mean > 0, axis=-2), 1)
    return options.bias_rate * moves.sum(axis=-2) / groups


def move(config: ModelConfig, biases: Params, moves: jax.Array) -> Params:
    """The biases behind a step.

    Args:
      config: of the model.
      biases: of `take_apart`, stacked or not.
      moves: of `moves_of`, the sparse layers first to last, and behind them those of the head for
        tokens further on, as many as a step runs.
    """
    sparse = [f"layers_{i}" for i in config.moe.layers]
    ahead = [f"mtp/layers_{i}" for i in range(config.mtp_layers)]
    rows = dict(zip([*sparse, *ahead], moves, strict=False))

    def one(path: tuple[Any, ...], bias: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names = [own.removesuffix(f"/{SCORE_BIAS}") for own in stacked_names(name) or [name]]
        if not all(own in rows for own in names):
            return bias
        return bias + jnp.stack([rows[own] for own in names]).reshape(bias.shape)

    return jax.tree_util.tree_map_with_path(one, biases)
