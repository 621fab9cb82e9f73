"""The flags of tools.generate that name adapters, and which of them a text is written with."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from qwen_jax.checkpoint.peft_config import read_peft_config
from qwen_jax.checkpoint.peft_reader import load_adapter
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.low_rank import attach

ADAPTER = flags.DEFINE_multi_string(
    "adapter", [], "NAME=DIR, a LoRA in PEFT's format; rows of --input pick one by name"
)
USE_ADAPTER = flags.DEFINE_string(
    "use_adapter", None, "The --adapter of prompts, and of rows that pick none; else the base."
)


def read_flags() -> dict[str, Path]:
    """The directory of each adapter by its name; the settings of each are read, to fail early.

    Raises:
      UserError: an --adapter that is not NAME=DIR or not there, a name that is given twice, or an
        unknown one.
    """
    found: dict[str, Path] = {}
    for text in ADAPTER.value:
        name, equals, directory = text.partition("=")
        if not (equals and name and directory):
            raise UserError(f"--adapter={text}: should be NAME=DIR")
        if name in found:
            raise UserError(f"--adapter={text}: the name {name} is given twice")
        found[name] = Path(directory).expanduser()
        read_peft_config(found[name])
    if USE_ADAPTER.value is not None:
        _check_known("--use_adapter", USE_ADAPTER.value, found)
    return found


def adapter_of(name: str, row: Mapping[str, Any], known: Mapping[str, Path]) -> str | None:
    """The adapter that a row is written with, None for the base; `name` is what errors call it.

    Raises:
      UserError: the row's is not one of the `known`.
    """
    chosen = row.get("adapter", USE_ADAPTER.value)
    if chosen is not None:
        if not isinstance(chosen, str):
            raise UserError(f"{name}: adapter should be a string, or null for the base")
        _check_known(f"{name}: adapter", chosen, known)
    return chosen


def _check_known(what: str, name: str, known: Mapping[str, Path]) -> None:
    if name not in known:
        choices = f"those are {', '.join(known)}" if known else "there is none"
        raise UserError(f"{what} = {name} is not the name of an --adapter; {choices}")


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model's parameters, and those with each adapter over them; the base is there once."""

    params: Any
    by_name: Mapping[str, Any]

    def __getitem__(self, name: str | None) -> Any:
        """The parameters with an adapter; None for the base's."""
        return self.params if name is None else self.by_name[name]


def load(model: Decoder, params: Any, directories: Mapping[str, Path]) -> Adapted:
    """Loads all adapters.

    Raises:
      UserError: one is broken, or not for this model.
    """
    by_name = {}
    for name, directory in directories.items():
        adapter = load_adapter(directory, model.config, model.mesh)
        by_name[name] = attach(params, adapter)
    return Adapted(params, by_name)
