"""Parameters as an Orbax checkpoint in a model directory, beside config.json and the tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from qwen_jax.checkpoint import names
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import parameter_shapes

_FOLDER = "params"


def is_orbax(directory: Path) -> bool:
    """Whether a model directory holds its parameters in Orbax's format."""
    return (directory / _FOLDER / "_METADATA").is_file()


def save_orbax(directory: Path, params: Mapping[str, Any]) -> None:
    """Writes `params` into `directory`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / _FOLDER).absolute(), params)


def load_orbax(config: ModelConfig, directory: Path, dtype: jnp.dtype | None) -> dict[str, Any]:
    """Reads the parameters of `Decoder(config)`; `dtype` None keeps what is stored.

    Raises:
      UserError: a broken checkpoint, or one whose parameters are not those of `config`.
    """
    path = (directory / _FOLDER).absolute()
    expected = parameter_shapes(config)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata
            stored = stored.tree if hasattr(stored, "tree") else stored
            _check_tree(directory, config, stored, expected)
            target = jax.tree.map(
                lambda shape, found: jax.ShapeDtypeStruct(
                    shape.shape, dtype or found.dtype, sharding=_first_device()
                ),
                expected,
                stored,
            )
            return checkpointer.restore(path, target)
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for a broken file.
            reason = str(error).strip().partition("\n")[0][:200]
            raise UserError(f"{path}: broken Orbax checkpoint ({reason})") from error


def _first_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _check_tree(directory: Path, config: ModelConfig, stored: Any, expected: Any) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in leaves
        }

    found, wanted = shapes(stored), shapes(expected)
    for verb, extra in (("missing", wanted.keys() - found.keys()),
                        ("unknown", found.keys() - wanted.keys())):  # fmt: skip
        if extra:
            raise UserError(f"{directory}: {verb} parameters: {names.listed(sorted(extra))}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise UserError(
                f"{directory}: parameter {name} has shape {list(found[name])}, config.json makes "
                f"it {list(shape)} for {config.family}"
            )
