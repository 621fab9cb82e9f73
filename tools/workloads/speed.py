"""Speed beside other engines: of a model, of a train step, of everything in the table."""

import functools
from collections.abc import Callable
from pathlib import Path

from absl import flags

from qwen_jax.benchmark.engines import ENGINES
from qwen_jax.benchmark.measure import fit_together, measure
from qwen_jax.benchmark.pictures import draw_speeds
from qwen_jax.benchmark.report import Row, comparison, read_rows, rows_of, table
from qwen_jax.benchmark.starting import measure_engine_starts, measure_loads
from qwen_jax.benchmark.works import TABLE, Work
from qwen_jax.errors import UserError
from tools import command_line, jsonl_rows, mesh_flag
from tools.workloads.run import Run
from tools.workloads.source import Source, find_source

LENGTH = flags.DEFINE_integer(
    "length", 512, "With --workload=train: tokens of a row.", lower_bound=2
)
ONLY = flags.DEFINE_list("only", [], "With --workload=table: names of rows.")
PEER = flags.DEFINE_string("peer_python", None, "Interpreter of an environment with google-tunix.")
COMPARE = flags.DEFINE_string("compare", None, "results.jsonl of an earlier run.")
_PEER_SCRIPT = Path(__file__).parents[2] / "qwen_jax" / "benchmark" / "peers" / "tunix_peer.py"


def prepare_model(run: Run) -> Callable[[], None]:
    """Loading, prefill and decoding of one model."""
    _check_peer()
    old, source = _earlier(), find_source(run.model, run.workdir)
    source.check_predicts_tokens()
    sizes = {"rows": run.rows or 1, "length": run.prompt_tokens, "steps": run.decode_tokens}
    work = Work(Path(run.model).name, run.model, **sizes)
    return functools.partial(_measure_model, run, work, source, old)


def prepare_train(run: Run) -> Callable[[], None]:
    """Train steps of one model."""
    old, source = _earlier(), find_source(run.model, run.workdir)
    source.check_predicts_tokens()
    sizes = {"rows": run.rows or 4, "length": LENGTH.value}
    work = Work(Path(run.model).name, run.model, "train", **sizes)
    return lambda: _report(run, _measure(run, work, source), old)


def prepare_table(run: Run) -> Callable[[], None]:
    """All works of the table, or some, without those that an earlier run has measured."""
    names = [work.name for work in TABLE]
    for name in ONLY.value:
        if name not in names:
            raise UserError(f"--only={name}: there is no such row; known: {', '.join(names)}")
    _check_peer()
    chosen = [work for work in TABLE if not ONLY.value or work.name in ONLY.value]
    return functools.partial(_measure_table, run, chosen, _earlier())


def _check_peer() -> None:
    if PEER.value is not None and not Path(PEER.value).is_file():
        raise UserError(f"--peer_python={PEER.value}: no such file; give a Python interpreter")


def _earlier() -> list[Row]:
    """What to compare with; nothing if not asked to."""
    if COMPARE.value is None:
        return []
    path = command_line.path(COMPARE)
    rows = read_rows([fields for _, fields in jsonl_rows.read_rows(path)])
    if not rows:
        raise UserError(f"{path}: has no speeds; give the results.jsonl of an earlier run")
    return rows


def _measure_model(run: Run, work: Work, source: Source, old: list[Row]) -> None:
    directory, _ = source.checkpoint()
    loads = measure_loads(work.name, work.model, directory, mesh_flag.MESH.value, run.repeats)
    _report(run, loads + _measure(run, work, source), old)


def _measure_table(run: Run, chosen: list[Work], old: list[Row]) -> None:
    rows = read_rows(run.records())
    for work in chosen:
        done = {row.what for row in rows}
        if not {work.describe(figure) for figure in work.figures} <= done:
            found = _measure(run, work, find_source(work.model, run.workdir))
            run.write(row.record() for row in found)
            rows += found
    order = [work.describe(figure) for work in TABLE for figure in work.figures]
    rows = sorted((row for row in rows if row.what in order), key=lambda r: order.index(r.what))
    _show(run, rows, old)


def _measure(run: Run, work: Work, source: Source) -> list[Row]:
    directory, config = source.checkpoint()
    if work.kind == "start":
        compiled = run.workdir / "compiled"
        started = measure_engine_starts(work.name, directory, compiled, run.repeats)
        return rows_of(work, config, started)
    engines: dict[str, list[str] | None] = dict.fromkeys(ENGINES)
    if PEER.value is not None and work.kind == "generate" and config.family == "qwen3":
        engines["tunix"] = [PEER.value, str(_PEER_SCRIPT)]
    mesh = mesh_flag.MESH.value
    together = fit_together(config, len(engines))
    measured = measure(work, directory, config.vocab_size, engines, run.repeats, mesh, together)
    return rows_of(work, config, measured)


def _report(run: Run, rows: list[Row], old: list[Row]) -> None:
    run.write(row.record() for row in rows)
    _show(run, rows, old)


def _show(run: Run, rows: list[Row], old: list[Row]) -> None:
    run.report(table(rows), "table")
    draw_speeds(rows, run.workdir / "speed.png")
    if old:
        print(f"\n{comparison(rows, old)}")
