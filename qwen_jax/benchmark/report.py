"""Measurements as rows: of a JSONL file, of a table, and beside those of an earlier run."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from qwen_jax.benchmark.measure import Measured
from qwen_jax.benchmark.works import Work
from qwen_jax.config import ModelConfig

_Kind = TypeVar("_Kind")

# Units of which more is better.
_RATES = ("tokens/s",)
# What records of rows are called, whichever workload they are of.
_SPEED = "speed"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of one piece of work.

    Attributes:
      what: the work, the figure, and their sizes.
      model: that it is of.
      unit: "tokens/s", "s" or "GB".
      values: engine -> a number a repeat; this package's comes first.
      shares: of each repeat, how much of the machine's limit this package reached; empty where no
        limit bounds the work.
      aim_ratio, aim_share: what should be reached; None where nothing is asked for.
    """

    what: str
    model: str
    unit: str
    values: dict[str, list[float]]
    shares: list[float] = dataclasses.field(default_factory=list)
    aim_ratio: float | None = None
    aim_share: float | None = None

    def ratio(self, engine: str) -> float:
        """How many times better than an engine this package is, by medians: speeds or needs."""
        ours, theirs = (
            statistics.median(self.values[name]) for name in (next(iter(self.values)), engine)
        )
        return ours / theirs if self.unit in _RATES else theirs / ours

    @property
    def share(self) -> float | None:
        """The median share of the limit."""
        return statistics.median(self.shares) if self.shares else None

    def record(self) -> dict[str, Any]:
        """For a JSONL file."""
        return {"workload": _SPEED, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Demand:
    """What is asked of a figure of this package by itself.

    Attributes:
      what: the figure.
      unit: "times", "exponent", "s" or "%".
      values: of each repeat.
      at_most: the aim; None where the figure is told beside others.
    """

    what: str
    unit: str
    values: tuple[float, ...]
    at_most: float | None = None

    @property
    def median(self) -> float:
        """Of the values."""
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        """Whether the median reaches the aim; None without one."""
        return None if self.at_most is None else self.median <= self.at_most

    def record(self) -> dict[str, Any]:
        """For a JSONL file."""
        return {**dataclasses.asdict(self), "median": self.median}


def demand_table(demands: Sequence[Demand]) -> str:
    """A Markdown table: each figure with its spread, the aim, and whether it is met."""
    rows = []
    for demand in demands:
        aim = "-" if demand.at_most is None else f"at most {three_digits(demand.at_most)}"
        met = {None: "-", True: "yes", False: "no"}[demand.is_met]
        rows.append([f"{demand.what}, {demand.unit}", spread(demand.values), aim, met])
    return markdown(["figure", "median (lowest to highest)", "aim", "met"], rows)


def rows_of(work: Work, config: ModelConfig, measured: Measured) -> list[Row]:
    """The rows of a piece of work, one for each of its figures."""
    aims, rows = dict(work.aims), []
    for figure in work.figures:
        seconds = {name: figures[figure] for name, figures in measured.seconds.items()}
        ours = next(iter(seconds.values()))
        least = [work.least_seconds(figure, config, limits) for limits in measured.limits]
        tokens, aim = work.tokens(figure), aims.get(figure)
        values = seconds
        if tokens:
            values = {name: [tokens / s for s in own] for name, own in seconds.items()}
        rows.append(
            Row(
                what=work.describe(figure),
                model=work.model,
                unit="tokens/s" if tokens else "s",
                values=values,
                shares=[a / b for a, b in zip(least, ours, strict=False) if a is not None],
                aim_ratio=aim and aim.ratio,
                aim_share=aim and aim.share,
            )
        )
    return rows


def read_rows(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Those of `Row.record` among records; of a row that is there again, the last."""
    return list({row.what: row for row in read_records(records, _SPEED, Row)}.values())


def read_records(
    records: Sequence[Mapping[str, Any]], workload: str, kind: type[_Kind]
) -> list[_Kind]:
    """Those among records of a workload that have all fields of a dataclass, as instances of it."""
    names = {field.name for field in dataclasses.fields(kind)}
    found = [r for r in records if r.get("workload") == workload and names <= r.keys()]
    return [kind(**{name: r[name] for name in names}) for r in found]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: medians, lowest to highest, ratios to each peer, share of the limit."""
    engines = list(dict.fromkeys(name for row in rows for name in row.values))
    peers = engines[1:]
    lines = []
    for row in rows:
        cells = [spread(row.values[name]) if name in row.values else "-" for name in engines]
        for peer in peers:
            aim = row.aim_ratio if peer == peers[0] else None
            cells.append(with_aim(row.ratio(peer), aim, ".2f") if peer in row.values else "-")
        cells.append("-" if row.share is None else with_aim(row.share, row.aim_share, ".0%"))
        lines.append([f"{row.what}, {row.unit}", *cells])
    return markdown(["", *engines, *(f"to {peer}" for peer in peers), "of the limit"], lines)


def comparison(rows: Sequence[Row], old: Sequence[Row]) -> str:
    """A Markdown table of what both runs have: ratios and shares then and now.

    Ratios are to the peer of the same run, so that a slower machine does not show as a change.
    """
    before = {row.what: row for row in old}
    lines = []
    for row in rows:
        then = before.get(row.what)
        if then is None:
            continue
        _, *peers = row.values
        for peer in peers:
            if peer not in then.values:
                continue
            a, b = then.ratio(peer), row.ratio(peer)
            shares = ["-" if x is None else f"{x:.0%}" for x in (then.share, row.share)]
            lines.append([row.what, peer, f"{a:.2f}", f"{b:.2f}", f"{b / a - 1:+.0%}", *shares])
    heads = ["what", "peer", "ratio then", "now", "change", "of the limit then", "now"]
    return markdown(heads, lines)


def three_digits(value: float) -> str:
    """Rounded, and without an exponent: 0.976, 85.2, 11,100."""
    return f"{float(f'{value:.3g}'):,g}"


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    median, low, high = map(three_digits, (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def with_aim(value: float, aim: float | None, form: str) -> str:
    """A figure, and behind it what is aimed at, if anything is: 1.50 (aim 1.40)."""
    return f"{value:{form}} (aim {aim:{form}})" if aim else f"{value:{form}}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])
