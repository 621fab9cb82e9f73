"""Measurements as rows: of a JSONL file, of a table, and beside those of an earlier run."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from qwen_jax.benchmark.measure import Measured
from qwen_jax.benchmark.works import Work
from qwen_jax.config import ModelConfig

# Units of which more is better.
_RATES = ("tokens/s",)


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
        return {"workload": "speed", **dataclasses.asdict(self)}


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
    names = [field.name for field in dataclasses.fields(Row)]
    found = [r for r in records if r.get("workload") == "speed" and set(names) <= r.keys()]
    return list({r["what"]: Row(**{name: r[name] for name in names}) for r in found}.values())


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: medians, lowest to highest, ratios to each peer, share of the limit."""
    engines = list(dict.fromkeys(name for row in rows for name in row.values))
    peers = engines[1:]
    heads = ["", *engines, *(f"to {peer}" for peer in peers), "of the limit"]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for row in rows:
        cells = [_spread(row.values[name]) if name in row.values else "-" for name in engines]
        for peer in peers:
            aim = f" (aim {row.aim_ratio:.2f})" if row.aim_ratio and peer == peers[0] else ""
            cells.append(f"{row.ratio(peer):.2f}{aim}" if peer in row.values else "-")
        aim = f" (aim {row.aim_share:.0%})" if row.aim_share else ""
        cells.append("-" if row.share is None else f"{row.share:.0%}{aim}")
        lines.append(_line([f"{row.what}, {row.unit}", *cells]))
    return "\n".join(lines)


def comparison(rows: Sequence[Row], old: Sequence[Row]) -> str:
    """A Markdown table of what both runs have: ratios and shares then and now.

    Ratios are to the peer of the same run, so that a slower machine does not show as a change.
    """
    before = {row.what: row for row in old}
    heads = ["what", "peer", "ratio then", "now", "change", "of the limit then", "now"]
    lines = [_line(heads), "|---" * len(heads) + "|"]
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
            cells = [row.what, peer, f"{a:.2f}", f"{b:.2f}", f"{b / a - 1:+.0%}", *shares]
            lines.append(_line(cells))
    return "\n".join(lines)


def three_digits(value: float) -> str:
    """Rounded, and without an exponent: 0.976, 85.2, 11,100."""
    return f"{float(f'{value:.3g}'):,g}"


def _spread(values: Sequence[float]) -> str:
    median, low, high = map(three_digits, (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
