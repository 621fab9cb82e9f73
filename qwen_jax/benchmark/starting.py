"""What it takes until a process has a model, or its first tokens: imports, loading, compiling."""

import tempfile
from pathlib import Path

import tqdm

from qwen_jax.benchmark.engines import ENGINES
from qwen_jax.benchmark.loading import LoadMeasurement, measure_import, measure_load
from qwen_jax.benchmark.measure import Measured
from qwen_jax.benchmark.report import Demand, Row
from qwen_jax.benchmark.works import START

_MOST_OF_IMPORT, _MOST_COLD_S, _MOST_WARM_S = 1.2, 30.0, 6.0
# The package by itself, and with all that loading and generating needs.
_BARE, _USED = "import qwen_jax", "from qwen_jax import generate, load_pretrained"


def measure_start(directory: Path, repeats: int) -> list[Demand]:
    """Imports as ratios to `import jax`, and starts up to the second token, turn by turn.

    A start is a new process from its command to its second token after a prompt of 64: interpreter,
    imports, devices, loading, and all programs, compiled anew or, warm, as an earlier start has
    left them. The first turn, in which files come from disk and that start is made, does not count.

    Args:
      directory: of the checkpoint.
      repeats: of each.

    Raises:
      UserError: a process failed.
    """
    statements = ("import jax", _BARE, _USED)
    imports: dict[str, list[float]] = {statement: [] for statement in statements}
    cold: list[LoadMeasurement] = []
    warm: list[LoadMeasurement] = []
    with tempfile.TemporaryDirectory() as compiled:
        for repeat in tqdm.trange(repeats + 1, desc="starting", disable=None):
            seconds = {statement: measure_import(statement) for statement in statements}
            anew, again = (
                measure_load("qwen_jax", directory, first="two tokens", compilation_cache=cache)
                for cache in (None, Path(compiled))
            )
            if repeat:
                for statement, values in imports.items():
                    values.append(seconds[statement])
                cold.append(anew)
                warm.append(again)

    def to_jax(statement: str) -> tuple[float, ...]:
        pairs = zip(imports[statement], imports["import jax"], strict=True)
        return tuple(ours / theirs for ours, theirs in pairs)

    found = [
        Demand(f"{_BARE} to import jax", "times", to_jax(_BARE), _MOST_OF_IMPORT),
        Demand(f"{_USED} to import jax", "times", to_jax(_USED)),
    ]
    for name, starts, gets, aim in (
        ("cold start to the second token", cold, "compiling", _MOST_COLD_S),
        ("warm start to the second token", warm, "reading programs", _MOST_WARM_S),
    ):
        found.append(Demand(name, "s", tuple(start.whole_s for start in starts), aim))
        found += [
            Demand(f"{name}, of it loading", "s", tuple(start.load_s for start in starts)),
            Demand(f"{name}, of it the tokens", "s", tuple(start.first_s for start in starts)),
            Demand(f"{name}, of them tracing", "s", tuple(start.tracing_s for start in starts)),
            Demand(f"{name}, of them {gets}", "s", tuple(start.getting_s for start in starts)),
        ]
    return found


def measure_engine_starts(name: str, directory: Path, compiled: Path, repeats: int) -> Measured:
    """Seconds of each engine from a started runtime to its first token, turn by turn.

    The first turn, in which ours fills its directory of compiled programs, does not count.

    Args:
      name: of the work.
      directory: of the checkpoint.
      compiled: of the programs.
      repeats: of each.

    Raises:
      UserError: a process failed.
    """
    seconds = {engine: {START: []} for engine in ENGINES}
    for repeat in tqdm.trange(repeats + 1, desc=name, disable=None):
        for engine in ENGINES:
            load = measure_load(engine, directory, first="token", compilation_cache=compiled)
            if repeat:
                seconds[engine][START].append(load.load_s + load.first_s)
    return Measured(seconds, [])


def measure_loads(
    name: str, model: str, directory: Path, mesh: str | None, repeats: int
) -> list[Row]:
    """Seconds and memory of each engine's loads, turn by turn.

    Args:
      name: as the rows begin.
      model: that they are of.
      directory: of its checkpoint.
      mesh: of the devices for this package.
      repeats: of each.

    Raises:
      UserError: a process failed.
    """
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for _ in tqdm.trange(repeats, desc="loading", disable=None):
        for engine in ENGINES:
            load = measure_load(engine, directory, mesh)
            for what, unit, value in (
                ("load", "s", load.load_s),
                ("load + first forward, compiled anew", "s", load.load_s + load.first_s),
                ("peak memory of a load", "GB", load.peak_bytes / 1e9),
            ):
                values.setdefault((what, unit), {}).setdefault(engine, []).append(value)
    return [Row(f"{name}: {what}", model, unit, own) for (what, unit), own in values.items()]
