"""Engines turn by turn at the same work, the machine's limits between them, since both drift."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import tqdm

from qwen_jax.benchmark.limits import Limits, limit_measurer
from qwen_jax.benchmark.serving import Child, Task
from qwen_jax.benchmark.works import Work
from qwen_jax.errors import UserError

# Engines that do the same differ by rounding only: in a loss; and of tokens in a choice now and
# then, once two of them are nearly as likely.
_LOSS_TOLERANCE = 1e-3
_LEAST_EQUAL = 0.8
# Turns before any that counts: they compile, and fill caches and memory pools.
_WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Measured:
    """Attributes:
    seconds: engine -> figure -> one number a repeat.
    limits: what the machine was found to do before each repeat.
    """

    seconds: dict[str, dict[str, list[float]]]
    limits: list[Limits]


def measure(
    work: Work,
    directory: Path,
    vocab_size: int,
    engines: Mapping[str, Sequence[str] | None],
    repeats: int,
    mesh: str | None = None,
) -> Measured:
    """Seconds of each engine for each figure of a piece of work that generates or trains.

    Args:
      work: what to do.
      directory: of the checkpoint.
      vocab_size: of its model.
      engines: name -> the command of a script of another package, None for those of this one.
      repeats: of each, behind two that warm up.
      mesh: of the devices for this package.

    Raises:
      UserError: an engine failed, or they do not do the same.
    """
    task = Task(work.kind, str(directory), work.rows, work.length, work.steps, vocab_size, mesh)
    limits, measure_limits = [], limit_measurer()
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(Child(name, task, command)) for name, command in engines.items()
        ]
        seconds = {name: {figure: [] for figure in work.figures} for name in engines}
        for repeat in tqdm.trange(_WARM_UP + repeats, desc=work.name, disable=None):
            if repeat >= _WARM_UP:
                limits.append(measure_limits())
            outcomes = {}
            for child in children:
                reading = child.work()
                outcomes[child.name] = reading.outcome
                if repeat >= _WARM_UP:
                    for figure, values in seconds[child.name].items():
                        values.append(reading.seconds[figure])
            _check_alike(work, outcomes)
    return Measured(seconds, limits)


def _check_alike(work: Work, outcomes: Mapping[str, Sequence[float]]) -> None:
    (first, expected), *others = outcomes.items()
    for name, outcome in others:
        pairs = list(zip(outcome, expected, strict=True))
        if work.kind == "train":
            alike = all(abs(a - b) <= _LOSS_TOLERANCE * abs(b) for a, b in pairs)
        else:
            alike = sum(a == b for a, b in pairs) >= _LEAST_EQUAL * len(pairs)
        if not alike:
            raise UserError(
                f"{work.name}: {name} and {first} do not do the same, so that their times say "
                f"nothing: {outcome[:8]} and {expected[:8]}"
            )
