"""Compares ways of reading beyond the trained length, on a checkpoint or without a model.

    python -m experiments.long_context --model=Qwen/Qwen3-0.6B --tasks=passkey,niah \\
        --lengths=4k,8k,16k --rope=none,yarn:4,original=32768,dca --workdir=results
    python -m experiments.long_context --study=base_bound --workdir=results
    python -m experiments.long_context --study=frequencies --model=qwen3-0.6b --trained=32768 \\
        --workdir=results

Every scaling reads the same texts. WORKDIR has results.jsonl, a line for each text, results.csv,
report.md and the pictures of it; a run that was cut goes on where it was, and one with more
scalings, tasks or lengths adds to it. --report_only makes the report of what is there.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import flags

import qwen_jax
from configs.models import find_config
from experiments.long_context import base_bound, frequencies
from experiments.long_context.report import write_report
from experiments.long_context.scalings import split_scalings
from experiments.long_context.scoring import Score, draws, make_example, score
from experiments.long_context.tasks import GROUPS, TASKS, find_tasks
from experiments.long_context.text import (
    TextRenderer,
    project_text,
    read_haystack,
    read_questions,
)
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.errors import UserError
from qwen_jax.hf_config import DTYPES
from qwen_jax.provenance import provenance
from qwen_jax.rope_scaling import parse_rope_flag, with_rope_scaling
from tools import command_line, jsonl_rows, mesh_flag

_STUDY = flags.DEFINE_enum(
    "study",
    "tasks",
    ["tasks", "base_bound", "frequencies"],
    "Tasks on a checkpoint; the smallest base for a length; what scalings make of frequencies.",
)
_MODEL = flags.DEFINE_string(
    "model", None, "Checkpoint directory or hub id; of frequencies also a preset's name."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go.", required=True)
_TASKS = flags.DEFINE_list(
    "tasks", ["passkey", "niah_single_2"], f"Of {', '.join((*GROUPS, *TASKS))}."
)
_LENGTHS = flags.DEFINE_list(
    "lengths",
    None,
    "Of texts, in tokens; 4k is 4096. If not given 1k,2k,4k; of base_bound doubling up to 256k; of "
    "frequencies, which takes one, four times --trained.",
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
    "Of frequencies: the trained length, in tokens; the declared one if not given.",
    lower_bound=16,
)
_HEAD_DIMS = flags.DEFINE_list(
    "head_dims", ["64", "128"], "Of base_bound: rotated channels of a head."
)
_PER_DECADE = flags.DEFINE_integer(
    "per_decade", 30, "Of base_bound: bases between a number and its tenfold.", lower_bound=1
)
_DEPTHS = flags.DEFINE_integer(
    "depths", 5, "Places of the needle, from the beginning to the end.", lower_bound=1
)
_EXAMPLES = flags.DEFINE_integer("examples", 2, "Texts of each depth and seed.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 1, "How many sets of texts.", lower_bound=1)
_HAYSTACK = flags.DEFINE_string(
    "haystack", None, "A text file as filler; this package's docstrings if not given."
)
_QA = flags.DEFINE_list(
    "qa",
    [],
    "JSONL files with question, answer and documents (or context) a line, for tasks qa_1, qa_2 ...",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Texts that run together.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "Of the parameters; float32 on CPU, else the checkpoint's."
)
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Make the report of the results there.")

_RESULTS, _SETTINGS = "results.jsonl", "settings.json"
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
        _DTYPE,
        _REPORT_ONLY,
        mesh_flag.MESH,
    ),
    "base_bound": (_HEAD_DIMS, _PER_DECADE),
    "frequencies": (_MODEL, _ROPE, _TRAINED),
}


def main() -> None:
    """Runs the study."""
    workdir = command_line.path(_WORKDIR)
    own = {flag.name for flag in _READS[_STUDY.value]}
    for study, read in _READS.items():
        for flag in read:
            if flag.present and flag.name not in own:
                raise UserError(f"--{flag.name} is of --study={study}; leave it out")
    match _STUDY.value:
        case "tasks":
            _run_tasks(workdir)
        case "base_bound":
            lengths = _lengths([1024 << i for i in range(9)])
            head_dims = command_line.numbers(_HEAD_DIMS)
            made = workdir, head_dims, lengths, _PER_DECADE.value, _origin("float64")
            print(base_bound.write_study(*made))
        case "frequencies":
            print(frequencies.write_study(workdir, _scalings(), _origin("float32")))


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
    return default if _LENGTHS.value is None else [_length(text) for text in _LENGTHS.value]


def _run_tasks(workdir: Path) -> None:
    """Measures what is missing and writes the report."""
    if _REPORT_ONLY.value:
        scores = _read(workdir / _RESULTS)
        if not scores:
            raise UserError(f"{workdir / _RESULTS}: has no results; run without --report_only")
        print(write_report(scores, _title(workdir), workdir))
        return
    name = _model()
    ropes = split_scalings(_ROPE.value or "none")
    scalings = {rope: parse_rope_flag(rope) for rope in ropes}
    questions = [read_questions(Path(text).expanduser()) for text in _QA.value]
    tasks = find_tasks(_TASKS.value, questions)
    lengths = _lengths([1024, 2048, 4096])
    essay = None if _HAYSTACK.value is None else read_haystack(command_line.path(_HAYSTACK))
    directory = resolve_source(name)
    tokenizer = qwen_jax.load_tokenizer(directory)
    essay = project_text() if essay is None else essay
    renderer = TextRenderer(tokenizer, essay)
    model, params = qwen_jax.load_pretrained(directory, _DTYPE.value, mesh_flag.MESH.value)
    models = {
        rope: model.clone(config=with_rope_scaling(model.config, scaling))
        for rope, scaling in scalings.items()
    }
    _settle(workdir, _digest(essay), _digest(repr(questions)))
    done = {(s.rope, s.task, s.length, s.seed, s.number) for s in _read(workdir / _RESULTS)}
    depths = [float(depth) for depth in np.linspace(0, 1, _DEPTHS.value)]
    if _DEPTHS.value == 1:
        depths = [0.5]
    units = [(task, length) for length in sorted(lengths) for task in tasks]
    origin = _origin(params["embed_tokens"]["weight"].dtype.name)
    bar = tqdm.tqdm(total=len(units) * len(ropes), desc="tasks x lengths x scalings", disable=None)
    for task, length in units:
        wanted = draws(task, length, depths, _SEEDS.value, _EXAMPLES.value)
        texts = [(draw, make_example(renderer, tasks[task], draw)) for draw in wanted]
        for rope, scaled in models.items():
            bar.set_postfix_str(f"{task} {length} {rope}")
            left = [
                pair
                for pair in texts
                if (rope, task, length, pair[0].seed, pair[0].number) not in done
            ]
            if left:
                found = list(score(scaled, params, rope, left, _BATCH_SIZE.value))
                with (workdir / _RESULTS).open("a", encoding="utf-8") as file:
                    for own in found:
                        file.write(json.dumps({**dataclasses.asdict(own), **origin}) + "\n")
            bar.update()
    bar.close()
    print(write_report(_read(workdir / _RESULTS), _title(workdir), workdir))


def _length(text: str) -> int:
    match = re.fullmatch(r"(\d+)(k?)", text)
    if not match or not int(match[1]):
        raise UserError(f"--lengths: {text!r} should be a number of tokens, such as 4096 or 4k")
    return int(match[1]) * (1024 if match[2] else 1)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _settle(workdir: Path, haystack: str, questions: str) -> None:
    """Refuses a workdir of other texts or another model; filler and questions by their digests.

    The package's own text is another with another version of it.
    """
    wanted = {
        "model": _MODEL.value,
        "depths": _DEPTHS.value,
        "examples": _EXAMPLES.value,
        "haystack": haystack,
        "questions": questions,
        "dtype": _DTYPE.value,
    }
    path = workdir / _SETTINGS
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in wanted.items():
            if before.get(name) != value:
                raise UserError(
                    f"{path}: the results there have {name} = {before.get(name)}, not {value}; set "
                    "it back or give another --workdir"
                )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def _title(workdir: Path) -> str:
    path = workdir / _SETTINGS
    model = json.loads(path.read_text(encoding="utf-8"))["model"] if path.is_file() else "a model"
    return f"Long contexts of {model}"


def _read(path: Path) -> list[Score]:
    """Results that are there; the line that a kill cut is left out of the file as well."""
    if not path.is_file() or not path.stat().st_size:
        return []
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
        if not text:
            return []
    names = [field.name for field in dataclasses.fields(Score)]
    return [
        Score(**{name: fields[name] for name in names}) for _, fields in jsonl_rows.read_rows(path)
    ]


if __name__ == "__main__":
    command_line.run(main)
