"""JSONL files of the command lines: objects in, a line each, named for errors; objects out."""

import json
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.json_fields import parse_json_line


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
        (f"{path}:{number}", parse_json_line(f"{path}:{number}", line))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{path}: holds no lines")
    return rows


def as_json(row: dict[str, Any]) -> str:
    """One line of JSON, in plain Unicode where UTF-8 can write it."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # Half of a surrogate pair in a field of the input line.
        return json.dumps(row)
    return text
