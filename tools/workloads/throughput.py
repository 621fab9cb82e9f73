"""Tokens a second over many texts, in rows that take one after another and in batches."""

import functools
from collections.abc import Callable

from absl import flags

from qwen_jax.benchmark.batching import ManyTexts
from qwen_jax.benchmark.pictures import draw_throughput
from qwen_jax.benchmark.throughput import (
    TEXT_SETS,
    TextSet,
    new_passes,
    of_texts,
    read_passes,
    throughput_tables,
)
from qwen_jax.errors import UserError
from tools import command_line
from tools.workloads.run import Run
from tools.workloads.source import Source, find_source

PROMPTS = flags.DEFINE_integer(
    "prompts", 64, "With --workload=throughput: how many texts.", lower_bound=1
)
PROMPT_RANGE = flags.DEFINE_list(
    "prompt_range", None, "With --workload=throughput: fewest and most tokens of a prompt."
)
ANSWER_RANGE = flags.DEFINE_list(
    "answer_range", None, "With --workload=throughput: fewest and most tokens to write."
)
SIZES = flags.DEFINE_list(
    "sizes", ["4", "8", "16", "32"], "With --workload=throughput: numbers of rows to try."
)
FLAGS = (PROMPTS, PROMPT_RANGE, ANSWER_RANGE, SIZES)


def prepare(run: Run) -> Callable[[], None]:
    """All sets of texts, without the passes that an earlier run has made."""
    source = find_source(run.model, run.workdir)
    source.check_predicts_tokens()
    sizes, sets = command_line.numbers(SIZES), _text_sets()
    most = source.config.max_position_embeddings
    for own in sets:
        longest = own.prompt_range[1] + own.answer_range[1]
        if longest > most:
            raise UserError(
                f"--model={run.model} has {most} positions, too few for texts of {longest}; give "
                "a lower --prompt_range and --answer_range"
            )
    return functools.partial(_measure, run, source, sets, sizes)


def _text_sets() -> list[TextSet]:
    ranges = []
    for flag, other in ((PROMPT_RANGE, ANSWER_RANGE), (ANSWER_RANGE, PROMPT_RANGE)):
        if flag.value is None:
            if other.value is not None:
                raise UserError(f"--{other.name} needs --{flag.name} beside it")
            continue
        numbers = command_line.numbers(flag)
        if len(numbers) != 2 or numbers[0] > numbers[1]:
            text = ",".join(flag.value)
            raise UserError(f"--{flag.name}={text} should be LEAST,MOST, such as 16,64")
        ranges.append(numbers)
    sets = [TextSet(*ranges)] if ranges else list(TEXT_SETS)
    # Those that the project aims at have their aims however they are asked for.
    return [next((d for d in TEXT_SETS if _ranges(d) == _ranges(own)), own) for own in sets]


def _ranges(own: TextSet) -> tuple[tuple[int, int], tuple[int, int]]:
    return own.prompt_range, own.answer_range


def _measure(run: Run, source: Source, sets: list[TextSet], sizes: tuple[int, ...]) -> None:
    directory, config = source.checkpoint()
    records, groups, tables = run.records(), [], []
    for own in sets:
        texts = ManyTexts(str(directory), config.vocab_size, PROMPTS.value, *_ranges(own))
        passes = of_texts(read_passes(records), texts, run.model)
        for made in new_passes(texts, run.model, sizes, run.repeats, passes):
            run.write([made.record()])
            passes.append(made)
        groups.append([p for p in passes if p.size in sizes])
        tables.append(throughput_tables(groups[-1], own.aims))
    run.report("\n\n".join(tables))
    draw_throughput(groups, run.workdir / "throughput.png")
