"""What is different between the results of two workdirs."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.files import replace
from experiments.intervals import difference
from experiments.long_context.scoring import Score
from experiments.long_context.tasks import LOSSES
from qwen_jax.benchmark.report import markdown
from qwen_jax.errors import UserError

Key = tuple[str, str, float]


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
      name: of its workdir.
      scores: its results, scalings as their `--rope` or as their names.
      unit: tokens that lengths are counted in, 1 or the trained length.
    """

    name: str
    scores: Sequence[Score]
    unit: int

    def by_key(self) -> dict[Key, list[Score]]:
        """Results by scaling, task and length in units."""
        found: dict[Key, list[Score]] = {}
        for s in self.scores:
            found.setdefault((s.rope, s.task, s.length / self.unit), []).append(s)
        return found


def write_comparison(here: Side, there: Side, workdir: Path) -> str:
    """Writes comparison.md, and returns it: what both have, less what the other has.

    Args:
      here, there: the two.
      workdir: where the table goes.

    Raises:
      UserError: they have no scaling, task, length and seed in common.
    """
    sides = here.by_key(), there.by_key()
    rows, texts_differ = [], False
    for key, one in sides[0].items():
        other = sides[1].get(key)
        if other is None or not {s.seed for s in one} & {s.seed for s in other}:
            continue
        paired = _texts(one) == _texts(other)
        texts_differ |= not paired

        def cell(field: str, show: Callable[[float], str], one=one, other=other, paired=paired):
            found = difference(_by_seed(one, field), _by_seed(other, field), paired)
            return f"{show(found.mean)} ({show(found.low)} to {show(found.high)})"

        rope, task, times = key
        length = f"{times:g}x" if here.unit > 1 else f"{times:,.0f}"
        right = "-" if task in LOSSES else cell("share", lambda x: f"{100 * x:+.0f}")
        rows.append([f"`{rope}`", task, length, right, cell("nats", lambda x: f"{x:+.3g}")])
    if not rows:
        raise UserError(
            f"{here.name} and {there.name} have no scaling, task, length and seed in common; give "
            "results that do"
        )
    heads = ["scaling", "task", "length", "right answers, points", "nats"]
    notes = [
        "Some texts of the two differ, so that their own chance is in the intervals."
        if texts_differ
        else "Both have read the same texts, by which differences are paired."
    ]
    left = sorted({key[0] for key in sides[0].keys() ^ sides[1].keys()})
    if left:
        notes.append(f"In one of the two only, at some length or task: {', '.join(left)}.")
    notes = "\n".join(notes)
    text = f"# {here.name} less {there.name}\n\n{markdown(heads, rows)}\n\n{notes}\n"
    replace(workdir / "comparison.md", text)
    return text


def _texts(scores: Sequence[Score]) -> dict[tuple[int, int], str]:
    return {(s.seed, s.number): s.digest for s in scores}


def _by_seed(scores: Sequence[Score], field: str) -> dict[int, dict[int, float]]:
    found: dict[int, dict[int, float]] = {}
    for score in scores:
        found.setdefault(score.seed, {})[score.number] = float(getattr(score, field))
    return found
