"""Speed and memory beside transformers, in one run, and as shares of the machine's own limits.

    python -m tools.benchmark --model=DIR --workdir=results
    python -m tools.benchmark --model=qwen3-0.6b --workdir=results --batch_size=8
    python -m tools.benchmark --workload=table --workdir=results
    python -m tools.benchmark --workload=train --model=configs/benchmark/train_step \\
        --workdir=results
    python -m tools.benchmark --workload=dispatch --model=qwen3-30b-a3b --workdir=results

A preset's name, or a directory with config.json alone, stands for random weights of that shape,
written by transformers in bfloat16 into --workdir. Everything runs in float32, each engine in a
process of its own, turn by turn; what they do is compared as well. How fast the machine reads
memory and multiplies matrices is measured before each repeat. Medians are printed with the lowest
and the highest figure, ratios above 1 being in this package's favour; results.jsonl gets every
measurement with what it was made with, table.md the table and speed.png its picture. Needs
requirements-dev.txt.

--workload=table measures all that README.md's table has, --only=NAME,... some of it, and goes on
where it was interrupted. --peer_python=PYTHON measures another package beside, in the environment
of that interpreter: google-tunix, by qwen_jax/benchmark/peers/tunix_peer.py, on Qwen3's dense
models. --compare=OLD.jsonl tells what has changed since an earlier run.

--workload=dispatch measures the ways of running one mixture-of-experts layer of the model's shape
instead, with random weights and without the reference, and draws dispatch.png.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import tqdm
from absl import flags

from configs.models import get_preset, names_a_preset
from qwen_jax.benchmark.dispatch import DispatchRow, measure_dispatch
from qwen_jax.benchmark.engines import ENGINES, MOST_STEPS
from qwen_jax.benchmark.loading import measure_load
from qwen_jax.benchmark.measure import Measured, measure
from qwen_jax.benchmark.pictures import draw_dispatch, draw_speeds
from qwen_jax.benchmark.report import Row, comparison, read_rows, rows_of, table, three_digits
from qwen_jax.benchmark.works import START, TABLE, Work
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.evaluation.language_model import check_language_model
from qwen_jax.evaluation.random_checkpoint import write_random_checkpoint
from qwen_jax.hf_config import load_config
from qwen_jax.nn.moe import Dispatch, choose_dispatch
from qwen_jax.provenance import provenance
from qwen_jax.reference import import_reference
from tools import command_line, jsonl_rows, mesh_flag

_MODEL = flags.DEFINE_string("model", None, "Checkpoint or preset.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go.", required=True)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 512, "Tokens to prefill.", lower_bound=1)
_STEPS = flags.DEFINE_integer("decode_tokens", 16, "Tokens to decode.", 0, MOST_STEPS)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each figure.", lower_bound=1)
_WORKLOAD = flags.DEFINE_enum(
    "workload",
    "model",
    ["model", "table", "train", "dispatch"],
    "What to measure: loading, prefill and decoding of a model, all of the table, a train step, or "
    "the experts alone.",
)
_ROWS = flags.DEFINE_integer(
    "batch_size", None, "Rows at once: 1, or 4 of --workload=train.", lower_bound=1
)
_LENGTH = flags.DEFINE_integer(
    "length", 512, "With --workload=train: tokens of a row.", lower_bound=2
)
_TOKENS = flags.DEFINE_list(
    "tokens",
    ["1", "8", "64", "256", "1024"],
    "With --workload=dispatch: how many tokens to send to the experts, one measurement for each.",
)
_ONLY = flags.DEFINE_list("only", [], "With --workload=table: names of rows.")
_PEER = flags.DEFINE_string("peer_python", None, "Interpreter of an environment with google-tunix.")
_COMPARE = flags.DEFINE_string("compare", None, "results.jsonl of an earlier run.")
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
    _ONLY,
    _PEER,
    _COMPARE,
)
# Which of them each workload reads, beside --workdir and --repeats.
_READ = {
    "model": (_MODEL, _PROMPT, _STEPS, _ROWS, mesh_flag.MESH, _PEER, _COMPARE),
    "table": (_ONLY, _PEER, _COMPARE),
    "train": (_MODEL, _ROWS, _LENGTH, _COMPARE),
    "dispatch": (_MODEL, _TOKENS),
}
_PEER_SCRIPT = Path(__file__).parents[1] / "qwen_jax" / "benchmark" / "peers" / "tunix_peer.py"


def main() -> None:
    """Measures, prints the table, writes results.jsonl."""
    _check_flags()
    workdir = command_line.path(_WORKDIR)
    results = workdir / "results.jsonl"
    old = [] if _COMPARE.value is None else _read(command_line.path(_COMPARE))
    if _WORKLOAD.value == "table":
        _check_can_write(workdir, results)
        _measure_table(workdir, old)
        return
    preset = get_preset(_MODEL.value) if names_a_preset(_MODEL.value) else None
    directory = resolve_source(_MODEL.value) if preset is None else workdir / _MODEL.value.lower()
    if _WORKLOAD.value == "dispatch":
        config = load_config(directory) if preset is None else preset
        counts = _dispatch_counts(config)
        _check_can_write(workdir, results)
        _measure_dispatch(config, counts, workdir)
        return
    if preset is None and not _is_shape(directory):
        check_language_model(directory, "are what is timed")
    _check_can_write(workdir, results)
    if _WORKLOAD.value == "train":
        rows = _ROWS.value or 4
        work = Work(_name(), _MODEL.value, "train", rows=rows, length=_LENGTH.value)
        found = _measure_work(work, workdir)
    else:
        found = _measure_loads(workdir)
        work = Work(
            _name(),
            _MODEL.value,
            rows=_ROWS.value or 1,
            length=_PROMPT.value,
            steps=_STEPS.value,
        )
        found += _measure_work(work, workdir)
    _report(workdir, found, old)


def _check_flags() -> None:
    own = {flag.name for flag in _READ[_WORKLOAD.value]}
    for name in {flag.name for read in _READ.values() for flag in read} - own:
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} is not for --workload={_WORKLOAD.value}")
    if _WORKLOAD.value != "table" and _MODEL.value is None:
        raise UserError(f"--workload={_WORKLOAD.value} needs --model, a checkpoint or a preset")
    names = [work.name for work in TABLE]
    for name in _ONLY.value:
        if name not in names:
            raise UserError(f"--only={name}: there is no such row; known: {', '.join(names)}")
    if _PEER.value is not None and not Path(_PEER.value).is_file():
        raise UserError(f"--peer_python={_PEER.value}: no such file; give a Python interpreter")


def _check_can_write(workdir: Path, results: Path) -> None:
    """Before the minutes of measuring."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        results.open("a").close()
    except OSError as error:
        message = f"--workdir={_WORKDIR.value}: cannot be written ({error.strerror or error})"
        raise UserError(message) from None


