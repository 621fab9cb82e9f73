"""Compares ways of reading beyond the trained length: on small models of its own, on a checkpoint.

    python -m experiments.long_context --workdir=results --seeds=3
    python -m experiments.long_context --model=Qwen/Qwen3-0.6B --tasks=passkey,niah \\
        --lengths=4k,8k,16k --rope=none,yarn:4,original=32768,dca --workdir=results
    python -m experiments.long_context --study=base_bound --workdir=results
    python -m experiments.long_context --study=frequencies --model=qwen3-0.6b --trained=32768 \\
        --workdir=results

Without --model the study trains small Qwen3 models and compares all scalings on them. Every
scaling reads the same texts. WORKDIR has results.jsonl, a line for each text, results.csv,
report.md and the pictures of it; a run that was cut goes on where it was, and one with more
scalings, tasks or lengths adds to it. --report_only makes the report of what is there,
--compare=OTHER tells what is different in another workdir.
"""

import contextlib
import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from absl import flags

import qwen_jax
from configs.models import find_config
from experiments.long_context import base_bound, frequencies, small_report, small_study
from experiments.long_context.compare import Side, write_comparison
from experiments.long_context.measuring import Plan, check, is_judged, measure, scaled_models
from experiments.long_context.records import need_scores
from experiments.long_context.report import FREQUENCIES, write_report
from experiments.long_context.scalings import split_scalings
from experiments.long_context.small_model import SmallModel
from experiments.long_context.tasks import GROUPS, TASKS, QuestionTask, find_tasks, reads_essay
from experiments.long_context.text import (
    TextRenderer,
    project_text,
    read_haystack,
    read_questions,
)
from experiments.settings import read_settings, settle
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.errors import UserError
from qwen_jax.hf_config import DTYPES
from qwen_jax.provenance import provenance
from qwen_jax.rope_scaling import parse_rope_flag
from tools import command_line, mesh_flag

