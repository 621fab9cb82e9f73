"""A run's state on disk: written beside the training, whole or not at all, and read back.

A checkpoint is `WORKDIR/checkpoints/STEP`: the train state, and each process's place in its data.
What the state has `beside` it is not in there: it never changes, and comes from where it came from.
Orbax writes it under another name and renames it when it is complete, so that what a kill leaves
behind is not taken for one.
"""

import contextlib
import dataclasses
import json
import operator
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from qwen_jax.checkpoint.orbax_format import logs_silenced, silence_logs
from qwen_jax.errors import UserError
from qwen_jax.training.train_step import TrainState

_STATE, _DATA = "state", "data"
# Where what cannot be read is put, so that the run can come by its step again.
_DAMAGED = "damaged"


class Checkpoints:
    """The checkpoints of one run.

    Usage: `with Checkpoints(workdir, keep=2) as checkpoints:`. Leaving the block waits for what is
    being written.

    Attributes:
      directory: that holds them.
    """

    def __init__(self, workdir: Path, keep: int, best: str | None = None):
        """Opens or begins `workdir/checkpoints`.

        Args:
          workdir: of the run, which all processes see.
          keep: how many of the newest stay.
          best: a metric of which the checkpoint with the least stays as well.

        Raises:
          UserError: the metrics of a checkpoint there cannot be read.
        """
        self.directory = workdir.absolute() / "checkpoints"
        kept, measure = [preservation_policy.LatestN(keep)], None
        if best is not None:
            measure = operator.itemgetter(best)
            kept.append(
                preservation_policy.BestN(
                    get_metric_fn=measure,
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            # Without it no metrics are written, and a run that goes on would not know its best.
            best_fn=measure,
            cleanup_tmp_directories=True,
            step_prefix=None,
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.directory}: a STEP/metrics/metrics there is not JSON ({error}); delete "
                "that file, which only tells how good its checkpoint is"
            ) from None

    def __enter__(self) -> "Checkpoints":
        # Its threads log what goes wrong in them, and the next call here raises it as well.
        self._unsilence = silence_logs()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with _named(self.directory) if kind is None else contextlib.suppress(Exception):
            self._manager.wait_until_finished()
            self._manager.close()
        if kind is None:
            # Not behind a failure: asyncio speaks of abandoned tasks until the process has ended.
            self._unsilence()

    @property
    def steps(self) -> list[int]:
        """Of the complete checkpoints, first to last."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        state: TrainState,
        step: int,
        data: grain.DatasetIterator,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins to write a checkpoint; the state may be donated as soon as this returns.

        Raises:
          UserError: this one cannot be written, or the one before could not.
        """
        with _named(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.StandardSave(_stored(state)),
                        _DATA: grain.checkpoint.CheckpointSave(data),
                    }
                ),
                metrics=None if metrics is None else _numbers(metrics),
                force=True,
            )

    def restore(self, like: TrainState, data: grain.DatasetIterator) -> tuple[TrainState, int]:
        """The newest checkpoint that can be read; `data` goes on from where it was.

        One that cannot be read is put into `damaged/` with a warning, and the one before is taken.

        Args:
          like: the state, or its shapes and shardings.
          data: the run's iterator.

        Returns:
          The state and its step.

        Raises:
          UserError: there are checkpoints and none can be read.
        """
        failures: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        **{
                            _STATE: ocp.args.StandardRestore(_stored(like)),
                            _DATA: grain.checkpoint.CheckpointRestore(data),
                        }
                    ),
                )
            except Exception as error:  # Orbax, TensorStore and JSON raise many types.
                failures[step] = " ".join(str(error).split())[:300] or type(error).__name__
                continue
            for number, reason in failures.items():
                self._set_aside(number)
                warnings.warn(
                    f"{self.directory / str(number)}: cannot be read ({reason}); it is now in "
                    f"{_DAMAGED}/, and the run goes on from step {step}",
                    stacklevel=2,
                )
            return like.replace(**restored[_STATE] | {"beside": like.beside}), step
        newest, reason = next(iter(failures.items()))
        raise UserError(
            f"{self.directory / str(newest)}: cannot be read ({reason}), nor can any other there; "
            "restore the files or give another workdir"
        )

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self.directory / _DAMAGED / str(step)
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged {step}")
        self._manager.reload()


def _stored(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state: its fields, with nothing beside.

    Biases that steps move are only in the checkpoints of models that have some, so that others'
    are as they were before there were any.
    """
    found = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if found["moved"] is None:
        del found["moved"]
    return found | {"beside": None}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


@contextlib.contextmanager
def _named(directory: Path) -> Iterator[None]:
    """Failures of Orbax's as one line that names the directory."""
    with logs_silenced():
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # For a full disk alone there are several types.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"{directory}: a checkpoint cannot be written ({reason}); make room there and "
                "start the run again"
            ) from None
