"""Engines turn by turn at the same work, the machine's limits between them, since both drift."""

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import tqdm

from qwen_jax.benchmark.limits import Limits, limit_measurer
from qwen_jax.benchmark.serving import Child, Task
from qwen_jax.benchmark.works import Work
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import parameter_shapes

# Engines that do the same differ by rounding only: in a loss; and of tokens in a choice now and
# then, once two of them are nearly as likely.
_LOSS_TOLERANCE = 1e-3
LEAST_EQUAL = 0.8
# Turns before any that counts: they compile, and fill caches and memory pools.
_WARM_UP = 2
# How often engines that do not fit into memory together are loaded, each time for a share of the
# repeats.
_ROUNDS = 2
# Of the memory, what parameters may take where caches and temporaries are to fit too.
_MEMORY_SHARE = 0.7


@dataclasses.dataclass(frozen=True)
class Measured:
    """Attributes:
    seconds: engine -> figure -> one number a repeat.
    limits: what the machine was found to do before each repeat of this package.
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
    together: bool = True,
) -> Measured:
    """Seconds of each engine for each figure of a piece of work that generates or trains.

    Args:
      work: what to do.
      directory: of the checkpoint.
      vocab_size: of its model.
      engines: name -> the command of a script of another package, None for those of this one,
        which come first.
      repeats: of each, behind two that warm up.
      mesh: of the devices for this package.
      together: whether all are loaded at once, and take turns repeat by repeat. If not, each is
        loaded, does half of its repeats and ends; and all of that twice.

    Raises:
      UserError: an engine failed, or they do not do the same.
    """
    task = Task(work.kind, str(directory), work.rows, work.length, work.steps, vocab_size, mesh)
    own = next(iter(engines))
    groups = [list(engines)] if together else [[name] for name in engines] * _ROUNDS
    turns = _WARM_UP + (repeats if together else -(-repeats // _ROUNDS))
    seconds = {name: {figure: [] for figure in work.figures} for name in engines}
    limits, outcomes, measure_limits = [], {}, limit_measurer()
    with tqdm.tqdm(total=len(groups) * turns, desc=work.name, disable=None) as bar:
        for group in groups:
            with contextlib.ExitStack() as stack:
                children = [stack.enter_context(Child(name, task, engines[name])) for name in group]
                for turn in range(turns):
                    if turn >= _WARM_UP and own in group:
                        limits.append(measure_limits())
                    for child in children:
                        reading = child.work()
                        outcomes[child.name] = reading.outcome
                        if turn >= _WARM_UP:
                            for figure, values in seconds[child.name].items():
                                values.append(reading.seconds[figure])
                    _check_alike(work, outcomes)
                    bar.update()
    return Measured(seconds, limits)


def fit_together(config: ModelConfig, num_engines: int) -> bool:
    """Whether so many engines can have a model in float32 at once, by Linux's count of memory."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return True
    free = 1024 * int(re.search(r"MemAvailable: +(\d+) kB", text)[1])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(config)))
    return num_engines * 4 * parameters < _MEMORY_SHARE * free


def share_equal(outcome: Sequence[float], expected: Sequence[float]) -> float:
    """The share of tokens that two engines agree in."""
    return sum(a == b for a, b in zip(outcome, expected, strict=True)) / len(expected)


def _check_alike(work: Work, outcomes: Mapping[str, Sequence[float]]) -> None:
    (first, expected), *others = outcomes.items()
    for name, outcome in others:
        if work.kind == "train":
            pairs = zip(outcome, expected, strict=True)
            alike = all(abs(a - b) <= _LOSS_TOLERANCE * abs(b) for a, b in pairs)
        else:
            alike = share_equal(outcome, expected) >= LEAST_EQUAL
        if not alike:
            raise UserError(
                f"{work.name}: {name} and {first} do not do the same, so that their times say "
                f"nothing: {outcome[:8]} and {expected[:8]}"
            )
