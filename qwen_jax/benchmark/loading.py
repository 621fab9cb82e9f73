"""Load time and memory, each measured in a process of its own.

Run as a module, `python -m qwen_jax.benchmark.loading ENGINE DIRECTORY [MESH]` prints one.
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

import jax
import numpy as np

from qwen_jax.benchmark.engines import ENGINES
from qwen_jax.errors import UserError
from qwen_jax.reference import import_reference

_POLL_S = 0.002


@dataclasses.dataclass(frozen=True)
class LoadMeasurement:
    """Attributes:
    load_s: seconds from a started runtime to float32 parameters in memory.
    forward_s: seconds of the first forward pass over 64 tokens after it, compiling included.
    peak_bytes: highest anonymous resident memory while loading, above the start.
    """

    load_s: float
    forward_s: float
    peak_bytes: int


def measure_load(engine: str, directory: Path, mesh: str | None = None) -> LoadMeasurement:
    """Measures one load in a new process, on `mesh` if it is ours; imports do not count.

    Raises:
      UserError: the process failed.
    """
    arguments = [engine, str(directory), *([] if mesh is None else [mesh])]
    # A compilation kept from an earlier run would hide the cost of a first one.
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    child = subprocess.run(
        [sys.executable, "-m", "qwen_jax.benchmark.loading", *arguments],
        capture_output=True,
        text=True,
        env=env,
    )
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"measuring {engine} failed: {last[0]}")
    return LoadMeasurement(**json.loads(child.stdout.splitlines()[-1]))


def _measure(engine: str, directory: Path, mesh: str | None = None) -> LoadMeasurement:
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
    loaded.forward(np.arange(64)[None])
    return LoadMeasurement(load_s, time.perf_counter() - begin, peak - start)


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
        print(
            json.dumps(dataclasses.asdict(_measure(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])))
        )
    except UserError as error:
        sys.exit(str(error))
