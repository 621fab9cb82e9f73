"""Load time and memory, start-up and imports, each measured in a process of its own.

Run as a module, `python -m qwen_jax.benchmark.loading ENGINE DIRECTORY FIRST ASKED_AT [MESH]`
prints one of a load.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from qwen_jax.benchmark.compiling import watch_compiling
from qwen_jax.benchmark.engines import ENGINES
from qwen_jax.benchmark.failures import failure
from qwen_jax.errors import UserError
from qwen_jax.reference import import_reference

_POLL_S = 0.002

First = Literal["forward", "token", "two tokens"]


@dataclasses.dataclass(frozen=True)
class LoadMeasurement:
    """Attributes:
    load_s: seconds from a started runtime to float32 parameters in memory.
    first_s: seconds of what is done first over 64 tokens after it, compiling included.
    tracing_s: of them, from Python to what a compiler takes.
    getting_s: of them, from that to a program, compiled or as it was kept on disk.
    peak_bytes: highest anonymous resident memory while loading, above the start.
    whole_s: seconds from when the process was asked for to the end of what is done first: the
      interpreter, imports and devices too.
    """

    load_s: float
    first_s: float
    tracing_s: float
    getting_s: float
    peak_bytes: int
    whole_s: float


def measure_load(
    engine: str,
    directory: Path,
    mesh: str | None = None,
    first: First = "forward",
    compilation_cache: Path | None = None,
) -> LoadMeasurement:
    """Measures one load in a new process, on `mesh` if it is ours; imports count for the whole.

    Args:
      engine: its name.
      directory: of the checkpoint.
      mesh: of the devices.
      first: what is timed behind the load: all logits, the choice of the next token, or of two,
        by when all programs of decoding are compiled.
      compilation_cache: a directory of compiled programs, which are read and added to; None for
        none, since what an earlier run has kept would hide the cost of a first one.

    Raises:
      UserError: the process failed.
    """
    arguments = [engine, str(directory), first]
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if compilation_cache is not None:
        env |= {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    asked_at = time.time()
    arguments += [str(asked_at), *([] if mesh is None else [mesh])]
    child = subprocess.run(
        [sys.executable, "-m", "qwen_jax.benchmark.loading", *arguments],
        capture_output=True,
        text=True,
        env=env,
    )
    _check_succeeded(child, engine)
    return LoadMeasurement(**json.loads(child.stdout.splitlines()[-1]))


def measure_import(statement: str) -> float:
    """Seconds of an import in a new process, in which nothing else is imported before.

    Raises:
      UserError: it failed.
    """
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    _check_succeeded(child, statement)
    return float(child.stdout)


def _check_succeeded(child: subprocess.CompletedProcess[str], what: str) -> None:
    if child.returncode:
        raise failure(what, child.stderr)


def _measure(
    engine: str, directory: Path, first: First, asked_at: float, mesh: str | None = None
) -> LoadMeasurement:
    _start_runtime(engine, directory)
    peak = start = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_POLL_S):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    try:
        loaded = ENGINES[engine](directory, mesh)
        load_s = time.perf_counter() - begin
    finally:  # Or the watcher would keep a failed process alive.
        done.set()
        watcher.join()
    begin = time.perf_counter()
    run = loaded.forward if first == "forward" else loaded.prefill
    with watch_compiling() as compiling:
        run(np.arange(64)[None])
        if first == "two tokens":
            loaded.decode(1)
    return LoadMeasurement(
        load_s=load_s,
        first_s=time.perf_counter() - begin,
        tracing_s=compiling.tracing_s,
        getting_s=compiling.getting_s,
        peak_bytes=peak - start,
        whole_s=time.time() - asked_at,
    )


def _start_runtime(engine: str, directory: Path) -> None:
    """Everything that a program does once, whatever it loads: imports, devices, threads."""
    if engine != "transformers":
        jax.numpy.zeros(1).block_until_ready()
        return
    torch, transformers = import_reference()
    torch.zeros(1)
    # The modules of a model and of its loading are imported on first use.
    with contextlib.suppress(Exception):  # The load itself says better what is wrong.
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        _ = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def anonymous_memory() -> int:
    """Resident memory of this process in bytes, file pages left out (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise UserError("/proc/self/status has no RssAnon; memory is measured on Linux only")


if __name__ == "__main__":
    try:
        engine, directory, first, asked_at, *mesh = sys.argv[1:]
        found = _measure(engine, Path(directory), first, float(asked_at), *mesh)
        print(json.dumps(dataclasses.asdict(found)))
    except UserError as error:
        sys.exit(str(error))
