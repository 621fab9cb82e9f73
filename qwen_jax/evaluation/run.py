"""One evaluation: a text, tasks of the harness, the embedded model's problems, and what is left."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.evaluation import problems as own_problems
from qwen_jax.evaluation.cache_divergence import measure_cache_divergence
from qwen_jax.evaluation.figures import (
    Figure,
    add_to_log,
    as_table,
    check_workdir,
    replace_lines,
    share,
)
from qwen_jax.evaluation.harness import HarnessOptions, check_installed, find_tasks, run_harness
from qwen_jax.evaluation.harness_requests import Respondent
from qwen_jax.evaluation.perplexity import cut_windows, measure_perplexity, read_text_ids
from qwen_jax.evaluation.pictures import draw_problems
from qwen_jax.inference.bulk import complete_all
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import CacheDtype, check_cache_dtype
from qwen_jax.text import Tokenizer

SAMPLES, ANSWERS, PICTURE = "samples.jsonl", "answers.jsonl", "problems.png"
# Of a text at once, unless told otherwise; the model's positions where they are fewer.
_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is evaluated.

    Attributes:
      name: that results bear.
      model, params, tokenizer: as the package loads them.
      options: of sampling, where a task of the harness samples and does not say how.
      stop_ids: that end its texts.
    """

    name: str
    model: Decoder
    params: Any
    tokenizer: Tokenizer
    options: SamplingOptions
    stop_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What is measured, and how.

    Attributes:
      text: a file whose perplexity is measured; None for none.
      length: tokens that the model reads of a text at once; None for its positions, of `text` at
        most 2048.
      stride: tokens of `text` from one window to the next; None for half the length.
      allow_special: whether names of control tokens in `text` stand for them.
      allow_longer: whether `length` may be more than the model's positions.
      harness: tasks of lm-evaluation-harness; None for none.
      thinking: with tasks in a chat, the template's `enable_thinking`; None for its default.
      problems: of each kind of the embedded model's; 0 for none.
      max_new_tokens: of an answer to a problem.
      batch_size: texts that run together.
      seed: of problems, examples and draws.
      cache_dtype: of keys and values while answers are written, as `init_cache` has it; and how far
        it moves the predictions of `text` is measured.
    """

    text: Path | None = None
    length: int | None = None
    stride: int | None = None
    allow_special: bool = False
    allow_longer: bool = False
    harness: HarnessOptions | None = None
    thinking: bool | None = None
    problems: int = 0
    max_new_tokens: int = 256
    batch_size: int = 8
    seed: int = 0
    cache_dtype: CacheDtype | None = None


def check_options(options: EvaluateOptions, workdir: Path) -> None:
    """What can be known to be wrong before the model is loaded.

    Raises:
      UserError: nothing is asked for, a file cannot be read, stride and length do not go together,
        lm-eval is not installed, or `workdir` cannot be written.
    """
    check_cache_dtype(options.cache_dtype)
    if options.text is None and options.harness is None and not options.problems:
        raise UserError("nothing to evaluate; give --text, --tasks or --problems")
    if options.text is not None:
        try:
            options.text.open("rb").close()
        except OSError as error:
            raise UserError(f"{options.text}: cannot be read ({error.strerror})") from None
        if options.length is not None:
            cut_windows(2, options.length, options.stride or 1)
    if options.harness is not None:
        check_installed()
    check_workdir(workdir)


def evaluate(
    subject: Subject, options: EvaluateOptions, workdir: Path, origin: Mapping[str, Any]
) -> str:
    """Measures what is asked for.

    Args:
      subject: the model.
      options: what is asked for.
      workdir: gets `evaluate.jsonl` and `evaluate.csv`, to which every run adds, and of the last
        run `samples.jsonl` of the harness, and of the problems `answers.jsonl` and `problems.png`.
      origin: what the results were made with, which each line repeats.

    Returns:
      The tables, for a reader.

    Raises:
      UserError: as `check_options`, or what is wrong with a text, a task or the model.
    """
    check_options(options, workdir)
    origin = {"model": subject.name, "seed": options.seed, **origin}
    # All that may be refused comes before all that takes long.
    measures = []
    if options.text is not None:
        measures.append(_text_measure(subject, options))
        if options.cache_dtype is not None:
            measures.append(_cache_measure(subject, options))
    if options.harness is not None:
        measures.append(_harness_measure(subject, options, workdir))
    if options.problems:
        if subject.tokenizer.chat_template is None:
            raise UserError(f"{subject.name}: has no chat template to ask problems through")
        measures.append(functools.partial(_measure_problems, subject, options, workdir))
    tables = []
    for measure in measures:
        found, table = measure()
        # After each, so that what comes later cannot lose it.
        add_to_log(workdir, found, origin)
        tables.append(table)
    return "\n\n".join(tables)


def _windows_of_text(subject: Subject, options: EvaluateOptions) -> tuple[list[int], int, int]:
    """The text's ids, the length of a window, and the stride."""
    config = subject.model.config
    length = options.length or min(config.max_position_embeddings, _LENGTH)
    stride = options.stride or max(1, length // 2)
    _check_length(config, length, options)
    ids = read_text_ids(options.text, subject.tokenizer, options.allow_special)
    cut_windows(len(ids), length, stride)
    return ids, length, stride


def _text_measure(subject: Subject, options: EvaluateOptions) -> Any:
    ids, length, stride = _windows_of_text(subject, options)

    def measure() -> tuple[list[Figure], str]:
        found = measure_perplexity(
            subject.model, subject.params, ids, length, stride, options.batch_size,
            subject.tokenizer,
        )  # fmt: skip
        values = {
            "perplexity": found.perplexity,
            "nats per token": found.nats_per_token,
            "bits per byte": found.bits_per_byte,
        }
        figures = [
            Figure("text", options.text.name, metric, value, count=found.num_scored)
            for metric, value in values.items()
            if value is not None
        ]
        window = f"windows of {length} tokens, {stride} apart; {found.num_scored:,} of "
        return figures, f"{as_table(figures)}\n{window}{found.num_tokens:,} tokens scored"

    return measure


def _cache_measure(subject: Subject, options: EvaluateOptions) -> Any:
    ids, length, stride = _windows_of_text(subject, options)

    def measure() -> tuple[list[Figure], str]:
        found = measure_cache_divergence(
            subject.model, subject.params, ids, length, stride, options.cache_dtype,
            options.batch_size,
        )  # fmt: skip
        of, count = f"{options.text.name}, {options.cache_dtype} cache", len(found.kl)
        values = {
            "mean KL, nats": float(found.kl.mean()),
            "largest KL, nats": float(found.kl.max()),
            "share of the full bytes": found.other_bytes / found.full_bytes,
        }
        agrees = share("cache", of, "same likeliest token", int(found.agrees.sum()), count)
        figures = [Figure("cache", of, name, value, count=count) for name, value in values.items()]
        return [*figures, agrees], as_table([*figures, agrees])

    return measure


def _harness_measure(subject: Subject, options: EvaluateOptions, workdir: Path) -> Any:
    config = subject.model.config
    length = options.length or config.max_position_embeddings
    _check_length(config, length, options)
    tasks = find_tasks(options.harness)
    respondent = Respondent(
        subject.model,
        subject.params,
        subject.tokenizer,
        length,
        subject.options,
        subject.stop_ids,
        options.batch_size,
        options.seed,
        options.thinking,
        options.cache_dtype,
    )

    def measure() -> tuple[list[Figure], str]:
        figures, samples = run_harness(respondent, options.harness, subject.name, tasks)
        replace_lines(workdir / SAMPLES, ({"model": subject.name, **s} for s in samples))
        return figures, as_table(figures)

    return measure


def _measure_problems(
    subject: Subject, options: EvaluateOptions, workdir: Path
) -> tuple[list[Figure], str]:
    def write(prompts: Any) -> Any:
        return complete_all(
            subject.model,
            subject.params,
            subject.tokenizer,
            prompts,
            options.max_new_tokens,
            stop_ids=subject.stop_ids,
            batch_size=options.batch_size,
            cache_dtype=options.cache_dtype,
        )

    held_out = own_problems.held_out_problems(options.problems, options.seed)
    answers = own_problems.ask(held_out, subject.tokenizer, write)
    origin = {"model": subject.name, "seed": options.seed}
    rows = ({**origin, **dataclasses.asdict(answer)} for answer in answers)
    replace_lines(workdir / ANSWERS, rows)
    draw_problems(answers, f"{subject.name}: held-out problems", workdir / PICTURE)
    return own_problems.score(answers), own_problems.as_table(answers)


def _check_length(config: ModelConfig, length: int, options: EvaluateOptions) -> None:
    if config.exceeds_positions(length) and not options.allow_longer:
        raise UserError(
            f"length = {length} is more than max_position_embeddings = "
            f"{config.max_position_embeddings}; scale with --rope, or give --allow_longer"
        )
