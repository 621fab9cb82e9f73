import os
import subprocess
import sys

from tests.tools.conftest import ROOT


def run(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess:
    """`python -m experiments.long_context` as a process; programs are shared with the tests."""
    more = {"JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.run(
        [sys.executable, "-m", "experiments.long_context", *arguments],
        cwd=ROOT,
        env={**os.environ, **more, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")},
        capture_output=True,
        text=True,
    )
