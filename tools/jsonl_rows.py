"""JSONL files of the command lines: objects in, a line each, named for errors; objects out."""

import json
import math
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError

_JSON_NAMES = {
    "list": "an array",
    "str": "a string",
    "int": "a number",
    "float": "a number",
    "bool": "a boolean",
    "NoneType": "null",
}


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line's object with the name, FILE:LINE, that errors call it by; empty lines are skipped.

    Raises:
      UserError: the file cannot be read, has no line, or one that holds no JSON object, or a number
        that is not finite, which JSON cannot write.
    """
    try:
        # Not splitlines: JSON strings may hold the other characters that it splits at.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    rows = [
        (f"{path}:{number}", _parse_line(f"{path}:{number}", line))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{path}: holds no lines")
    return rows


def _parse_line(name: str, line: str) -> dict[str, Any]:
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


def as_json(row: dict[str, Any]) -> str:
    """One line of JSON, in plain Unicode where UTF-8 can write it."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # Half of a surrogate pair in a field of the input line.
        return json.dumps(row)
    return text
