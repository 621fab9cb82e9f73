"""Decoding with drafts beside decoding without."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from absl import flags

import qwen_jax
from configs.models import names_a_preset
from qwen_jax.benchmark.speculation import as_table, measure_speculation
from qwen_jax.checkpoint.hub import EMBEDDED, resolve_source
from qwen_jax.errors import UserError
from qwen_jax.evaluation.language_model import check_language_model
from qwen_jax.evaluation.problems import held_out_problems
from qwen_jax.inference.defaults import load_generation_defaults, stop_ids_of
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.text import Tokenizer
from tools import command_line, jsonl_rows, speculation_flags
from tools.workloads.run import Run

INPUT = flags.DEFINE_string(
    "input",
    None,
    "With --workload=speculation: a JSONL file of prompts; the problems if not given.",
)
PROBLEMS = flags.DEFINE_integer(
    "problems", 2, "With --workload=speculation: held-out problems of each kind.", lower_bound=1
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 128, "With --workload=speculation: of each text, at most.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "With --workload=speculation: of the draws; 0 takes the likeliest token."
)
FLAGS = (
    INPUT,
    PROBLEMS,
    MAX_NEW_TOKENS,
    TEMPERATURE,
    speculation_flags.SPECULATE,
    speculation_flags.DRAFT_MODEL,
    speculation_flags.DRAFT_TOKENS,
)


def prepare(run: Run) -> Callable[[], None]:
    """Texts with each drafter that the checkpoint has, and without."""
    _check_flags(run.model)
    options = SamplingOptions(TEMPERATURE.value)
    directory = resolve_source(run.model)
    check_language_model(directory, "are what is timed")
    return functools.partial(_measure, run, directory, options)


def _check_flags(model: str) -> None:
    if names_a_preset(model) and model != EMBEDDED:
        raise UserError(f"--model={model}: random weights guess nothing; give a trained checkpoint")
    if INPUT.value is not None and PROBLEMS.present:
        raise UserError("--problems are asked where there is no --input")
    asked, has_model = _drafting()
    if has_model and asked not in (None, "draft"):
        raise UserError("--draft_model needs --speculate=draft, or none")
    if not has_model and asked == "draft":
        raise UserError("--speculate=draft needs --draft_model")


def _drafting() -> tuple[str | None, bool]:
    """The kind that is asked for, all that there are if none is; and whether a model is given."""
    return speculation_flags.SPECULATE.value, speculation_flags.DRAFT_MODEL.value is not None


def _measure(run: Run, directory: Path, options: SamplingOptions) -> None:
    tokenizer = qwen_jax.load_tokenizer(directory)
    prompts = _texts_to_continue(tokenizer)
    model, params = qwen_jax.load_pretrained(directory, "float32")
    asked, has_model = _drafting()
    kinds = ["lookup"] + ["mtp"] * bool(model.config.mtp_layers) + ["draft"] * has_model
    drafters = {
        kind: speculation_flags.load_drafter(kind, model, tokenizer, "float32")
        for kind in (kinds if asked is None else [asked])
    }
    defaults = load_generation_defaults(directory)
    rows = measure_speculation(
        model,
        params,
        prompts,
        drafters,
        MAX_NEW_TOKENS.value,
        options,
        stop_ids_of(defaults, model.config, tokenizer),
        run.rows or 1,
        run.repeats,
    )
    run.write(dataclasses.asdict(row) for row in rows)
    print(as_table(rows))


def _texts_to_continue(tokenizer: Tokenizer) -> list[list[int]]:
    """Prompts as ids, similar lengths beside each other."""
    if INPUT.value is None:
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": problem.question}],
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for problem in held_out_problems(PROBLEMS.value, seed=0)
        ]
    else:
        prompts = []
        for name, row in jsonl_rows.read_rows(command_line.path(INPUT)):
            text = row.get("prompt")
            if not isinstance(text, str) or not text:
                raise UserError(f"{name}: needs prompt, some text to continue")
            prompts.append(tokenizer.encode(text))
    return sorted(prompts, key=len)
