"""What a run tells of itself: a progress bar, lines of JSON, TensorBoard and W&B, and a curve."""

import contextlib
import dataclasses
import json
import math
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import jax
import numpy as np
import tqdm

from qwen_jax.errors import UserError
from qwen_jax.sharding.chips import CHIPS
from qwen_jax.training.checks import Bounds, check_fields
from qwen_jax.training.objective import Metrics

LOG, ROUTER_LOG, CURVE = "metrics.jsonl", "router.jsonl", "loss.png"
# In a row, the figures of each layer's router by name.
_ROUTER = re.compile("(eval_)?router$")
# Lines whose steps are traced.
_TRACED_LINES = 5
# What Weights & Biases knows the run by.
_WANDB_ID = "wandb_id"


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Where a run's figures go, beside the progress bar and `metrics.jsonl`.

    Attributes:
      every: steps that a line is the mean of; lines are at its multiples, and at the end.
      tensorboard: whether TensorBoard's files are written, to `WORKDIR/tensorboard`.
      wandb_project: of Weights & Biases; None for none.
      peak_flops: multiplications and additions that a device makes a second at most, in the dtype
        that is computed with; None for those of a known TPU, and no MFU on anything else.
      profile: whether a trace is written to `WORKDIR/profile`, of the steps of five lines behind
        the first, in which the programs are compiled.
    """

    every: int = 1
    tensorboard: bool = False
    wandb_project: str | None = None
    peak_flops: float | None = None
    profile: bool = False

    def __post_init__(self):
        check_fields(self, every=Bounds(least=1), peak_flops=Bounds(above=0))


# Figures by name; those of routers are a dict of arrays [layers] in it.
Row = Mapping[str, Any]


class Sink(Protocol):
    """Takes a run's lines."""

    def write(self, step: int, row: Row) -> None:
        """A line of figures by name."""

    def close(self) -> None:
        """Nothing follows."""


class Reporter:
    """Collects the figures of steps and hands each line to the sinks.

    A step's figures are read while the next step runs, so that reading them does not hold it up.
    What lies between two steps in `paused` is no part of their time.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        every: int = 1,
        flops: float | None = None,
        peak: float | None = None,
    ):
        """Begins at the first step of a run, or of what is left of it.

        Args:
          sinks: that take the lines.
          every: steps that a line is the mean of.
          flops: of a step, on all devices together; None for no MFU.
          peak: of all devices together, a second; None for no MFU.
        """
        self._sinks, self._every = sinks, every
        self._flops, self._peak = flops, peak
        self._pending: tuple[int, Metrics] | None = None
        self._last = 0
        self._rows: list[dict[str, Any]] = []
        self._since = time.monotonic()

    def step(self, number: int, metrics: Metrics) -> tuple[int, dict[str, float]] | None:
        """Takes the figures of a step that has just been begun.

        Args:
          number: of updates, that one included.
          metrics: arrays of the step.

        Returns:
          Number and figures of the step before, which has ended; None where there is none.
        """
        pending, self._pending = self._pending, (number, metrics)
        return pending and self._read(*pending)

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """Waits for the step that was taken last; returns what `step` would of it."""
        pending, self._pending = self._pending, None
        return pending and self._read(*pending)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not a step, such as an evaluation."""
        begun = time.monotonic()
        yield
        self._since += time.monotonic() - begun

    def close(self) -> None:
        """Writes a line of the steps behind the last one that was written."""
        if self._rows:
            self._write()

    def note(self, number: int, row: Row) -> None:
        """Writes a line of other figures, such as an evaluation's."""
        for sink in self._sinks:
            sink.write(number, row)

    def _read(self, number: int, metrics: Metrics) -> tuple[int, dict[str, float]]:
        metrics = jax.device_get(metrics)
        counts, figures = metrics.pop("expert_counts", None), metrics.pop("router", None)
        row: dict[str, Any] = {name: float(value) for name, value in metrics.items()}
        if figures is not None:
            row["router"] = dict(figures)
        if counts is not None:
            # 1 where every layer uses its experts evenly, E where one expert has all tokens.
            row["busiest_expert"] = float(
                (counts.max(axis=-1) / np.maximum(counts.mean(axis=-1), 1e-9)).max()
            )
        self._rows.append(row)
        self._last = number
        if number % self._every == 0:
            self._write()
        return number, row

    def _write(self) -> None:
        now = time.monotonic()
        seconds, self._since = max(now - self._since, 1e-9), now
        rows, self._rows = self._rows, []
        line = jax.tree.map(lambda *values: np.mean(values, axis=0), *rows)
        line = {name: v if _ROUTER.match(name) else float(v) for name, v in line.items()}
        line["tokens_per_second"] = sum(row["tokens"] for row in rows) / seconds
        line["seconds_per_step"] = seconds / len(rows)
        if self._flops is not None and self._peak is not None:
            line["mfu"] = self._flops * len(rows) / seconds / self._peak
        self.note(self._last, line)


def numbers(row: Row) -> dict[str, float]:
    """A row of numbers alone: of routers' figures the means over layers, as "router/max_vio".

    What has more than a number for each layer is left out.
    """
    found = {}
    for name, value in row.items():
        if _ROUTER.match(name):
            found |= {
                f"{name}/{figure}": float(np.mean(values))
                for figure, values in value.items()
                if np.ndim(values) == 1
            }
        else:
            found[name] = value
    return found


