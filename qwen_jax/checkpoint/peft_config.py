"""adapter_config.json of PEFT: what it says of an adapter, honoured or refused by name."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.json_fields import Fields, read_json_object, shown

FILE = "adapter_config.json"

# What no forward pass depends on: provenance, training, and how the matrices began.
_SILENT = (
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)

# Ways to begin that leave the base weights alone. Others ("pissa", "olora", "corda", "loftq", ...)
# change them as the adapter is loaded.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")

_ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What adapter_config.json says of the forward pass.

    Attributes:
      source: the file, for messages.
      rank, alpha: of modules that no pattern names.
      rank_stabilised: whether updates are multiplied by alpha / sqrt(rank), not alpha / rank.
      rank_pattern, alpha_pattern: regular expressions of ends of modules' names -> their own.
      target_modules: names or ends of names, or one regular expression, or "all-linear".
      target_parameters: the same, of parameters.
      exclude_modules: names, ends of names or one expression of what is not meant.
      layers: numbers of the layers that are meant; None for all.
      layers_pattern: what such numbers stand behind; empty for anything.
    """

    source: str
    rank: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    target_parameters: tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    def rank_of(self, name: str) -> int:
        """The rank of a module or parameter."""
        return _by_pattern(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What the update of a module or parameter is multiplied by."""
        rank, alpha = self.rank_of(name), _by_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def targets_parameter(self, name: str) -> bool:
        """Whether a parameter, by its whole name, is one of `target_parameters`."""
        return _ends_with_one(name, self.target_parameters)

    def targets_module(self, name: str) -> bool:
        """Whether a module is one of `target_modules`, by the rules of PEFT."""
        if _listed(name, self.exclude_modules):
            return False
        if self.target_modules == _ALL_LINEAR:
            return True
        if not _listed(name, self.target_modules):
            return False
        return self.layers is None or self._layer_of(name) in self.layers

    def _layer_of(self, name: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*"]:
            if match := re.match(rf"{pattern}\.(\d+)\.", name):
                return int(match[1])
        return None


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def _ends_with_one(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _listed(name: str, names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return _ends_with_one(name, names)


def read_peft_config(directory: Path) -> PeftConfig:
    """Reads adapter_config.json.

    Raises:
      UserError: it is absent or broken, or asks for something that is not done here: another method
        than LoRA, or a variant of it. Fields that are unknown are refused unless they are off
        (null, false or empty), as later versions write them.
    """
    path = directory / FILE
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give that of an adapter")
    fields = Fields(read_json_object(path), str(path))
    kind = fields.take("peft_type", "string")
    if kind != "LORA":
        raise fields.refuse("peft_type", kind, "only LORA is")
    bias = fields.take("bias", "string", "none")
    if bias != "none":
        raise fields.refuse("bias", bias, "adapters have no biases here; train it with none")
    begun = fields.values.pop("init_lora_weights", None)
    if begun not in _BEGINNINGS:
        raise fields.refuse(
            "init_lora_weights",
            begun,
            "it changes the base weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion",
        )
    for name in _SILENT:
        fields.values.pop(name, None)
    config = PeftConfig(
        source=str(path),
        rank=fields.take("r", "integer", 8),
        alpha=fields.take("lora_alpha", "number", 8),
        rank_stabilised=fields.take("use_rslora", "boolean", False),
        rank_pattern=_patterns(fields, "rank_pattern"),
        alpha_pattern=_patterns(fields, "alpha_pattern"),
        target_modules=_names(fields, "target_modules"),
        target_parameters=tuple(fields.take("target_parameters", "list of strings", [])),
        exclude_modules=_names(fields, "exclude_modules"),
        layers=_layers(fields),
        layers_pattern=_as_tuple(_names(fields, "layers_pattern")),
    )
    if config.rank < 1:
        raise UserError(f"{path}: r = {config.rank} should be at least 1")
    for name, value in fields.values.items():
        if value not in (None, False, [], {}):
            raise UserError(
                f"{path}: {name} = {shown(value)} is not supported: it is unknown here, or makes "
                "another update than LoRA's"
            )
    return config


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return ((names,) if names else ()) if isinstance(names, str) else names


def _layers(fields: Fields) -> tuple[int, ...] | None:
    found = fields.take("layers_to_transform", "integer or list of integers")
    if found is None or found == []:
        return None
    return (found,) if isinstance(found, int) else tuple(found)


def _names(fields: Fields, name: str) -> str | tuple[str, ...]:
    if isinstance(fields.values.get(name), str):
        text = fields.take(name, "string")
        if name != "layers_pattern":
            _compile(fields, name, text)
        return text
    return tuple(fields.take(name, "list of strings", []))


def _patterns(fields: Fields, name: str) -> dict[str, Any]:
    found = fields.take(name, "object", {})
    for pattern, value in found.items():
        _compile(fields, name, pattern)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{fields.source}: {name} {pattern} = {shown(value)} should be above 0")
    return found


def _compile(fields: Fields, name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{fields.source}: {name} {shown(pattern)} is no regular expression ({error})"
        ) from None
