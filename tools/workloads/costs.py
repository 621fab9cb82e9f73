"""Costs of this package by itself: of starting, of more work, of the parts of a pass."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from absl import flags

from qwen_jax.benchmark.growth import Sizes, demands, measure_growth
from qwen_jax.benchmark.pictures import draw_growth, draw_profile
from qwen_jax.benchmark.profile import profile_decode, profile_prefill, profile_table
from qwen_jax.benchmark.programs import first_layers
from qwen_jax.benchmark.report import Demand, demand_table
from qwen_jax.benchmark.starting import measure_start
from qwen_jax.config import HeadKind, ModelConfig
from qwen_jax.errors import UserError
from tools import command_line
from tools.workloads.run import Run
from tools.workloads.source import find_source


def _as_default(values: tuple[int, ...]) -> list[str]:
    """As a flag has them."""
    return [str(value) for value in values]


LAYERS = flags.DEFINE_integer(
    "layers", None, "With growth and profile: how many layers run; of growth 4, else all.", 1
)
CAPACITIES = flags.DEFINE_list(
    "capacities", _as_default(Sizes.capacities), "With --workload=growth: slots of caches."
)
LENGTHS = flags.DEFINE_list(
    "lengths", _as_default(Sizes.lengths), "With --workload=growth: prompts that are compiled for."
)
LAYER_COUNTS = flags.DEFINE_list(
    "layer_counts",
    _as_default(Sizes.layer_counts),
    "With --workload=growth: how many layers are compiled.",
)
GROWTH_FLAGS = (LAYERS, CAPACITIES, LENGTHS, LAYER_COUNTS)


def prepare_start(run: Run) -> Callable[[], None]:
    """What it takes until a process has its first tokens."""
    source = find_source(run.model, run.workdir)
    source.check_predicts_tokens()
    return lambda: _report(run, measure_start(source.checkpoint()[0], run.repeats))


def prepare_growth(run: Run) -> Callable[[], None]:
    """How costs grow with tokens, with room for them, and with layers."""
    model = find_source(run.model, run.workdir).config
    if not run.decode_tokens:
        raise UserError("--decode_tokens=0: --workload=growth decodes at least one")
    shape = _running_shape(run, model, 4)
    asked = {flag.name: command_line.numbers(flag) for flag in (CAPACITIES, LENGTHS, LAYER_COUNTS)}
    asked |= {"prompt_tokens": run.prompt_tokens, "decode_tokens": run.decode_tokens}
    sizes = Sizes(**asked, batch_size=run.rows or Sizes.batch_size)
    if sizes.layer_counts[-1] > model.num_hidden_layers:
        raise UserError(
            f"--layer_counts={','.join(LAYER_COUNTS.value)}: the model has "
            f"{model.num_hidden_layers}"
        )
    return functools.partial(_measure_growth, run, shape, model, sizes)


def prepare_profile(run: Run) -> Callable[[], None]:
    """The share of each part of the model in a decode step, or in a prefill."""
    model = find_source(run.model, run.workdir).config
    return functools.partial(_measure_profile, run, _running_shape(run, model), model)


def _running_shape(run: Run, model: ModelConfig, default: int | None = None) -> ModelConfig:
    """The language model's layers that --layers asks for."""
    if model.head is not HeadKind.VOCABULARY:
        raise UserError(f"--model={run.model} is no language model, whose steps are timed")
    most = model.num_hidden_layers
    count = LAYERS.value or min(default or most, most)
    if count > most:
        raise UserError(f"--layers={count} is more than the model's {most}")
    return first_layers(model, count)


def _measure_growth(run: Run, shape: ModelConfig, model: ModelConfig, sizes: Sizes) -> None:
    points = measure_growth(shape, model, sizes, run.repeats)
    asked = {"layers": shape.num_hidden_layers, "sizes": dataclasses.asdict(sizes)}
    run.write({**dataclasses.asdict(point), **asked} for point in points)
    title = f"{run.model}: {shape.num_hidden_layers} of its layers, {_on_device()}"
    draw_growth(points, title, run.workdir / "growth.png")
    _report(run, demands(points))


def _measure_profile(run: Run, shape: ModelConfig, model: ModelConfig) -> None:
    rows, filled, layers = run.rows or 1, run.prompt_tokens, shape.num_hidden_layers
    if run.decode_tokens:
        what = f"decode of {rows}, {filled} in the cache"
        profiles = profile_decode(shape, rows, filled, run.decode_tokens, run.repeats)
    else:
        what = f"prefill of {rows} x {filled}"
        profiles = profile_prefill(shape, rows, filled, run.repeats)
    run.write({"layers": layers, **dataclasses.asdict(profile)} for profile in profiles)
    part = "" if layers == model.num_hidden_layers else f", {layers} of its layers"
    title = f"{run.model}{part}: {what}, {_on_device()}"
    draw_profile(profiles, title, run.workdir / "profile.png")
    run.report(profile_table(profiles))


def _report(run: Run, found: list[Demand]) -> None:
    run.write(demand.record() for demand in found)
    run.report(demand_table(found))


def _on_device() -> str:
    return f"float32 on {jax.devices()[0].device_kind}"
