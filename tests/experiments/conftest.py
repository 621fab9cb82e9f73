import os
import subprocess
import sys

from tests.tools.conftest import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess:
    """`python -m experiments.long_context` as a process; programs are shared with the tests."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.long_context", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")},
        capture_output=True,
        text=True,
    )
