"""How costs grow with the work: with tokens, with room for more of them, with layers.

Each measurement varies one size and keeps the others, with random weights of a model's shape; its
points are measured turn by turn, since machines drift.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import tqdm

from qwen_jax.benchmark.programs import (
    DecodeSteps,
    compiled_anew,
    lower_decode,
    lower_prefill,
    lower_train,
    random_params,
)
from qwen_jax.benchmark.report import Demand
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.slots import SlotStream, why_not_slots
from qwen_jax.models.decoder import Decoder

Figure = Literal["capacity", "filled", "prefill memory", "mixed lengths", "compiling"]
# Series of the figures that have two.
PADDED, SLOTS = "padded batch", "slots"
DECODE_COMPILED, TRAIN_COMPILED = "decode step, layers unrolled", "train step, layers scanned"
UNIFORM, MIXED = 0, 1

# What a figure may be at most, beside what it is of one in the same series.
MOST_OF_CAPACITY, MOST_OF_MIXING, MOST_OF_LAYERS = 1.1, 1.1, 1.2
MOST_EXPONENT = 1.1


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a curve.

    Attributes:
      figure: the curve's picture.
      series: of it.
      x: what is varied: slots, tokens, tokens, `UNIFORM` or `MIXED`, layers.
      unit: "s" or "bytes".
      values: one a repeat; of memory, one.
    """

    figure: Figure
    series: str
    x: int
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the values."""
        return statistics.median(self.values)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How far each curve goes.

    Attributes:
      capacities: slots of a cache, the least of which is filled in all of them.
      lengths: of prompts that are compiled for.
      layer_counts: numbers of layers that are compiled.
      batch_size, prompt_tokens, decode_tokens: of the batch whose lengths are mixed: texts, the
        mean of their prompts' tokens, and tokens that each gets, which is also how often a point's
        decode step runs a repeat.

    Raises:
      UserError: a curve of one point or of none, or sizes below 1.
    """

    capacities: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    layer_counts: tuple[int, ...] = (2, 4, 8, 16)
    batch_size: int = 8
    prompt_tokens: int = 512
    decode_tokens: int = 16

    def __post_init__(self):
        for name in ("capacities", "lengths", "layer_counts"):
            values = getattr(self, name)
            if len(values) < 2 or min(values) < 1 or list(values) != sorted(set(values)):
                listed = ",".join(map(str, values))
                raise UserError(
                    f"{name} = {listed} should be at least two numbers, each larger than the last"
                )
        for name, least in (("batch_size", 2), ("prompt_tokens", 8), ("decode_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)} must be at least {least}")


def measure_growth(
    config: ModelConfig, model: ModelConfig, sizes: Sizes, repeats: int
) -> list[Point]:
    """All curves.

    Args:
      config: the shape that runs.
      model: the whole model, as many of whose layers are compiled as are asked for.
      sizes: of the curves.
      repeats: of all but the memory, which is the compiler's.

    Raises:
      UserError: the model has too few layers, or does not run in slots.
    """
    params = random_params(config)
    if why := why_not_slots(Decoder(config)):
        raise UserError(f"{why}, so that its costs in mixed batches cannot be measured")
    shapes = {count: model.with_layers(range(count)) for count in sizes.layer_counts}
    return [
        *measure_decoding(config, params, sizes, repeats),
        *measure_prefill_memory(config, sizes.lengths),
        *measure_mixing(config, params, sizes, repeats),
        *measure_compiling(shapes, repeats),
    ]


def measure_decoding(config: ModelConfig, params: Any, sizes: Sizes, repeats: int) -> list[Point]:
    """Seconds of a decode step of one row: by capacity, and by tokens in the largest cache."""
    least, most = sizes.capacities[0], sizes.capacities[-1]
    steps = {n: DecodeSteps(config, params, 1, n) for n in sizes.capacities}

    def median(capacity: int, filled: int) -> Callable[[], float]:
        # The step's own token takes the last slot.
        return lambda: statistics.median(
            steps[capacity].seconds(filled - 1) for _ in range(sizes.decode_tokens)
        )

    names = (f"{least} tokens", f"{most} slots")
    points = {("capacity", names[0], n): median(n, least) for n in sizes.capacities}
    points |= {("filled", names[1], n): median(most, n) for n in sizes.capacities}
    return _turn_by_turn(points, repeats, "decoding")


def measure_prefill_memory(config: ModelConfig, lengths: Iterable[int]) -> list[Point]:
    """Temporaries of the compiled prefill of one row, by its length; nothing runs."""
    points = []
    for length in tqdm.tqdm(tuple(lengths), desc="prefill memory", disable=None):
        analysis = lower_prefill(config, 1, length).compile().memory_analysis()
        size = float(analysis.temp_size_in_bytes)
        points.append(Point("prefill memory", "temporaries", length, "bytes", (size,)))
    return points


def mixed_lengths(rows: int, mean: int) -> list[int]:
    """Lengths from an eighth of the mean to fifteen eighths, evenly, which add up to the mean's."""
    lengths = [mean] * rows
    for i in range(rows // 2):
        lengths[i] = max(1, round(mean * (1 + 14 * i / (rows - 1)) / 8))
        lengths[-1 - i] = 2 * mean - lengths[i]
    return lengths


def measure_mixing(config: ModelConfig, params: Any, sizes: Sizes, repeats: int) -> list[Point]:
    """Seconds a token, read or written, of prompts of one length and of as many tokens mixed."""
    model = Decoder(config)
    generator = np.random.default_rng(0)
    tokens = sizes.batch_size * (sizes.prompt_tokens + sizes.decode_tokens)

    def run(stream: type[TokenStream | SlotStream], lengths: Sequence[int]) -> Callable[[], float]:
        prompts = [generator.integers(0, config.vocab_size, n).tolist() for n in lengths]

        def seconds() -> float:
            start = time.perf_counter()
            for _ in stream(model, params, prompts, sizes.decode_tokens, stop_ids=()):
                pass
            return (time.perf_counter() - start) / tokens

        return seconds

    kinds = {
        UNIFORM: [sizes.prompt_tokens] * sizes.batch_size,
        MIXED: mixed_lengths(sizes.batch_size, sizes.prompt_tokens),
    }
    points = {
        ("mixed lengths", name, kind): run(stream, lengths)
        for name, stream in ((PADDED, TokenStream), (SLOTS, SlotStream))
        for kind, lengths in kinds.items()
    }
    return _turn_by_turn(points, repeats, "mixed lengths")


def measure_compiling(shapes: dict[int, ModelConfig], repeats: int) -> list[Point]:
    """Seconds from Python to a program, by the number of layers; one row of few tokens."""

    def seconds(lower: Callable[[], jax.stages.Lowered]) -> Callable[[], float]:
        def run() -> float:
            with compiled_anew():
                start = time.perf_counter()
                lower().compile()
                return time.perf_counter() - start

        return run

    points = {}
    for count, config in shapes.items():
        for name, lower in (
            (DECODE_COMPILED, lambda config=config: lower_decode(config, 1, 128)),
            (TRAIN_COMPILED, lambda config=config: lower_train(config, 1, 128, scan=True)),
        ):
            points["compiling", name, count] = seconds(lower)
    return _turn_by_turn(points, repeats, "compiling")


def _turn_by_turn(
    points: dict[tuple[Figure, str, int], Callable[[], float]], repeats: int, what: str
) -> list[Point]:
    """Each measured `repeats` times, behind once that fills caches of programs and of memory."""
    values: dict[tuple[Figure, str, int], list[float]] = {key: [] for key in points}
    for repeat in tqdm.trange(repeats + 1, desc=what, disable=None):
        for key, seconds in points.items():
            found = seconds()
            if repeat:
                values[key].append(found)
    return [Point(*key, "s", tuple(own)) for key, own in values.items()]


def exponent(points: Sequence[Point]) -> float:
    """p of the least squares' fit x ** p, of logarithms; of the upper half, three points or more.

    What does not grow hides the growth of the rest in the lower half.
    """
    upper = points[min(len(points) // 2, max(len(points) - 3, 0)) :]
    xs, ys = ([math.log(getattr(p, name)) for p in upper] for name in ("x", "median"))
    return statistics.linear_regression(xs, ys).slope


def demands(points: Sequence[Point]) -> list[Demand]:
    """What is asked of the curves, and what came out."""

    def curve(figure: Figure, series: str | None = None) -> list[Point]:
        return [p for p in points if p.figure == figure and series in (None, p.series)]

    def against(first: Point, last: Point) -> tuple[float, ...]:
        return tuple(b / a for a, b in zip(first.values, last.values, strict=True))

    found = []
    capacity, filled, memory = curve("capacity"), curve("filled"), curve("prefill memory")
    found.append(
        Demand(
            f"decode step, {capacity[0].x} tokens in a cache of {capacity[-1].x} slots to one of "
            f"{capacity[0].x}",
            "times",
            against(capacity[0], capacity[-1]),
            MOST_OF_CAPACITY,
        )
    )
    found.append(
        Demand(
            f"decode step, {filled[-1].x} slots filled to {filled[0].x} of them",
            "times",
            against(filled[0], filled[-1]),
        )
    )
    found.append(
        Demand(
            f"prefill's temporaries, {memory[0].x} to {memory[-1].x} tokens",
            "exponent",
            (exponent(memory),),
            MOST_EXPONENT,
        )
    )
    for name, aim in ((SLOTS, MOST_OF_MIXING), (PADDED, None)):
        uniform, mixed = curve("mixed lengths", name)
        what = f"a token of mixed lengths to one of equal lengths, {name}"
        found.append(Demand(what, "times", against(uniform, mixed), aim))
    for name, aim in ((TRAIN_COMPILED, MOST_OF_LAYERS), (DECODE_COMPILED, None)):
        first, *_, last = curve("compiling", name)
        what = f"compiling a {name}, {last.x} to {first.x}"
        found.append(Demand(what, "times", against(first, last), aim))
    return found
