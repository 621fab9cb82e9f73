import subprocess

from tests import commands


def run(
    *arguments: str, devices: int = 1, module: str = "experiments.long_context"
) -> subprocess.CompletedProcess:
    """`python -m MODULE` as a process."""
    changes = {"JAX_NUM_CPU_DEVICES": str(devices)} if devices > 1 else {}
    return commands.run(module, *arguments, timeout=500, **changes)
