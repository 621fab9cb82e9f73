"""What is different between the results of two workdirs."""

from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.long_context.files import replace
from experiments.long_context.intervals import difference
from experiments.long_context.scoring import Score
from experiments.long_context.tasks import LOSSES
from qwen_jax.benchmark.report import markdown
from qwen_jax.errors import UserError

Key = tuple[str, str, int]


def write_comparison(
    here: Sequence[Score], there: Sequence[Score], name: str, workdir: Path
) -> str:
    """Writes comparison.md, and returns it: what both have, less what the other has.

    Args:
      here: results of `workdir`.
      there: of the other one.
      name: of the other one.
      workdir: where the table goes.

    Raises:
      UserError: they have no scaling, task and length in common.
    """
    both = {_key(s): None for s in here} & {_key(s): None for s in there}.keys()
    keys = [key for key in dict.fromkeys(map(_key, here)) if key in both]
    if not keys:
        raise UserError(
            f"{workdir} and {name} have no scaling, task and length in common; give results that do"
        )
    rows, texts_differ = [], False
    for key in keys:
        own = [[s for s in side if _key(s) == key] for side in (here, there)]
        digests = [{(s.seed, s.number): s.digest for s in side} for side in own]
        paired = digests[0] == digests[1]
        texts_differ |= not paired

        def cell(field: str, show: Callable[[float], str], own=own, paired=paired) -> str:
            sides = [_by_seed(side, field) for side in own]
            found = difference(*sides, paired)
            return f"{show(found.mean)} ({show(found.low)} to {show(found.high)})"

        rope, task, length = key
        right = "-" if task in LOSSES else cell("share", lambda x: f"{100 * x:+.0f}")
        rows.append([f"`{rope}`", task, f"{length:,}", right, cell("nats", lambda x: f"{x:+.3g}")])
    heads = ["scaling", "task", "tokens", "right answers, points", "nats"]
    note = (
        "Some texts of the two differ, so that their own chance is in the intervals."
        if texts_differ
        else "Both have read the same texts, by which differences are paired."
    )
    text = f"# {workdir} less {name}\n\n{markdown(heads, rows)}\n\n{note}\n"
    replace(workdir / "comparison.md", text)
    return text


def _key(score: Score) -> Key:
    return score.rope, score.task, score.length


def _by_seed(scores: Sequence[Score], field: str) -> dict[int, dict[int, float]]:
    found: dict[int, dict[int, float]] = {}
    for score in scores:
        found.setdefault(score.seed, {})[score.number] = float(getattr(score, field))
    return found