class Lines:
    """`WORKDIR/metrics.jsonl`, an object a line, each with its step; and of routers `router.jsonl`.

    The second has a list of all layers' values for each figure; with dense layers alone there is
    none. Where a run goes on, what it had told behind the checkpoint is dropped: those steps come
    again.
    """

    def __init__(self, workdir: Path, start: int):
        self._workdir, self._start = workdir, start
        self._file = _reopen(workdir, LOG, start)
        told = (workdir / ROUTER_LOG).exists()
        self._router = _reopen(workdir, ROUTER_LOG, start) if told else None

    def write(self, step: int, row: Row) -> None:
        """Adds a line."""
        # JSON has no word for numbers that are not finite.
        values = {k: v if math.isfinite(v) else str(v) for k, v in numbers(row).items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        layers = {name: value for name, value in row.items() if _ROUTER.match(name)}
        if layers:
            if self._router is None:
                self._router = _reopen(self._workdir, ROUTER_LOG, self._start)
            lists = jax.tree.map(lambda values: np.asarray(values, np.float64).tolist(), layers)
            self._router.write(json.dumps({"step": step, **lists}) + "\n")

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._router is not None:
            self._router.close()


def _reopen(workdir: Path, name: str, start: int) -> TextIO:
    """A log to append to, without its lines behind step `start`."""
    rows = [row for row in read_log(workdir, name) if row["step"] <= start]
    path, temporary = workdir / name, workdir / f"{name}.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)
    return path.open("a", buffering=1)


class Bar:
    """A progress bar with loss, tokens a second, MFU and the time left; on a terminal only."""

    def __init__(self, start: int, stop: int):
        self._bar = tqdm.tqdm(total=stop, initial=start, desc="training", unit="step", disable=None)

    def write(self, step: int, row: Row) -> None:
        """Moves the bar to `step`."""
        shown = {}
        for name, label, form in _SHOWN:
            if name in row:
                shown[label] = form.format(row[name])
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("eval_loss", "eval", "{:.4f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"),
)


class TensorBoard:
    """`WORKDIR/tensorboard`, for TensorBoard."""

    def __init__(self, workdir: Path):
        try:
            import tensorboardX
        except ImportError:
            raise UserError(
                "report.tensorboard needs tensorboardX; install it (pip install tensorboardX)"
            ) from None
        self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, row: Row) -> None:
        """Adds a point to each figure's curve."""
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, which goes on with the one that `workdir` belongs to."""

    def __init__(self, workdir: Path, project: str, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "report.wandb_project needs wandb; install it (pip install wandb)"
            ) from None
        path = workdir / _WANDB_ID
        if not path.is_file():
            path.write_text(uuid.uuid4().hex + "\n")
        self._run = wandb.init(
            project=project,
            dir=str(workdir),
            id=path.read_text().strip(),
            resume="allow",
            config=dict(settings),
        )

    def write(self, step: int, row: Row) -> None:
        """Adds a point to each figure's curve."""
        self._run.log(numbers(row), step=step)

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


class Trace:
    """`WORKDIR/profile`, for XProf and Perfetto."""

    def __init__(self, workdir: Path):
        self._directory, self._lines = workdir / "profile", 0

    def write(self, step: int, row: Row) -> None:
        """Begins behind the first line, and ends some lines on."""
        self._lines += 1
        if self._lines == 1:
            options = jax.profiler.ProfileOptions()
            # Every call in Python would make the trace large and the steps slow.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
        if self._lines == 1 + _TRACED_LINES:
            jax.profiler.stop_trace()

    def close(self) -> None:
        """Ends it where the run ends before."""
        if 1 <= self._lines <= _TRACED_LINES:
            jax.profiler.stop_trace()


def open_sinks(
    workdir: Path, options: ReportOptions, start: int, stop: int, settings: Mapping[str, Any]
) -> list[Sink]:
    """The sinks that `options` ask for; of several processes the first has any.

    Raises:
      UserError: one needs a package that is not installed.
    """
    if jax.process_index() != 0:
        return []
    sinks: list[Sink] = [Lines(workdir, start), Bar(start, stop)]
    if options.profile:
        sinks.append(Trace(workdir))
    if options.tensorboard:
        sinks.append(TensorBoard(workdir))
    if options.wandb_project is not None:
        sinks.append(WeightsAndBiases(workdir, options.wandb_project, settings))
    return sinks


def known_peak(devices: Sequence[jax.Device]) -> float | None:
    """Operations a second of all devices together, bfloat16; None for devices not in the table."""
    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
    names = {kinds.get(device.device_kind) for device in devices}
    if len(names) != 1 or None in names:
        return None
    return CHIPS[names.pop()].flops * len(devices)


def read_log(workdir: Path, name: str = LOG) -> list[dict[str, Any]]:
    """The lines of a log, none where it is not there; what a kill cut is left out."""
    path = workdir / name
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_curve(workdir: Path) -> None:
    """Writes `loss.png`: the losses by step, from `metrics.jsonl`."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    rows = read_log(workdir)
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), float)]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=label, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(workdir / CURVE, dpi=150)
