"""Published models as `ModelConfig`s, by hub name in lower case and without the organisation.

They serve tables of sizes, memory estimates and training from scratch; to run a checkpoint, read
its own `config.json` with `qwen_jax.hf_config.load_config`.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from configs.models import qwen1, qwen1_5, qwen2, qwen2_5, qwen3, qwen3_5, qwen3_next
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_config import load_config

PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        **qwen1.PRESETS,
        **qwen1_5.PRESETS,
        **qwen2.PRESETS,
        **qwen2_5.PRESETS,
        **qwen3.PRESETS,
        **qwen3_next.PRESETS,
        **qwen3_5.PRESETS,
    }
)


def get_preset(name: str) -> ModelConfig:
    """The preset called `name`, in any case and with or without `Qwen/` before it.

    Raises:
      UserError: no such preset; the message has the nearest name.
    """
    key = name.lower().removeprefix("qwen/")
    if key in PRESETS:
        return PRESETS[key]
    nearest = difflib.get_close_matches(key, PRESETS, n=1, cutoff=0.0)[0]
    raise UserError(f"preset {name!r} is unknown; the nearest of {len(PRESETS)} is {nearest}")


def names_a_preset(model: str) -> bool:
    """Whether `--model` can only mean a preset: no path, no hub id, nothing that exists on disk."""
    if not model or "/" in model or model.startswith((".", "~")):
        return False
    try:
        return not Path(model).exists()
    except OSError:  # Not a name that a file could have.
        return False


def find_config(model: str) -> ModelConfig:
    """Of what `--model` names where weights are not needed: a preset, a directory or a hub id.

    Raises:
      UserError: there is no such thing, or its config.json is not read.
    """
    if names_a_preset(model):
        return get_preset(model)
    return load_config(resolve_source(model, weights=False))