_STUDY = flags.DEFINE_enum(
    "study",
    None,
    ["tasks", "small", "base_bound", "frequencies"],
    "Tasks on a checkpoint, with --model the default; the same on small models that are trained "
    "for it, without it the default; the smallest base for a length; what scalings make of "
    "frequencies.",
)
_MODEL = flags.DEFINE_string(
    "model", None, "Checkpoint directory or hub id; of frequencies also a preset's name."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go.", required=True)
_TASKS = flags.DEFINE_list(
    "tasks",
    None,
    f"Of {', '.join((*GROUPS, *TASKS))}. If not given passkey and niah_single_2, of small models "
    "recall, niah_single_2 and loss.",
)
_LENGTHS = flags.DEFINE_list(
    "lengths",
    None,
    "Of texts, in tokens; 4k is 4096. If not given 1k,2k,4k; of small models doubling from "
    "--trained to 16 times that; of base_bound up to 256k; of frequencies, which takes one, four "
    "times --trained.",
)
_ROPE = flags.DEFINE_string(
    "rope",
    None,
    "Scalings as the tools' --rope, by commas: none,yarn:4,original=32768,dca. If not given none; "
    "of frequencies some of each kind.",
)
_TRAINED = flags.DEFINE_integer(
    "trained",
    None,
    "The trained length, in tokens: of small models, 128 if not given; of frequencies, the "
    "declared one if not given.",
    lower_bound=16,
)
_BASE = flags.DEFINE_float(
    "base",
    None,
    "Of small models: of RoPE; if not given the one that leaves as many of all pairs without a "
    "turn as Qwen3's.",
    lower_bound=2,
)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 32, "Of small models.", lower_bound=4)
_LAYERS = flags.DEFINE_integer("layers", 2, "Of small models.", lower_bound=1)
_QK_NORM = flags.DEFINE_bool(
    "qk_norm", True, "Of small models: whether queries and keys are normed."
)
_TRAIN_STEPS = flags.DEFINE_integer("train_steps", 900, "Of small models.", lower_bound=9)
_HEAD_DIMS = flags.DEFINE_list(
    "head_dims", ["64", "128"], "Of base_bound: rotated channels of a head."
)
_PER_DECADE = flags.DEFINE_integer(
    "per_decade", 30, "Of base_bound: bases between a number and its tenfold.", lower_bound=1
)
_DEPTHS = flags.DEFINE_integer(
    "depths", 5, "Places of the needle, from the beginning to the end.", lower_bound=1
)
_EXAMPLES = flags.DEFINE_integer(
    "examples", None, "Texts of each depth and seed; 2, of small models 4.", lower_bound=1
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 1, "How many sets of texts; of small models also how many models.", lower_bound=1
)
_HAYSTACK = flags.DEFINE_string(
    "haystack", None, "A text file as filler; this package's docstrings if not given."
)
_QA = flags.DEFINE_list(
    "qa",
    [],
    "JSONL files with question, answer and documents (or context) a line, for tasks qa_1, qa_2 ...",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Texts that run together.", lower_bound=1)
_JUDGE = flags.DEFINE_string(
    "judge",
    "none",
    "Of task key_loss: the scaling with which the model tells which tokens need distant ones.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "Of the parameters; float32 on CPU, else the checkpoint's."
)
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Make the report of the results there.")
_COMPARE = flags.DEFINE_string(
    "compare", None, "Another workdir: tell how the results of --workdir differ from its own."
)

# What each study reads besides --workdir and --lengths.
_READS = {
    "tasks": (
        _MODEL,
        _ROPE,
        _TASKS,
        _DEPTHS,
        _EXAMPLES,
        _SEEDS,
        _HAYSTACK,
        _QA,
        _BATCH_SIZE,
        _JUDGE,
        _DTYPE,
        _REPORT_ONLY,
        _COMPARE,
        mesh_flag.MESH,
    ),
    "small": (
        _TASKS,
        _DEPTHS,
        _EXAMPLES,
        _SEEDS,
        _TRAINED,
        _BASE,
        _HEAD_DIM,
        _LAYERS,
        _QK_NORM,
        _TRAIN_STEPS,
        _REPORT_ONLY,
        _COMPARE,
    ),
    "base_bound": (_HEAD_DIMS, _PER_DECADE),
    "frequencies": (_MODEL, _ROPE, _TRAINED),
}
_SMALL_TASKS = ("recall", "niah_single_2", "loss")
# What a small model is, in the settings of a workdir.
_SMALL = "small"


def main() -> None:
    """Runs the study."""
    workdir = command_line.path(_WORKDIR)
    study = _STUDY.value or _default_study(workdir)
    for flag in {flag.name: flag for read in _READS.values() for flag in read}.values():
        names = [name for name, read in _READS.items() if flag.name in [own.name for own in read]]
        if flag.present and study not in names:
            raise UserError(f"--{flag.name} is of --study={' or '.join(names)}; leave it out")
    if _COMPARE.present or _REPORT_ONLY.value:
        _tell(workdir)
        return
    match study:
        case "tasks":
            _run_tasks(workdir)
        case "small":
            _run_small(workdir)
        case "base_bound":
            lengths = _lengths([1024 << i for i in range(9)])
            head_dims = command_line.numbers(_HEAD_DIMS)
            made = workdir, head_dims, lengths, _PER_DECADE.value, _origin("float64")
            print(base_bound.write_study(*made))
        case "frequencies":
            print(frequencies.write_study(workdir, _scalings(), _origin("float32")))


def _default_study(workdir: Path) -> str:
    """What is there, where nothing is to be measured; else by whether there is a model."""
    if _COMPARE.value or _REPORT_ONLY.value:
        return "small" if _SMALL in read_settings(workdir) else "tasks"
    return "small" if _MODEL.value is None else "tasks"


def _tell(workdir: Path) -> None:
    """What is known from the results that are there."""
    read = {flag.name: flag for flags_ in _READS.values() for flag in flags_}.values()
    for flag in read:
        if flag.present and flag.name not in (_REPORT_ONLY.name, _COMPARE.name):
            raise UserError(
                f"--{flag.name} changes nothing of results that are there; leave it out"
            )
    if not _COMPARE.present:
        print(_report(workdir))
        return
    if _REPORT_ONLY.value:
        raise UserError("--report_only and --compare are two things; give one")
    there = command_line.path(_COMPARE)
    both = [read_settings(path).get(_SMALL) for path in (workdir, there)]
    print(write_comparison(*(_side(path, all(both)) for path in (workdir, there)), workdir=workdir))


def _side(workdir: Path, named: bool) -> Side:
    """Results for a comparison; of small models scalings by name and lengths by the trained one."""
    scores = need_scores(workdir)
    if not named:
        return Side(str(workdir), scores, 1)
    model = _small_model(workdir)
    return Side(
        str(workdir),
        small_report.named_scores(scores, small_study.methods(model)),
        model.trained,
    )


def _small_model(workdir: Path) -> SmallModel:
    """That of a workdir's settings."""
    fields = read_settings(workdir)[_SMALL]
    if set(fields) != {field.name for field in dataclasses.fields(SmallModel)}:
        raise UserError(f"{workdir}: its settings are of another version; give another --workdir")
    return SmallModel(**fields)


def _scalings() -> list[frequencies.Scaling]:
    config = find_config(_model())
    trained = _TRAINED.value or config.max_position_embeddings
    lengths = _lengths([4 * trained])
    if len(lengths) > 1:
        raise UserError("--lengths: --study=frequencies takes one")
    texts = frequencies.some_of_each(trained, max(lengths[0] / trained, 1))
    if _ROPE.value is not None:
        texts = split_scalings(_ROPE.value)
    return frequencies.scalings(config, texts, trained, lengths[0])


def _origin(dtype: str) -> dict[str, Any]:
    return provenance(dtype, command_line.settings())


def _model() -> str:
    if not _MODEL.value:
        raise UserError("--model is needed; see --help")
    return _MODEL.value


def _lengths(default: list[int]) -> list[int]:
    if _LENGTHS.value is None:
        return default
    found = list(dict.fromkeys(_length(text) for text in _LENGTHS.value))
    if not found:
        raise UserError("--lengths is empty; give some, such as 4k,8k")
    return found


def _tasks(default: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """The tasks, and the digest of their questions."""
    questions = [read_questions(Path(text).expanduser()) for text in _QA.value]
    return find_tasks(_TASKS.value or default, questions), _digest(repr(questions))


def _run_tasks(workdir: Path) -> None:
    """Measures what is missing and writes the report."""
    name = _model()
    ropes = split_scalings(_ROPE.value or "none")
    for rope in ropes:
        parse_rope_flag(rope)
    judging = _JUDGE.value
    if split_scalings(judging) != [judging]:
        raise UserError(f"--judge={judging} should be one scaling")
    parse_rope_flag(judging)
    tasks, questions = _tasks(("passkey", "niah_single_2"))
    lengths = _lengths([1024, 2048, 4096])
    essay = None if _HAYSTACK.value is None else read_haystack(command_line.path(_HAYSTACK))
    directory = resolve_source(name)
    tokenizer = qwen_jax.load_tokenizer(directory)
    essay = project_text() if essay is None else essay
    renderer = TextRenderer(tokenizer, essay)
    examples = _EXAMPLES.value or 2
    plan = Plan(tasks, lengths, range(_SEEDS.value), _DEPTHS.value, examples)
    check(renderer, plan)
    model, params = qwen_jax.load_pretrained(directory, _DTYPE.value, mesh_flag.MESH.value)
    models = scaled_models(model, ropes)
    (judge,) = scaled_models(model, [judging]).values()
    dtype = params["embed_tokens"]["weight"].dtype.name
    settings = {"model": name, "depths": _DEPTHS.value, "examples": plan.examples, "dtype": dtype}
    # What the tasks read: the package's own text is another with another version of it.
    if any(reads_essay(task) for task in tasks.values()):
        settings["haystack"] = _digest(essay)
    if any(isinstance(task, QuestionTask) for task in tasks.values()):
        settings["questions"] = questions
    if any(is_judged(task) for task in tasks.values()):
        settings["judge"] = judging
    settle(workdir, settings)
    batch_size = _BATCH_SIZE.value
    measure(workdir, models, params, renderer, plan, lambda _: batch_size, _origin(dtype), judge)
    with contextlib.suppress(UserError):
        # Of models that rotate a part of a head there is no such picture.
        trained = model.config.max_position_embeddings
        scaled = frequencies.scalings(model.config, ropes, trained, max(lengths))
        frequencies.draw(scaled, workdir / FREQUENCIES)
    print(_report(workdir))


def _run_small(workdir: Path) -> None:
    """Trains and measures what is missing and writes the report."""
    model = SmallModel(
        _TRAINED.value or 128,
        _BASE.value,
        _HEAD_DIM.value,
        _LAYERS.value,
        _QK_NORM.value,
        _TRAIN_STEPS.value,
    )
    tasks, _ = _tasks(_SMALL_TASKS)
    lengths = _lengths([model.trained << i for i in range(5)])
    examples = _EXAMPLES.value or 4
    small_study.check(tasks, lengths, _DEPTHS.value)
    settle(
        workdir,
        {_SMALL: dataclasses.asdict(model), "depths": _DEPTHS.value, "examples": examples},
    )
    small_study.run(
        workdir,
        model,
        _SEEDS.value,
        tasks,
        lengths,
        _DEPTHS.value,
        examples,
        _origin("float32"),
    )
    print(_report(workdir))


def _report(workdir: Path) -> str:
    """Writes and returns the report of what is there."""
    scores, settings = need_scores(workdir), read_settings(workdir)
    if _SMALL in settings:
        return small_report.write_small_report(workdir, _small_model(workdir), scores)
    return write_report(scores, f"Long contexts of {settings.get('model', 'a model')}", workdir)


def _length(text: str) -> int:
    match = re.fullmatch(r"(\d+)(k?)", text)
    if not match or not int(match[1]):
        raise UserError(f"--lengths: {text!r} should be a number of tokens, such as 4096 or 4k")
    return int(match[1]) * (1024 if match[2] else 1)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    command_line.run(main)
