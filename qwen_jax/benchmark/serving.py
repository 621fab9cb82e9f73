"""An engine in a process of its own, which does its work again for each line that it reads.

Of its own, because how a process's memory and threads are managed is a part of the time, and each
engine is to run as its users run it. Run as a module, `python -m qwen_jax.benchmark.serving ENGINE
JSON`, where the JSON has the fields of `Task` or of `batching.ManyTexts`; each answer is JSON with
`Reading`'s. A script of another package that does the same can be measured by `Child` too.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_jax.benchmark.failures import failure
from qwen_jax.benchmark.training import TRAINERS
from qwen_jax.errors import UserError

if TYPE_CHECKING:
    from qwen_jax.benchmark.batching import ManyTexts


@dataclasses.dataclass(frozen=True)
class Task:
    """Attributes:
    kind: "generate" or "train".
    directory: of the checkpoint.
    rows, length, steps: as `works.Work` has them.
    vocab_size: random tokens are below it.
    mesh: of the devices, for this package.
    """

    kind: str
    directory: str
    rows: int
    length: int
    steps: int
    vocab_size: int
    mesh: str | None = None

    def ids(self) -> np.ndarray:
        """Random tokens [rows, length], the same for every engine."""
        return np.random.default_rng(0).integers(0, self.vocab_size, (self.rows, self.length))


@dataclasses.dataclass(frozen=True)
class Reading:
    """Attributes:
    seconds: figure -> how long it took.
    outcome: what came of the work, for a comparison with others: chosen tokens, or a loss.
    shares: of many texts, as `batching.Written` has them.
    """

    seconds: dict[str, float]
    outcome: list[float]
    shares: dict[str, float] = dataclasses.field(default_factory=dict)


class Child:
    """A process that works when it is told to; a context manager, at whose end it is killed."""

    def __init__(self, name: str, task: "Task | ManyTexts", command: Sequence[str] | None = None):
        """Starts it.

        Args:
          name: of the engine.
          task: what to do each time.
          command: of a script of another package; its last argument will be the task.
        """
        self.name = name
        command = command or [sys.executable, "-m", __name__, name]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self._process = subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(task))], text=True, **pipes
        )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def work(self, how: Mapping[str, Any] | None = None) -> Reading:
        """Has it work once.

        Args:
          how: of many texts, the size for `batching.Writer.write`.

        Raises:
          UserError: it has ended; tells why.
        """
        try:
            self._process.stdin.write(json.dumps(how or {}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        if not line:
            raise failure(self.name, self._process.stderr.read())
        return Reading(**json.loads(line))


def worker(engine: str, task: Task) -> Callable[[], Reading]:
    """A function that does the task once, with everything loaded."""
    ids, directory = task.ids(), Path(task.directory)
    if task.kind == "train":
        step = TRAINERS[engine](directory, ids)

        def train() -> Reading:
            start = time.perf_counter()
            loss = step()
            return Reading({"train step": time.perf_counter() - start}, [loss])

        return train

    from qwen_jax.benchmark.engines import ENGINES

    loaded = ENGINES[engine](directory, task.mesh)

    def generate() -> Reading:
        start = time.perf_counter()
        tokens = [loaded.prefill(ids)]
        middle = time.perf_counter()
        seconds = {"prefill": middle - start}
        if task.steps:
            tokens.append(loaded.decode(task.steps))
            seconds["decode"] = time.perf_counter() - middle
        return Reading(seconds, np.concatenate(tokens, axis=1).ravel().tolist())

    return generate


def worker_of_many(engine: str, fields: Mapping[str, Any]) -> Callable[..., Reading]:
    """A function that writes the texts of a `ManyTexts`, of these fields, in a size."""
    from qwen_jax.benchmark.batching import WRITERS, ManyTexts, write_all

    task = ManyTexts(**fields)
    writer, (prompts, answers) = WRITERS[engine](Path(task.directory)), task.draw()

    def write(size: int) -> Reading:
        found = write_all(writer, prompts, answers, size)
        seconds = {"write": found.seconds, "compile": found.compiling}
        return Reading(seconds, [token for text in found.texts for token in text], found.shares)

    return write


def _serve(engine: str, fields: dict[str, Any]) -> None:
    is_many = "answer_range" in fields
    work = worker_of_many(engine, fields) if is_many else worker(engine, Task(**fields))
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(work(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    try:
        _serve(sys.argv[1], json.loads(sys.argv[2]))
    except UserError as error:
        sys.exit(str(error))
