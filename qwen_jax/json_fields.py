"""JSON objects read field by field: each value type-checked, each error naming file and field."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError


class Fields:
    """The fields of one JSON object, each read at most once; what is left over is refused."""

    def __init__(self, values: dict[str, Any], source: str):
        self.values = dict(values)
        self.source = source

    def take(self, name: str, kind: str, default: Any = None) -> Any:
        """Removes and returns field `name`; null counts as absent and gives `default`."""
        value = self.values.pop(name, None)
        if value is None:
            return default
        if not _KINDS[kind](value):
            raise UserError(
                f"{self.source}: {name} = {shown(value)} should be {_with_article(kind)}"
            )
        return value

    def require(self, name: str, kind: str) -> Any:
        """Like `take`, for a field without which there is no model."""
        value = self.take(name, kind)
        if value is None:
            raise UserError(
                f"{self.source}: {name} is missing and needed, as {_with_article(kind)}"
            )
        return value

    def refuse(self, name: str, value: Any, why: str) -> UserError:
        """The error for a value that is not honoured."""
        return UserError(f"{self.source}: {name} = {shown(value)} is not supported: {why}")


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "integer": _is_integer,
    "number": _is_number,
    "boolean": lambda v: isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "object": lambda v: isinstance(v, dict),
    "list of strings": lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
    "list of integers": lambda v: isinstance(v, list) and all(map(_is_integer, v)),
    "list of numbers": lambda v: isinstance(v, list) and all(map(_is_number, v)),
    "list of lists of integers": lambda v: (
        isinstance(v, list) and all(isinstance(x, list) and all(map(_is_integer, x)) for x in v)
    ),
    "anything": lambda v: True,
    "integer or list of integers": lambda v: (
        _is_integer(v) or (isinstance(v, list) and all(map(_is_integer, v)))
    ),
}


_JSON_NAMES = {
    "list": "an array",
    "str": "a string",
    "int": "a number",
    "float": "a number",
    "bool": "a boolean",
    "NoneType": "null",
}


def shown(value: Any) -> str:
    """The value as JSON, shortened to fit a one-line message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def disagreement(found: dict[str, Any]) -> str:
    """The clause of an error that says which fields contradict each other."""
    pairs = " and ".join(f"{name} = {shown(value)}" for name, value in found.items())
    return f"{pairs} disagree; keep one"


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: it is absent, is not UTF-8 JSON, or cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      UserError: as `read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, holds a {type(value).__name__}")
    return value


def parse_json_line(name: str, line: str) -> dict[str, Any]:
    """The object of a line of JSONL, which errors call `name`.

    Raises:
      UserError: it is no JSON object, or holds a number that is not finite, which JSON cannot
        write.
    """
    try:
        row = json.loads(line, parse_float=_finite, parse_constant=_finite)
    except json.JSONDecodeError as error:
        # The decoder counts lines too, and knows of this one alone.
        reason = f"{error.msg} at column {error.colno}"
        raise UserError(f"{name}: not valid JSON ({reason}); write one object a line") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        found = _JSON_NAMES[type(row).__name__]
        raise UserError(f"{name}: should be an object, is {found}; write one object a line")
    return row


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
