"""Experts out of a dense checkpoint, as Qwen2's were made (arXiv 2407.10671, section 3.1.2).

The feed-forward block is copied as often as the experts together are wide, each copy's channels are
put in an order of their own, the copies one after another are cut into experts, and what is left is
dropped. Then half of each expert's numbers are drawn anew.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.config import ModelConfig, MoeSpec
from qwen_jax.errors import UserError
from qwen_jax.hf_config import with_experts
from qwen_jax.models.decoder import parameter_shapes
from qwen_jax.sharding.axes import parameter_shardings
from qwen_jax.training.checks import Bounds, check_fields


@dataclasses.dataclass(frozen=True)
class UpcycleOptions:
    """The experts that take the place of every feed-forward block.

    Attributes:
      num_experts: E.
      num_experts_per_tok: k, how many experts a token goes to.
      intermediate_size: width of an expert.
      renormalise: whether the chosen experts' probabilities are divided by their sum.
      shared_intermediate_size: width of the expert that every token goes to; None for none.
      aux_loss_coef: of the balancing loss, as config.json has it.
      redrawn: the share of each expert's numbers that are drawn anew.

    Raises:
      UserError: a value that none of these can have.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    renormalise: bool = True
    shared_intermediate_size: int | None = None
    aux_loss_coef: float = 0.001
    redrawn: float = 0.5

    def __post_init__(self):
        self.spec(1)
        check_fields(self, redrawn=Bounds(least=0, most=1), aux_loss_coef=Bounds(least=0))

    def spec(self, num_layers: int) -> MoeSpec:
        """The experts of a model with so many layers."""
        fields = dataclasses.asdict(self)
        del fields["redrawn"]
        return MoeSpec(layers=tuple(range(num_layers)), **fields)


def upcycle(
    config: ModelConfig,
    params: Mapping[str, Any],
    options: UpcycleOptions,
    key: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """A model with experts out of a dense one.

    Routers, and the gate of the expert that every token goes to, are drawn from a normal
    distribution of the config's `initializer_range`, as the redrawn numbers are. The expert that
    every token goes to is cut like the others, and nothing of it is drawn. The numbers of a layer
    depend on the key and its name alone.

    Where experts are as wide as the feed-forward block, each has all of its channels: with nothing
    redrawn and probabilities renormalised, the model computes what the dense one did.

    Args:
      config: of the dense model.
      params: of it, dense arrays; those that stay are shared.
      options: see `UpcycleOptions`.
      key: to draw from.
      mesh: that the new parameters are laid out on; None for one device.

    Returns:
      The config of the new model, and its parameters in the dtypes of the dense ones.

    Raises:
      UserError: the model has experts already, its family has none, or its parameters are not
        dense arrays of feed-forward blocks.
    """
    target = with_experts(config, options.spec(config.num_hidden_layers))
    made = dict(params)
    shapes = parameter_shapes(target)
    layers = sorted(name for name in shapes if name.startswith("layers_"))
    places = None
    if mesh is not None:
        # All layers have experts, which lie alike: one program makes them.
        places = parameter_shardings(target, mesh, shapes)[layers[0]]["mlp"]
    run = jax.jit(
        functools.partial(_experts, options=options, std=config.initializer_range),
        out_shardings=places,
    )
    for name in layers:
        dense = _feed_forward(name, params[name]["mlp"])
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        made[name] = {**params[name], "mlp": run(dense, own)}
    return target, made


def _feed_forward(name: str, block: Mapping[str, Any]) -> dict[str, jax.Array]:
    names = ("gate_proj", "up_proj", "down_proj")
    for part in names:
        weight = block.get(part, {}).get("weight")
        if not isinstance(weight, jax.Array) or weight.ndim != 2 or set(block[part]) != {"weight"}:
            raise UserError(
                f"{name}/mlp/{part} is no dense matrix, of which experts are cut; load the "
                "checkpoint with dense weights and without adapters"
            )
    return {part: block[part]["weight"] for part in names}


def _experts(
    dense: Mapping[str, jax.Array], key: jax.Array, *, options: UpcycleOptions, std: float
) -> dict[str, Any]:
    """The parameters in the place of a feed-forward block's."""
    channels, hidden_size = dense["gate_proj"].shape
    dtype = dense["gate_proj"].dtype
    keys = dict(zip(("cut", "draw", "gate", "shared"), jax.random.split(key, 4), strict=True))
    count, width = options.num_experts, options.intermediate_size
    experts = _cut(dense, _channels(keys["cut"], channels, count, width))
    experts = {
        name: {"weight": _redraw(jax.random.fold_in(keys["draw"], i), w, options.redrawn, std)}
        for i, (name, w) in enumerate(sorted(experts.items()))
    }
    gate = std * jax.random.normal(keys["gate"], (count + 1, hidden_size))
    made = {"experts": experts, "gate": {"weight": gate[:count].astype(dtype)}}
    if options.shared_intermediate_size is not None:
        shared = _channels(keys["shared"], channels, 1, options.shared_intermediate_size)
        parts = _cut(dense, shared)
        made["shared_expert"] = {name: {"weight": w[0]} for name, w in parts.items()}
        made["shared_expert_gate"] = {"weight": gate[count:].astype(dtype)}
    return made


def _channels(key: jax.Array, channels: int, count: int, width: int) -> jax.Array:
    """int32 [count, width], which of the block's channels each expert has."""
    copies = math.ceil(count * width / channels)
    keys = jax.random.split(key, copies)
    orders = jax.vmap(lambda key: jax.random.permutation(key, channels))(keys)
    return orders.reshape(-1)[: count * width].reshape(count, width)


def _cut(dense: Mapping[str, jax.Array], channels: jax.Array) -> dict[str, jax.Array]:
    """The matrices of experts [E, out, in], all three in one order of channels."""
    return {
        "gate_proj": dense["gate_proj"][channels],
        "up_proj": dense["up_proj"][channels],
        "down_proj": jnp.moveaxis(dense["down_proj"][:, channels], 0, 1),
    }


def _redraw(key: jax.Array, weight: jax.Array, share: float, std: float) -> jax.Array:
    if not share:
        return weight
    which, new = jax.random.split(key)
    drawn = (std * jax.random.normal(new, weight.shape)).astype(weight.dtype)
    return jnp.where(jax.random.bernoulli(which, share, weight.shape), drawn, weight)
