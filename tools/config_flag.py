"""The flag of the command lines that read a run's configuration, and its parts as dataclasses.

--config=FILE.py names a file whose `get_config()` returns an ml_collections.ConfigDict; what stands
behind a colon in FILE.py:ARGUMENT is given to it. --config.part.field=value changes a field that
the file has; a file that begins a part with `ConfigDict(dataclasses.asdict(DataOptions(...)))` has
all of them.
"""

import ast
import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from absl import flags
from ml_collections import ConfigDict, config_flags

from qwen_jax.errors import UserError

T = TypeVar("T")

_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "text"}


class _Literal(flags.ArgumentParser):
    """A value for a field that is None in the file, which does not tell its type."""

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument
        try:
            return ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            return argument


config_flags.register_flag_parser_for_type(type(None), _Literal())

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The run's configuration, a Python file with get_config(); --config.part.field=value changes "
    "a field.",
    lock_config=False,
    accept_new_attributes=True,
)


def read_config() -> ConfigDict | None:
    """What the file returned, with the changes of the command line; None without the flag.

    Raises:
      UserError: the file cannot be read or returns something else.
    """
    config = CONFIG.value
    if config is None:
        return None
    try:
        return _checked(config)
    except OSError as error:  # Kept by the flag until its value is used.
        raise UserError(f"--config: {error}") from None


def _checked(config: Any) -> ConfigDict:
    # Of a file that could not be loaded, any attribute raises.
    if not callable(getattr(config, "items", None)) or not isinstance(config, ConfigDict):
        raise UserError("--config: get_config() should return a ConfigDict of ml_collections")
    return config


def require(config: Any, name: str, place: str) -> Any:
    """A part that must be there.

    Raises:
      UserError: it is not.
    """
    if name not in config:
        raise UserError(f"{place}.{name} is missing and needed")
    return config[name]


def from_config(value: Any, kind: type[T], place: str) -> T:
    """A dataclass from the part of a configuration that holds its fields.

    Fields that are not there have the dataclass's defaults. Dataclasses within it are made alike,
    and tuples of any of these; a whole number may stand for a float.

    Args:
      value: a ConfigDict or dict.
      kind: the dataclass.
      place: what errors call the part, such as config.data.

    Raises:
      UserError: a field that the dataclass has not, one that is missing and has no default, or a
        value of another type; names the field.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping | ConfigDict):
        raise UserError(f"{place} = {value!r} should hold the fields of {kind.__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    check_names(value.keys(), fields, place)
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        require(value, name, place)
    hints = typing.get_type_hints(kind)
    given = {name: _as(value[name], hints[name], f"{place}.{name}") for name in value}
    try:
        return kind(**given)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def check_names(names: typing.Iterable[str], known: typing.Iterable[str], place: str) -> None:
    """Checks that every name is known.

    Raises:
      UserError: one is not; tells the known name that is nearest, or all of them.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{place}.{name} is not a field of the configuration; {hint}")


def _as(value: Any, hint: Any, place: str) -> Any:
    """The value as its field's type has it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _as(value, inner, place)
    if origin is Literal or (isinstance(hint, type) and issubclass(hint, enum.StrEnum)):
        known = arguments or tuple(hint)
        if value not in known:
            raise UserError(f"{place} = {value!r} is not known; known: {', '.join(known)}")
        return value if arguments else hint(value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{place} = {value!r} should be a tuple")
        return tuple(_as(item, arguments[0], f"{place}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_config(value, hint, place)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{place} = {value!r} should be {_NAMES.get(hint, hint)}")
    return value
