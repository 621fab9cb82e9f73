"""The ways of running the experts of a mixture, by themselves."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from absl import flags

from qwen_jax.benchmark.dispatch import dispatch_table, measure_dispatch
from qwen_jax.benchmark.pictures import draw_dispatch
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.nn.moe import choose_dispatch
from tools import command_line
from tools.workloads.run import Run
from tools.workloads.source import find_source

TOKENS = flags.DEFINE_list(
    "tokens",
    ["1", "8", "64", "256", "1024"],
    "With --workload=dispatch: how many tokens to send to the experts, one measurement for each.",
)
FLAGS = (TOKENS,)


def prepare(run: Run) -> Callable[[], None]:
    """One layer of the model's shape, with random weights."""
    config = find_source(run.model, run.workdir).config
    if config.moe is None:
        raise UserError(f"--model={run.model} has no experts to dispatch to")
    return functools.partial(_measure, run, config, command_line.numbers(TOKENS))


def _measure(run: Run, config: ModelConfig, counts: tuple[int, ...]) -> None:
    moe = config.moe
    rows = measure_dispatch(moe, config.hidden_size, counts, repeats=run.repeats)
    run.write(dataclasses.asdict(row) for row in rows)
    shape = f"{moe.num_experts} experts of {moe.intermediate_size}, {moe.num_experts_per_tok} each"
    draw_dispatch(rows, f"{run.model}: {shape}, float32", run.workdir / "dispatch.png")
    chosen = {n: choose_dispatch(n, moe, jax.default_backend()) for n in counts}
    print(dispatch_table(rows, chosen))
