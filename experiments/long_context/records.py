"""The results of a workdir: read, added to, and kept to one set of settings."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.long_context.files import replace
from experiments.long_context.scoring import Score
from qwen_jax.errors import UserError
from qwen_jax.json_fields import parse_json_line, read_json_object

_RESULTS, _SETTINGS = "results.jsonl", "settings.json"


def read_scores(workdir: Path) -> list[Score]:
    """Results that are there, without the line that a kill cut.

    Raises:
      UserError: they are of another version.
    """
    path = workdir / _RESULTS
    if not path.is_file():
        return []
    names = [field.name for field in dataclasses.fields(Score)]
    found = []
    # Behind the last end of a line is nothing, or what a kill left of one.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        fields = parse_json_line(f"{path}:{number}", line)
        missing = [field for field in names if field not in fields]
        if missing:
            raise UserError(
                f"{path}:{number}: has no {missing[0]}, and is of another version; give another "
                "--workdir"
            )
        by_place = tuple((place, nats) for place, nats in fields["by_place"])
        found.append(Score(**{field: fields[field] for field in names} | {"by_place": by_place}))
    return found


def need_scores(workdir: Path) -> list[Score]:
    """The same of a workdir that should have some.

    Raises:
      UserError: it has none.
    """
    scores = read_scores(workdir)
    if not scores:
        raise UserError(f"{workdir / _RESULTS}: has no results; run the study there first")
    return scores


def cut_tail(workdir: Path) -> None:
    """Takes a line that a kill cut out of the results, so that others can follow."""
    path = workdir / _RESULTS
    if path.is_file():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)


def add_scores(workdir: Path, scores: Iterable[Score], origin: Mapping[str, Any]) -> None:
    """Appends results with what they were made with, a line each."""
    with (workdir / _RESULTS).open("a", encoding="utf-8") as file:
        for score in scores:
            file.write(json.dumps({**origin, **dataclasses.asdict(score)}) + "\n")


def read_settings(workdir: Path) -> dict[str, Any]:
    """What decides the results of a workdir; nothing where there are none.

    Raises:
      UserError: the file is no JSON object.
    """
    path = workdir / _SETTINGS
    return dict(read_json_object(path)) if path.is_file() else {}


def settle(workdir: Path, wanted: Mapping[str, Any]) -> None:
    """Writes what decides the results, or checks that what is there was made with the same.

    Raises:
      UserError: it was made with something else.
    """
    path = workdir / _SETTINGS
    before = read_settings(workdir)
    for name, value in wanted.items():
        if name in before and before[name] != value:
            raise UserError(
                f"{path}: the results there have {name} = {before[name]}, not {value}; set "
                "it back or give another --workdir"
            )
    replace(path, json.dumps({**before, **wanted}, indent=1) + "\n")
