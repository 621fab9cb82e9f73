"""What devices send each other."""

import dataclasses
import math
import re
from collections.abc import Mapping

from qwen_jax.sharding.hlo.flow import Place, walk
from qwen_jax.sharding.hlo.text import Instruction, Module, shape_bytes

_COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, as one device sees it.

    Attributes:
      kind: such as "all-gather".
      bytes: of the whole array: what is gathered, or what there is before it is scattered.
      group: how many devices exchange.
      times: how often it runs; 1 where the loop around it has a number of turns that is not known.
      is_counted: whether that number is known.
      op_name: where in the source it comes from.
    """

    kind: str
    bytes: int
    group: int
    times: int
    is_counted: bool
    op_name: str

    @property
    def sent(self) -> int:
        """Bytes that the device sends to others in one run, with the best of algorithms.

        Of n devices each sends (n - 1) / n of the array, twice that to reduce and hand out again.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.group - 1) // self.group


def collectives(module: Module) -> list[Collective]:
    """The program's collectives in order; those over one device, which send nothing, left out."""
    found = []
    for place in walk(module):
        kind = _collective_kind(place)
        if kind is None:
            continue
        computation, instruction = place.computation, place.instruction
        operands = [computation.by_name[name].shape for name in instruction.operands]
        if kind in ("collective-permute", "ragged-all-to-all"):
            operands = operands[:1]
        group = _group_size(instruction, module.num_devices)
        size = sum(map(shape_bytes, operands)) * (group if kind == "all-gather" else 1)
        if group > 1:
            op_name = instruction.op_name or place.op_name
            found.append(Collective(kind, size, group, place.times, place.is_counted, op_name))
    return found


def _collective_kind(place: Place) -> str | None:
    """Of a collective that starts here; None for anything else."""
    instruction = place.instruction
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return None
    users = place.computation.users[instruction.name]
    # On TPUs a collective may run in pieces inside of other fusions; the first has a mark.
    starts = any('"AsyncCollectiveStart"' in user.attributes for user in users)
    if "async_collective_fusion_config" in instruction.attributes and not starts:
        return None
    # There, a reduce-scatter is a fusion of an all-reduce with a slice of what it returns.
    if kind == "all-reduce" and users and all(_slices(user, instruction) for user in users):
        return "reduce-scatter"
    return kind


def _slices(user: Instruction, instruction: Instruction) -> bool:
    return (
        user.opcode == "dynamic-slice"
        and user.operands[0] == instruction.name
        and shape_bytes(user.shape) < shape_bytes(instruction.shape)
    )


def _group_size(instruction: Instruction, num_devices: int) -> int:
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return _cycle(dict(tuple(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)\}", pairs[1])))
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(groups[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        # A part of an axis is written with what comes before it and its size: 'a':(2)4.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return num_devices


def _cycle(pairs: Mapping[int, int]) -> int:
    """Devices along the longest way through `pairs` from the first one."""
    if not pairs:
        return 1
    start = next(iter(pairs))
    seen, device = {start}, pairs[start]
    while device not in seen:
        seen.add(device)
        device = pairs.get(device, start)
    return len(seen)
