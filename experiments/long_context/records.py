"""The scores of a workdir: read, and added to."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.long_context.scoring import Score
from experiments.results import add_results, no_results, read_results


def read_scores(workdir: Path) -> list[Score]:
    """Results that are there, without the line that a kill cut.

    Raises:
      UserError: they are of another version.
    """
    names = [field.name for field in dataclasses.fields(Score)]
    rows = read_results(workdir, names)
    return [Score(**row | {"by_place": tuple(map(tuple, row["by_place"]))}) for row in rows]


def need_scores(workdir: Path) -> list[Score]:
    """The same of a workdir that should have some.

    Raises:
      UserError: it has none.
    """
    scores = read_scores(workdir)
    if not scores:
        raise no_results(workdir)
    return scores


def add_scores(workdir: Path, scores: Iterable[Score], origin: Mapping[str, Any]) -> None:
    """Appends results with what they were made with, a line each."""
    add_results(workdir, map(dataclasses.asdict, scores), origin)
