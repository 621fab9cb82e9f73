"""What an evaluation found, as numbers with a name, and where they are written."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError

LOG, TABLE = "evaluate.jsonl", "evaluate.csv"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
      measure: what kind of evaluation it is of: text, cache, harness or problems.
      name: of the text, the task or the kind of problem.
      metric: what the number is.
      value: the number.
      low, high: its 95% interval; None where there is none.
      count: tokens, documents or problems that it is of; None where that is not known.
    """

    measure: str
    name: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None


def share(measure: str, name: str, metric: str, right: int, count: int) -> Figure:
    """The share of `right` ones among `count`, with Wilson's interval (JASA 22, 1927)."""
    low, high = wilson_interval(right, count)
    return Figure(measure, name, metric, right / count if count else math.nan, low, high, count)


def wilson_interval(right: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The interval of a share by Wilson's score, for `z` standard deviations; (0, 1) of nothing."""
    if count == 0:
        return 0.0, 1.0
    p = right / count
    center = p + z * z / (2 * count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def as_table(figures: Sequence[Figure]) -> str:
    """Lines for a reader, a figure each."""
    lines = ["| of | metric | value | 95% interval | count |", "|---|---|---|---|---|"]
    for f in figures:
        interval = "" if f.low is None else f"{f.low:.4g} to {f.high:.4g}"
        count = "" if f.count is None else f"{f.count:,}"
        lines.append(f"| {f.name} | {f.metric} | {f.value:.5g} | {interval} | {count} |")
    return "\n".join(lines)


def check_workdir(workdir: Path) -> None:
    """Makes the directory of results, before anything takes long.

    Raises:
      UserError: it cannot be written, or holds results that cannot be read.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f"{LOG}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written ({error.strerror or error})") from None
    _read_log(workdir)


def add_to_log(workdir: Path, figures: Sequence[Figure], origin: Mapping[str, Any]) -> None:
    """Adds rows to `evaluate.jsonl`, each with its origin, and makes `evaluate.csv` of all there.

    Args:
      workdir: of the results of many runs.
      figures: of this one.
      origin: what they were made with.
    """
    rows = _read_log(workdir) + [{**dataclasses.asdict(f), **origin} for f in figures]
    replace_lines(workdir / LOG, rows)
    names = [field.name for field in dataclasses.fields(Figure)]
    columns = [*names, "model", "seed", "dtype", "device", "git"]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    _replace(workdir / TABLE, text.getvalue())


def replace_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSONL, whole or not at all."""
    lines = (json.dumps(_finite(row), ensure_ascii=False, default=str) for row in rows)
    _replace(path, "".join(f"{line}\n" for line in lines))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    # Half of a surrogate pair, which a model may write, is no UTF-8.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no word for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _read_log(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / LOG
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if line:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                raise UserError(
                    f"{path}:{number}: is not JSON; give another --workdir, or mend it"
                ) from None
    return rows
