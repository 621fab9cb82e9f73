"""Several processes that run one command together, each with its own devices.

On a TPU pod and under Slurm they find each other; elsewhere each is told by flags.
"""

import os
import sys
from pathlib import Path

from absl import flags

from qwen_jax.errors import UserError
from tools.command_line import slurm_tasks

_PROCESSES = flags.DEFINE_integer(
    "processes",
    None,
    "How many processes run this together, each on its own devices, with one --mesh over all. "
    "Found by itself on TPU pods and under Slurm; 1 to run alone there.",
    lower_bound=1,
)
_PROCESS = flags.DEFINE_integer(
    "process", None, "With --processes and --coordinator: this one's number, from 0.", 0
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "With --processes: host:port of process 0, free there."
)

# A process that has died is missed after so long, and the others end with an error that names it.
_HEARTBEAT_S = 60
# Until all have started.
_START_S = 300


def join(mesh: str | None, flag: str = "--mesh") -> None:
    """Joins the processes that run this command, if there are several; then only one prints.

    Args:
      mesh: what the user asks the work to be spread over.
      flag: by which users ask so.

    Raises:
      UserError: flags that are incomplete, processes that cannot be reached, or no mesh for them.
    """
    settings = _settings()
    if settings is None:
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=_START_S,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
        )
    except ValueError as error:
        if settings or "coordinator_address should be defined" not in str(error):
            raise
        # A TPU by itself, as in a notebook.
        return
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"the other processes cannot be joined ({error}); start all of them, or give "
            "--processes=1 to run alone"
        ) from None
    count = jax.process_count()
    if count == 1:
        return
    if mesh is None:
        raise UserError(
            f"{count} processes run this, with {jax.device_count()} devices; give a mesh over "
            f"all of them, such as {flag}=fsdp:{jax.device_count()}"
        )
    if jax.process_index() > 0:
        # For as long as the process lives.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def _settings() -> dict[str, object] | None:
    """What `jax.distributed.initialize` is told; nothing where it finds out, None to run alone."""
    told = {
        "coordinator_address": _COORDINATOR.value,
        "num_processes": _PROCESSES.value,
        "process_id": _PROCESS.value,
    }
    if _PROCESSES.value == 1:
        return None
    if any(value is not None for value in told.values()):
        if None in told.values():
            raise UserError("give --processes, --process and --coordinator together")
        if _PROCESS.value >= _PROCESSES.value:
            raise UserError(
                f"--process={_PROCESS.value} should be below --processes={_PROCESSES.value}"
            )
        return told
    return {} if slurm_tasks() > 1 or _has_tpu() else None


def _has_tpu() -> bool:
    """Whether this machine has a TPU that JAX is free to use."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    return "tpu" in wanted and any(Path(p).exists() for p in ("/dev/accel0", "/dev/vfio/0"))
