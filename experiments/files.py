"""Results on disk, each file whole or as it was."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_records(
    path: Path, rows: Sequence[Mapping[str, Any]], origin: Mapping[str, Any] | None
) -> None:
    """Writes rows as a table, `path`.csv, and with their origin as `path`.jsonl.

    Args:
      path: without what is behind the dot.
      rows: of the same fields.
      origin: what they were made with; None for no .jsonl.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace(path.with_suffix(".csv"), text.getvalue())
    if origin is not None:
        lines = (json.dumps({**row, **origin}) + "\n" for row in rows)
        replace(path.with_suffix(".jsonl"), "".join(lines))


def replace(path: Path, text: str) -> None:
    """Writes a text in the place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def line_style(i: int) -> dict[str, str]:
    """Of the i-th of many lines of a picture."""
    return {"linestyle": ("-", "--", ":")[i // 10 % 3], "color": f"C{i % 10}"}


def save(figure: "Figure", path: Path) -> None:
    """The same of a picture, as a PNG."""
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
