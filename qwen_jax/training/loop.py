"""The training loop, for a laptop and a pod alike."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

import grain
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from qwen_jax.errors import UserError
from qwen_jax.training.batch import Batch
from qwen_jax.training.checkpoints import Checkpoints
from qwen_jax.training.checks import Bounds, check_fields
from qwen_jax.training.report import Reporter, Sink
from qwen_jax.training.train_step import TrainState

OnNonfinite = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How long a run is, and what happens on the way.

    Attributes:
      num_steps: updates.
      checkpoint_every: steps between checkpoints; the last step has one anyway.
      keep: how many of the newest checkpoints stay, beside the one of the least evaluation loss,
        of those at whose step there was an evaluation.
      eval_every: steps between evaluations; 0 for none.
      on_nonfinite: what follows a step whose loss or gradients are NaN or infinite, and which
        changed nothing: "stop" the run with an error, or "skip" the batch, which counts as a step
        of the run and not of the learning rate's schedule.
    """

    num_steps: int
    checkpoint_every: int = 500
    keep: int = 2
    eval_every: int = 0
    on_nonfinite: OnNonfinite = "stop"

    def __post_init__(self):
        some = Bounds(least=1)
        check_fields(
            self,
            num_steps=some,
            checkpoint_every=some,
            keep=some,
            eval_every=Bounds(least=0),
            on_nonfinite=get_args(OnNonfinite),
        )


def train(
    step: Callable[[TrainState, Batch], tuple[TrainState, Mapping[str, jax.Array]]],
    state: TrainState,
    data: grain.DatasetIterator,
    options: LoopOptions,
    checkpoints: Checkpoints,
    open_sinks: Callable[[int], list[Sink]],
    *,
    place: Callable[[Mapping[str, np.ndarray]], Batch] = lambda arrays: Batch(**arrays),
    schedule: optax.Schedule | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    flops: float | None = None,
    peak: float | None = None,
    every: int = 1,
) -> tuple[TrainState, int]:
    """Trains to the last step, from the newest checkpoint if there is one.

    Args:
      step: of `make_train_step`.
      state: before the first step.
      data: gives the batches of this process, dicts of numpy arrays with the fields of `Batch`.
      options: of the loop.
      checkpoints: of the run.
      open_sinks: given the steps that were made, what takes the figures.
      place: makes the step's batch of those arrays.
      schedule: of the learning rate, to report it.
      evaluate: figures of a state, "eval_loss" among them.
      flops, peak, every: as `Reporter` has them.

    Returns:
      The state, and the steps that it has; fewer than asked for where SIGTERM came, after which the
      run saves and leaves.

    Raises:
      UserError: the loss is not finite and the options say to stop; a checkpoint cannot be written
        or read.
    """
    start = 0
    if checkpoints.steps:
        state, start = checkpoints.restore(state, data)
    if start > options.num_steps:
        raise UserError(
            f"num_steps = {options.num_steps}, but the run has {start} steps already; give as many "
            "or more, or another workdir"
        )
    with contextlib.ExitStack() as stack:
        asked_to_stop = stack.enter_context(_stop_requests())
        sinks = open_sinks(start)
        for sink in sinks:
            stack.callback(sink.close)
        reporter = Reporter(sinks, every, flops, peak)
        stack.callback(reporter.close)
        for number in range(start + 1, options.num_steps + 1):
            arrays = next(data, None)
            if arrays is None:
                raise UserError(
                    f"the data ends before step {number} of {options.num_steps}; give more epochs "
                    "(None for ever) or fewer steps"
                )
            state, metrics = step(state, place(arrays))
            if schedule is not None:
                metrics = {**metrics, "learning_rate": schedule(number - 1)}
            _check(reporter.step(number, metrics), options)
            stopping, last = asked_to_stop(number), number == options.num_steps
            evaluates = (
                evaluate and options.eval_every and (last or number % options.eval_every == 0)
            )
            saves = stopping or last or number % options.checkpoint_every == 0
            if evaluates or saves:
                _check(reporter.flush(), options)
                with reporter.paused():
                    figures = evaluate(state) if evaluates else None
                    if evaluates:
                        reporter.note(number, figures)
                    if saves:
                        checkpoints.save(state, number, data, figures)
            if stopping:
                return state, number
    return state, options.num_steps


def _check(read: tuple[int, dict[str, float]] | None, options: LoopOptions) -> None:
    if read is None or read[1]["finite"] or options.on_nonfinite == "skip":
        return
    number, row = read
    raise UserError(
        f"step {number}: the loss is {row['loss']:.4g} and the gradients' norm "
        f"{row['grad_norm']:.4g}; the checkpoint before is whole. Lower the learning rate, look at "
        "the batch, or set loop.on_nonfinite to skip such steps"
    )


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
    """Whether all processes are to stop behind a step, because one of them had SIGTERM."""
    if jax.process_count() > 1:
        # JAX's runtime takes the signal and agrees on a step.
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield lambda step: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)
