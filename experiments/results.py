"""The results of a workdir, a line of JSON each: read, and added to as they come."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.json_fields import parse_json_line

_RESULTS = "results.jsonl"


def read_results(workdir: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The fields of these names of each result, without the line that a kill cut.

    Raises:
      UserError: a result has one of them not, and is of another version.
    """
    path = workdir / _RESULTS
    if not path.is_file():
        return []
    found = []
    # Behind the last end of a line is nothing, or what a kill left of one.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        fields = parse_json_line(f"{path}:{number}", line)
        missing = [name for name in names if name not in fields]
        if missing:
            raise UserError(
                f"{path}:{number}: has no {missing[0]}, and is of another version; give another "
                "--workdir"
            )
        found.append({name: fields[name] for name in names})
    return found


def no_results(workdir: Path) -> UserError:
    """What to say where there should be some."""
    return UserError(f"{workdir / _RESULTS}: has no results; run the study there first")


def cut_tail(workdir: Path) -> None:
    """Takes a line that a kill cut out of the results, so that others can follow."""
    path = workdir / _RESULTS
    if path.is_file():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)


def add_results(
    workdir: Path, rows: Iterable[Mapping[str, Any]], origin: Mapping[str, Any]
) -> None:
    """Appends results with what they were made with, a line each."""
    with (workdir / _RESULTS).open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**origin, **row}) + "\n")
