"""Speed and memory beside transformers, on one checkpoint, in one run.

    python -m tools.benchmark --model=DIR --workdir=results
    python -m tools.benchmark --model=qwen3-0.6b --workdir=results
    python -m tools.benchmark --workload=train --model=configs/benchmark/train_step \\
        --workdir=results
    python -m tools.benchmark --workload=dispatch --model=qwen3-30b-a3b --workdir=results

A preset's name, or a directory with config.json alone, stands for random weights of that shape,
written by transformers in bfloat16 into --workdir. Everything runs in float32. Medians are printed
with the lowest and the highest figure, and results.jsonl gets every measurement with what it was
made with. Needs requirements-dev.txt.

--workload=train measures train steps of AdamW, each engine in a process of its own, and checks that
both have the same losses. --workload=dispatch measures the ways of running one mixture-of-experts
layer of the model's shape instead, with random weights and without the reference, and draws
dispatch.png.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import tqdm
from absl import flags

from configs.models import get_preset, names_a_preset
from qwen_jax.benchmark.dispatch import DispatchRow, measure_dispatch
from qwen_jax.benchmark.engines import ENGINES
from qwen_jax.benchmark.loading import measure_load
from qwen_jax.benchmark.pictures import draw_dispatch
from qwen_jax.benchmark.throughput import measure_throughput
from qwen_jax.benchmark.training import measure_training
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.evaluation.language_model import check_language_model
from qwen_jax.evaluation.random_checkpoint import write_random_checkpoint
from qwen_jax.hf_config import load_config
from qwen_jax.nn.moe import Dispatch, choose_dispatch
from qwen_jax.provenance import provenance
from qwen_jax.reference import import_reference
from tools import command_line, mesh_flag

_MODEL = flags.DEFINE_string("model", None, "Checkpoint or preset.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go.", required=True)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 512, "Tokens to prefill.", lower_bound=1)
_STEPS = flags.DEFINE_integer("decode_tokens", 16, "Tokens to decode.", 1, 128)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each figure.", lower_bound=1)
_WORKLOAD = flags.DEFINE_enum(
    "workload",
    "model",
    ["model", "train", "dispatch"],
    "What to measure: loading and decoding, a train step, or the experts alone.",
)
_ROWS = flags.DEFINE_integer(
    "batch_size", 4, "With --workload=train: rows of a batch.", lower_bound=1
)
_LENGTH = flags.DEFINE_integer(
    "length", 512, "With --workload=train: tokens of a row.", lower_bound=2
)
_TOKENS = flags.DEFINE_list(
    "tokens",
    ["1", "8", "64", "256", "1024"],
    "With --workload=dispatch: how many tokens to send to the experts, one measurement for each.",
)
_FLAGS = (
    mesh_flag.MESH,
    _MODEL,
    _WORKDIR,
    _PROMPT,
    _STEPS,
    _REPEATS,
    _WORKLOAD,
    _TOKENS,
    _ROWS,
    _LENGTH,
)
# Which of them each workload reads, beside --model, --workdir and --repeats.
_READ = {
    "model": (_PROMPT, _STEPS, mesh_flag.MESH),
    "train": (_ROWS, _LENGTH),
    "dispatch": (_TOKENS,),
}


def main() -> None:
    """Measures, prints the table, writes results.jsonl."""
    for name, read in _READ.items():
        for flag in read:
            if name != _WORKLOAD.value and flags.FLAGS[flag.name].present:
                raise UserError(f"--{flag.name} is not for --workload={_WORKLOAD.value}")
    workdir = command_line.path(_WORKDIR)
    preset = get_preset(_MODEL.value) if names_a_preset(_MODEL.value) else None
    directory = resolve_source(_MODEL.value) if preset is None else workdir / _MODEL.value.lower()
    if _WORKLOAD.value == "dispatch":
        config = load_config(directory) if preset is None else preset
        counts = _dispatch_counts(config)
    elif preset is None:
        if [path.name for path in directory.iterdir()] == ["config.json"]:
            preset, directory = load_config(directory), workdir / directory.name
        else:
            check_language_model(directory, "are what is timed")
    results = workdir / "results.jsonl"
    try:
        # Before the minutes of measuring.
        workdir.mkdir(parents=True, exist_ok=True)
        results.open("a").close()
    except OSError as error:
        message = f"--workdir={_WORKDIR.value}: cannot be written ({error.strerror or error})"
        raise UserError(message) from None
    if _WORKLOAD.value == "dispatch":
        _measure_dispatch(config, counts, workdir)
        return
    import_reference()
    if preset is not None and not (directory / "config.json").is_file():
        write_random_checkpoint(preset, directory)
    if _WORKLOAD.value == "train":
        speeds = measure_training(directory, _ROWS.value, _LENGTH.value, _REPEATS.value)
        what = f"train step of {_ROWS.value} x {_LENGTH.value}, tokens/s"
        _report(workdir, {name: {what: values} for name, values in speeds.items()})
        return
    config = load_config(directory)
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in ENGINES}
    for _ in tqdm.trange(_REPEATS.value, desc="loading", disable=None):
        for name in ENGINES:
            load = measure_load(name, directory, mesh_flag.MESH.value)
            for key, value in (
                ("load, s", load.load_s),
                ("load + first forward, s", load.load_s + load.forward_s),
                ("peak memory of a load, GB", load.peak_bytes / 1e9),
            ):
                figures[name].setdefault(key, []).append(value)
    speeds = measure_throughput(
        directory,
        config.vocab_size,
        _PROMPT.value,
        _STEPS.value,
        _REPEATS.value,
        mesh_flag.MESH.value,
    )
    for name, speed in speeds.items():
        figures[name][f"prefill of {_PROMPT.value}, tokens/s"] = speed["prefill"]
        figures[name][f"decode after {_PROMPT.value}, tokens/s"] = speed["decode"]
    _report(workdir, figures)


def _report(workdir: Path, figures: dict[str, dict[str, list[float]]]) -> None:
    _write(
        workdir,
        [
            {"engine": name, "what": what, "values": values}
            for name, measured in figures.items()
            for what, values in measured.items()
        ],
    )
    _print_table(figures)


def _write(workdir: Path, records: list[dict[str, Any]]) -> None:
    origin = provenance("float32", {flag.name: flag.value for flag in _FLAGS})
    with (workdir / "results.jsonl").open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({"model": _MODEL.value, **record, **origin}) + "\n")


def _dispatch_counts(config: ModelConfig) -> list[int]:
    if config.moe is None:
        raise UserError(f"--model={_MODEL.value} has no experts to dispatch to")
    if not all(n.isdecimal() and int(n) for n in _TOKENS.value) or not _TOKENS.value:
        raise UserError(f"--tokens={','.join(_TOKENS.value)} should be numbers, such as 1,64")
    return [int(n) for n in _TOKENS.value]


def _measure_dispatch(config: ModelConfig, counts: list[int], workdir: Path) -> None:
    rows = measure_dispatch(config.moe, config.hidden_size, counts, repeats=_REPEATS.value)
    _write(workdir, [{"workload": "dispatch", **dataclasses.asdict(row)} for row in rows])
    moe = config.moe
    shape = f"{moe.num_experts} experts of {moe.intermediate_size}, {moe.num_experts_per_tok} each"
    draw_dispatch(rows, f"{_MODEL.value}: {shape}, float32", workdir / "dispatch.png")
    chosen = {n: choose_dispatch(n, moe, jax.default_backend()) for n in counts}
    methods = list(dict.fromkeys(row.method for row in rows))
    print(f"| tokens | {' | '.join(methods)} |\n|---|{'---|' * len(methods)}")
    for n in counts:
        cells = [_cell(row, chosen[n]) for row in rows if row.num_tokens == n]
        print(f"| {n} | {' | '.join(cells)} |")
    print("ms (temporaries, MB); the default in bold")


def _cell(row: DispatchRow, chosen: Dispatch) -> str:
    time = "not run" if row.median is None else _three_digits(1e3 * row.median)
    cell = f"{time} ({_three_digits(row.temporaries / 1e6)})"
    return f"**{cell}**" if row.method is chosen else cell


def _three_digits(value: float) -> str:
    """Rounded, and without an exponent: 0.976, 85.2, 11,100."""
    return f"{float(f'{value:.3g}'):,g}"


def _print_table(figures: dict[str, dict[str, list[float]]]) -> None:
    ours, peer = ENGINES
    print(f"| {_MODEL.value}, float32 | {ours} | {peer} | ratio |\n|---|---|---|---|")
    for what, values in figures[ours].items():
        medians = [statistics.median(v) for v in (values, figures[peer][what])]
        cells = [
            "{} ({} to {})".format(*map(_three_digits, (statistics.median(v), min(v), max(v))))
            for v in (values, figures[peer][what])
        ]
        print(f"| {what} | {' | '.join(cells)} | {medians[0] / medians[1]:.2f} |")


if __name__ == "__main__":
    command_line.run(main)
