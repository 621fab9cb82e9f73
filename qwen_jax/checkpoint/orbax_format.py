"""Parameters as an Orbax checkpoint in a model directory, beside config.json and the tokenizer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from qwen_jax.checkpoint.nonfinite import all_finite, report_nonfinite
from qwen_jax.checkpoint.tree_check import check_tree
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

_FOLDER = "params"

# Any of them will do, so that a damaged checkpoint is called damaged rather than absent.
_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")


def is_orbax(directory: Path) -> bool:
    """Whether a model directory holds its parameters in Orbax's format."""
    return any((directory / _FOLDER / file).exists() for file in _MARKS)


def save_orbax(directory: Path, params: Mapping[str, Any]) -> None:
    """Writes `params`, jax or numpy arrays, into `directory`.

    Raises:
      OSError: they cannot be written.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((directory / _FOLDER).absolute(), params)
    except Exception as error:  # Orbax and TensorStore raise many types for a full disk.
        raise OSError(_one_line(error)) from error


def load_orbax(
    config: ModelConfig, directory: Path, dtype: jnp.dtype, allow_nonfinite: bool = True
) -> dict[str, Any]:
    """Reads the parameters of `Decoder(config)` onto the first device.

    Args:
      config: the model.
      directory: holds the checkpoint.
      dtype: of the parameters.
      allow_nonfinite: whether NaN and infinite weights are warned of; else they are refused.

    Raises:
      UserError: a broken checkpoint, or one whose parameters are not those of `config`.
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = _restore(
        config,
        directory,
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
    )
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not all_finite(np.asarray(leaf))
    ]
    report_nonfinite(directory, bad, dtype, allow_nonfinite)
    return params


def read_orbax(config: ModelConfig, directory: Path) -> dict[str, Any]:
    """Reads the parameters of `Decoder(config)` as numpy arrays, in the dtypes stored.

    Raises:
      UserError: a broken checkpoint, or one whose parameters are not those of `config`.
    """
    return _restore(config, directory, lambda leaf: np.empty(leaf.shape, leaf.dtype))


def _restore(config: ModelConfig, directory: Path, wanted: Callable[[Any], Any]) -> dict[str, Any]:
    """The tree of `config`, each leaf of the kind that `wanted` makes from its metadata."""
    path = (directory / _FOLDER).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata
            stored = stored.tree if hasattr(stored, "tree") else stored
            check_tree(config, stored, directory)
            return checkpointer.restore(path, jax.tree.map(wanted, stored))
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for a broken file.
            raise UserError(
                f"{path}: broken or incomplete Orbax checkpoint ({_one_line(error)}); "
                "convert it again"
            ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
