"""Programs compiled for TPUs that are not there, through libtpu."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from qwen_jax.errors import UserError
from qwen_jax.sharding.axes import MESH_AXES
from qwen_jax.sharding.chips import Topology

# Without these libtpu asks a cloud's metadata server where it is, writes what it does not find to
# stderr, and refuses to be loaded by two processes, which matters only where there is a TPU.
_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_HOST_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class DoesNotFitError(Exception):
    """A program that needs more memory than a chip has.

    Attributes:
      needed: bytes a chip.
      available: bytes that it has.
    """

    def __init__(self, needed: int, available: int):
        super().__init__(f"needs {needed} bytes a chip, which has {available}")
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says about a program, per device.

    Attributes:
      arguments, outputs, temporaries, code: bytes.
      aliased: bytes of arguments that outputs are written over.
      flops: operations as XLA counts them: of a loop one turn, of a kernel none.
      hlo: the optimised program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: float
    hlo: str

    @property
    def peak(self) -> int:
        """Bytes in use at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def check_devices(topology: Topology, sizes: dict[str, int]) -> None:
    """Checks that a mesh has a device for each chip.

    Raises:
      UserError: it has more or fewer.
    """
    if (count := math.prod(sizes.values())) != topology.num_chips:
        named = ",".join(f"{axis}:{size}" for axis, size in sizes.items() if size > 1)
        raise UserError(
            f"mesh {named or 'data:1'} has {count} devices, topology {topology.name} has "
            f"{topology.num_chips} chips; give a mesh with as many"
        )


def make_mesh(topology: Topology, sizes: dict[str, int]) -> Mesh:
    """A mesh over the chips of a topology, neighbours along its axes near to each other.

    Args:
      topology: which chips.
      sizes: of each of `MESH_AXES`; together as many as there are chips.

    Raises:
      UserError: another number of devices than the topology has, a topology that libtpu does not
        know, or no libtpu.
    """
    check_devices(topology, sizes)
    if not has_compiler():
        raise UserError("compiling for TPUs needs libtpu: pip install libtpu==0.0.42")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology.name,
            chips_per_host_bounds=topology.chips_per_host,
            **dict(topology.chip.compiler_options),
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"topology {topology.name}: libtpu refuses it ({reason})") from None
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    try:
        devices = topologies.make_mesh(description, shape, MESH_AXES).devices
    except (NotImplementedError, ValueError, AssertionError):
        # No assignment of the grid's axes to the mesh's: in the order of their numbers.
        devices = np.array(description.devices).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def compile_program(lowered: Any) -> Compiled:
    """Compiles what `jax.jit(...).lower(...)` gave for the devices of its arguments' shardings.

    Raises:
      DoesNotFitError: it needs more memory than a chip has.
    """
    try:
        with _without_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := read_exhausted(str(error))) is None:
            raise
        raise DoesNotFitError(*needed) from None
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=cost.get("flops", 0.0),
        hlo=compiled.as_text(),
    )


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """JAX writes no program to its cache: one for chips that are not there cannot be read again."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        yield
    finally:
        jax.config.update(option, before)


def read_exhausted(message: str) -> tuple[int, int] | None:
    """Bytes needed and available, from the compiler's message; None if it is about another thing.

    It is worded "... memory required ... (29.14G) exceeds available HBM (15.75G)" or "Used 30.1G of
    15.75G hbm", with binary units.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    amount = r"([\d.]+)([KMGT]?)i?B?"
    for pattern in (
        rf"\({amount}\) exceeds available \w+ \({amount}\)",
        rf"Used {amount} of {amount} hbm",
    ):
        if found := re.search(pattern, message):
            number, unit, limit, limit_unit = found.groups()
            return int(float(number) * _UNITS[unit]), int(float(limit) * _UNITS[limit_unit])
    return None
