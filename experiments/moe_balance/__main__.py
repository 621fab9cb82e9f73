"""Compares ways to keep experts busy, on small models of its own; looks at those of checkpoints.

    python -m experiments.moe_balance --workdir=results --seeds=4
    python -m experiments.moe_balance --analyze --model=Qwen/Qwen1.5-MoE-A2.7B \\
        --domains=texts/ --workdir=results/qwen1.5
    python -m experiments.moe_balance --workdir=results/qwen3 --compare=results/qwen1.5

Without --model the study trains small Qwen3-MoE models, an arm for each way to balance, and
measures them on held-out texts. WORKDIR has results.jsonl, a line for each arm and seed,
results.csv, report.md and the pictures of it; a run that was cut goes on where it was, and one with
more arms or seeds adds to it. --report_only makes the report of what is there.

With --analyze a checkpoint reads texts of several domains: balance, specialisation and what
imbalance would cost, by layer. --domains=DIRECTORY has a file or a directory for each domain;
NAME=PATH,NAME=PATH names them one by one. --compare=OTHER tells how two such results differ.
--cost times train steps with and without the routers' figures.
"""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

import qwen_jax
from experiments.moe_balance import analysis, cost, study
from experiments.moe_balance.arms import find_arms
from experiments.moe_balance.domains import texts_digest
from experiments.moe_balance.report import write_report
from experiments.moe_balance.texts import read_domains, rows_of
from experiments.moe_balance.training import Sizes
from experiments.results import no_results
from experiments.settings import read_settings, settle
from experiments.workers import default_workers
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.errors import UserError
from qwen_jax.hf_config import DTYPES, load_config
from qwen_jax.provenance import provenance
from tools import command_line, mesh_flag

_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 1, "How many models of each arm.", lower_bound=1)
_ARMS = flags.DEFINE_list(
    "arms", None, "Some of the study's arms by name, by commas; if not given all of them."
)
_STEPS = flags.DEFINE_integer("steps", 500, "Of training, of small models.", lower_bound=10)
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", 48, "Of small models.", lower_bound=8)
_LAYERS = flags.DEFINE_integer("layers", 2, "Of small models.", lower_bound=1)
_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Processes that train small models side by side; if not given one for each core, one on "
    "accelerators.",
    lower_bound=1,
)
_ANALYZE = flags.DEFINE_bool("analyze", False, "Look at the experts of --model.")
_MODEL = flags.DEFINE_string("model", None, "Of --analyze: checkpoint directory or hub id.")
_DOMAINS = flags.DEFINE_list(
    "domains",
    [],
    "Of --analyze: a directory with a file or a directory for each domain, or NAME=PATH by commas. "
    "If not given two texts that come with Python.",
)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "Of --analyze: read of each domain.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 512, "Of --analyze: of a row.", lower_bound=2)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 4, "Of --analyze: rows that run together.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "Of --analyze: of the parameters; float32 on CPU, else the checkpoint's."
)
_COMPARE = flags.DEFINE_string(
    "compare", None, "Another workdir of --analyze: tell how --workdir differs from it."
)
_COST = flags.DEFINE_bool("cost", False, "Time train steps with and without routers' figures.")
_REPEATS = flags.DEFINE_integer("repeats", 100, "Of --cost: steps of each.", lower_bound=10)
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Make the report of the results there.")

_OF_STUDY = (_SEEDS, _ARMS, _STEPS, _HIDDEN_SIZE, _LAYERS, _WORKERS)
_OF_ANALYSIS = (_MODEL, _DOMAINS, _TOKENS, _LENGTH, _BATCH_SIZE, _DTYPE, mesh_flag.MESH)
# What a workdir's results are of, in its settings.
_SIZES, _ANALYSED = "sizes", "analyzed"


def main() -> None:
    """Runs the study, looks at a checkpoint, or tells of the results there."""
    workdir = command_line.path(_WORKDIR)
    if _REPORT_ONLY.value or _COMPARE.present:
        _refuse(
            (*_OF_STUDY, *_OF_ANALYSIS, _ANALYZE, _COST, _REPEATS),
            "changes nothing of results that are there",
        )
        if _REPORT_ONLY.value and _COMPARE.present:
            raise UserError("--report_only and --compare are two things; give one")
        print(_compared(workdir) if _COMPARE.present else _report(workdir))
    elif _COST.value:
        _refuse((*_OF_STUDY, *_OF_ANALYSIS, _ANALYZE), "changes nothing of --cost")
        print(cost.measure(workdir, _REPEATS.value, _origin("float32")))
    elif _ANALYZE.value:
        _refuse((*_OF_STUDY, _REPEATS), "is not of --analyze")
        _analyze(workdir)
    else:
        _refuse(_OF_ANALYSIS, "is of --analyze")
        _refuse((_REPEATS,), "is of --cost")
        _run_study(workdir)


def _refuse(given: tuple[flags.FlagHolder, ...], reason: str) -> None:
    for flag in given:
        if flag.present:
            raise UserError(f"--{flag.name} {reason}; leave it out")


def _origin(dtype: str) -> dict[str, Any]:
    return provenance(dtype, command_line.settings())


def _run_study(workdir: Path) -> None:
    sizes = Sizes(_STEPS.value, _HIDDEN_SIZE.value, _LAYERS.value)
    arms = find_arms(_ARMS.value)
    wanted = {_SIZES: dataclasses.asdict(sizes), "texts": texts_digest()}
    _check_kind(workdir, _SIZES)
    settle(workdir, wanted)
    workers = _WORKERS.value or default_workers()
    study.run(workdir, sizes, arms, _SEEDS.value, _origin("float32"), workers)
    print(_report(workdir))


def _analyze(workdir: Path) -> None:
    if not _MODEL.value:
        raise UserError("--model is needed with --analyze; see --help")
    texts = read_domains(_DOMAINS.value)
    directory = resolve_source(_MODEL.value, weights=False)
    if load_config(directory).moe is None:
        raise UserError(f"{_MODEL.value} has no experts; give a checkpoint of a mixture of experts")
    rows = rows_of(texts, qwen_jax.load_tokenizer(directory), _TOKENS.value, _LENGTH.value)
    _check_kind(workdir, _ANALYSED)
    model, params = qwen_jax.load_pretrained(_MODEL.value, _DTYPE.value, mesh_flag.MESH.value)
    found = analysis.analyse(model, params, _MODEL.value, list(texts), rows, _BATCH_SIZE.value)
    settle(workdir, {_ANALYSED: True})
    dtype = params["embed_tokens"]["weight"].dtype.name
    analysis.save_analysis(workdir, found, _origin(dtype))
    print(_report(workdir))


def _check_kind(workdir: Path, kind: str) -> None:
    other = _SIZES if kind == _ANALYSED else _ANALYSED
    if other in read_settings(workdir):
        what = "the study" if other == _SIZES else "--analyze"
        raise UserError(f"{workdir}: has results of {what}; give another --workdir")


def _report(workdir: Path) -> str:
    """Writes and returns the report of what is there."""
    settings = read_settings(workdir)
    if _ANALYSED in settings:
        return analysis.write_analysis(workdir, analysis.read_analysis(workdir))
    results = study.read(workdir)
    if not results:
        raise no_results(workdir)
    return write_report(workdir, Sizes(**settings[_SIZES]), results)


def _compared(workdir: Path) -> str:
    other = command_line.path(_COMPARE)
    both = [analysis.read_analysis(path) for path in (workdir, other)]
    return analysis.write_comparison(workdir, *both)


if __name__ == "__main__":
    command_line.run(main)
