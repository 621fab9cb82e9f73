import os
import subprocess
import sys

from tests.tools.conftest import ROOT


def run(
    *arguments: str, devices: int = 1, module: str = "experiments.long_context"
) -> subprocess.CompletedProcess:
    """`python -m MODULE` as a process; programs are shared with the tests."""
    more = {"JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **more, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")},
        capture_output=True,
        text=True,
    )
