"""The results of a workdir: read, added to, and kept to one set of settings."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.long_context.scoring import Score
from qwen_jax.errors import UserError
from tools import jsonl_rows

_RESULTS, _SETTINGS = "results.jsonl", "settings.json"


def read_scores(workdir: Path) -> list[Score]:
    """Results that are there; the line that a kill cut is left out of the file as well."""
    path = workdir / _RESULTS
    if not path.is_file() or not path.stat().st_size:
        return []
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
        if not text:
            return []
    names = [field.name for field in dataclasses.fields(Score)]
    found = []
    for name, fields in jsonl_rows.read_rows(path):
        missing = [field for field in names if field not in fields]
        if missing:
            raise UserError(
                f"{name}: has no {missing[0]}, and is of another version; give another --workdir"
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
        raise UserError(f"{workdir / _RESULTS}: has no results; run without --report_only")
    return scores


def add_scores(workdir: Path, scores: Iterable[Score], origin: Mapping[str, Any]) -> None:
    """Appends results with what they were made with, a line each."""
    with (workdir / _RESULTS).open("a", encoding="utf-8") as file:
        for score in scores:
            file.write(json.dumps({**dataclasses.asdict(score), **origin}) + "\n")


def read_settings(workdir: Path) -> dict[str, Any]:
    """What decides the results of a workdir; nothing where there are none."""
    path = workdir / _SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def settle(workdir: Path, wanted: Mapping[str, Any]) -> None:
    """Writes what decides the results, or checks that what is there was made with the same.

    Raises:
      UserError: it was made with something else.
    """
    path = workdir / _SETTINGS
    before = read_settings(workdir)
    for name, value in wanted.items() if before else ():
        if before.get(name) != value:
            raise UserError(
                f"{path}: the results there have {name} = {before.get(name)}, not {value}; set "
                "it back or give another --workdir"
            )
    if not before:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(wanted), indent=1) + "\n", encoding="utf-8")