def _read(path: Path) -> list[Row]:
    rows = read_rows([fields for _, fields in jsonl_rows.read_rows(path)])
    if not rows:
        raise UserError(f"{path}: has no speeds; give the results.jsonl of an earlier run")
    return rows


def _measure_table(workdir: Path, old: list[Row]) -> None:
    results = workdir / "results.jsonl"
    rows = _read(results) if results.stat().st_size else []
    chosen = [work for work in TABLE if not _ONLY.value or work.name in _ONLY.value]
    for work in chosen:
        done = {row.what for row in rows}
        if not {work.describe(figure) for figure in work.figures} <= done:
            found = _measure_work(work, workdir)
            _write(workdir, [row.record() for row in found])
            rows += found
    order = [work.describe(figure) for work in TABLE for figure in work.figures]
    rows = sorted((row for row in rows if row.what in order), key=lambda r: order.index(r.what))
    _show(workdir, rows, old)


def _is_shape(directory: Path) -> bool:
    """Whether a directory has nothing but config.json."""
    return [path.name for path in directory.iterdir()] == ["config.json"]


def _checkpoint(model: str, workdir: Path) -> tuple[Path, ModelConfig]:
    """The directory of a model, its random weights written if it is a shape alone."""
    preset = get_preset(model) if names_a_preset(model) else None
    if preset is not None:
        directory = workdir / model.lower()
    else:
        directory = resolve_source(model)
        if _is_shape(directory):
            preset, directory = load_config(directory), workdir / directory.name
    import_reference()
    if preset is not None and not (directory / "config.json").is_file():
        write_random_checkpoint(preset, directory)
    return directory, load_config(directory)


def _measure_work(work: Work, workdir: Path) -> list[Row]:
    directory, config = _checkpoint(work.model, workdir)
    if work.kind == "start":
        return rows_of(work, config, _measure_starts(work, directory, workdir))
    engines: dict[str, list[str] | None] = dict.fromkeys(ENGINES)
    if _PEER.value is not None and work.kind == "generate" and config.family == "qwen3":
        engines["tunix"] = [_PEER.value, str(_PEER_SCRIPT)]
    mesh = mesh_flag.MESH.value
    measured = measure(work, directory, config.vocab_size, engines, _REPEATS.value, mesh)
    return rows_of(work, config, measured)


def _measure_starts(work: Work, directory: Path, workdir: Path) -> Measured:
    """The first start of ours fills the cache of compiled programs, and does not count."""
    seconds = {name: {START: []} for name in ENGINES}
    for repeat in tqdm.trange(_REPEATS.value + 1, desc=work.name, disable=None):
        for name in ENGINES:
            cache = workdir / "compiled"
            load = measure_load(name, directory, first="token", compilation_cache=cache)
            if repeat:
                seconds[name][START].append(load.load_s + load.first_s)
    return Measured(seconds, [])


def _measure_loads(workdir: Path) -> list[Row]:
    directory, _ = _checkpoint(_MODEL.value, workdir)
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for _ in tqdm.trange(_REPEATS.value, desc="loading", disable=None):
        for name in ENGINES:
            load = measure_load(name, directory, mesh_flag.MESH.value)
            for what, unit, value in (
                ("load", "s", load.load_s),
                ("load + first forward, compiled anew", "s", load.load_s + load.first_s),
                ("peak memory of a load", "GB", load.peak_bytes / 1e9),
            ):
                values.setdefault((what, unit), {}).setdefault(name, []).append(value)
    return [
        Row(f"{_name()}: {what}", _MODEL.value, unit, own) for (what, unit), own in values.items()
    ]


def _name() -> str:
    """Of the model, as its rows begin."""
    return Path(_MODEL.value).name


def _report(workdir: Path, rows: list[Row], old: list[Row]) -> None:
    _write(workdir, [row.record() for row in rows])
    _show(workdir, rows, old)


def _show(workdir: Path, rows: list[Row], old: list[Row]) -> None:
    text = table(rows)
    (workdir / "table.md").write_text(text + "\n", encoding="utf-8")
    draw_speeds(rows, workdir / "speed.png")
    print(text)
    if old:
        print(f"\n{comparison(rows, old)}")


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
    time = "not run" if row.median is None else three_digits(1e3 * row.median)
    cell = f"{time} ({three_digits(row.temporaries / 1e6)})"
    return f"**{cell}**" if row.method is chosen else cell


if __name__ == "__main__":
    command_line.run(main)
