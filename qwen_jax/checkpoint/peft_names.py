"""The published tensors of a model that can have adapters, as PEFT meets them in transformers 5."""

import dataclasses

import numpy as np

from qwen_jax.checkpoint import names
from qwen_jax.checkpoint.regions import stored_shape
from qwen_jax.config import ModelConfig
from qwen_jax.models.decoder import parameter_shapes

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# The parameters of all experts of a layer in transformers. PEFT wraps the module once for each that
# it adapts, the first innermost, and calls what is within a wrapper its base layer.
EXPERTS = ("gate_up_proj", "down_proj")
BASE_LAYER = ".base_layer"


@dataclasses.dataclass(frozen=True)
class Update:
    """The adapter of one published tensor, [..., out, in].

    Attributes:
      a: [..., r, in].
      b: [..., out, r].
      scale: what `b @ a` is multiplied by.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


class PublishedNames:
    """The names of a model's table, experts in both layouts.

    Attributes:
      regions: of each name.
      shapes: of the parameters.
      fused: the names in the layout that holds all experts of a layer in one tensor.
    """

    def __init__(self, config: ModelConfig):
        fused = names.regions(config, names.sparse_layers(config))
        self.regions: dict[str, list[names.Region]] = {}
        for region in dict.fromkeys([*fused, *names.regions(config)]):
            self.regions.setdefault(region.name, []).append(region)
        self.shapes = parameter_shapes(config)
        self.fused = {region.name for region in fused}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the published tensor."""
        region = self.regions[name][0]
        return stored_shape(region, names.leaf_at(self.shapes, region.path).shape)

    def linear(self) -> list[str]:
        """Names of the linear layers that transformers has as modules, and of routers."""
        return [
            name
            for name, (region, *_) in self.regions.items()
            if name.endswith(".weight")
            and not (region.unit_axis or region.expert is not None or region.path[0] == "mtp")
            and region.path[0] != "embed_tokens"
            and len(self.shape(name)) == 2
        ]
