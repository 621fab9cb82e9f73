"""A parameter tree from outside against the one that the config makes."""

from pathlib import Path
from typing import Any

import jax

from qwen_jax.checkpoint.names import listed
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import parameter_shapes
from qwen_jax.nn.low_rank import LowRankWeight
from qwen_jax.nn.quantized import QuantizedWeight


def check_tree(config: ModelConfig, tree: Any, source: str | Path) -> None:
    """Checks that `tree` has the paths and shapes of `Decoder(config)`; `source` names it.

    Raises:
      UserError: missing, unknown, misshapen or packed parameters, by name; adapters.
    """
    known = QuantizedWeight | LowRankWeight
    for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, known)):
        if isinstance(leaf, LowRankWeight):
            raise UserError(f"{source}: has adapters; merge them, or save them by themselves")
        if isinstance(leaf, QuantizedWeight):
            raise UserError(f"{source}: has packed weights; load them dense to save them")
    found, wanted = _shapes(tree), _shapes(parameter_shapes(config))
    for verb, names in (
        ("missing", wanted.keys() - found.keys()),
        ("unknown", found.keys() - wanted.keys()),
    ):
        if names:
            raise UserError(
                f"{source}: {verb} parameters for {config.family}: {listed(sorted(names))}; "
                "config and parameters are not of the same model"
            )
    for name, shape in wanted.items():
        if found[name] != shape:
            shown = "no array" if found[name] is None else f"shape {list(found[name])}"
            raise UserError(
                f"{source}: parameter {name} has {shown}, the config makes it {list(shape)}; "
                "they are not of the same model"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...] | None]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _shape(leaf)
        for path, leaf in leaves
    }


def _shape(leaf: Any) -> tuple[int, ...] | None:
    shape = getattr(leaf, "shape", None)
    return None if shape is None else tuple(shape)
