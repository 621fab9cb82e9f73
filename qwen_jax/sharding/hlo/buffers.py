"""What becomes of a program's arguments: how much of them is read, and copied."""

import dataclasses
import re

from qwen_jax.sharding.hlo.flow import callees, passes, trip_count
from qwen_jax.sharding.hlo.text import (
    Computation,
    Instruction,
    Module,
    in_hbm,
    shape_bytes,
    tuple_elements,
)

# What passes on its operand's buffer.
_SAME_BUFFER = ("bitcast", "optimization-barrier", "copy-done", "slice-done", "async-done")
# What reads as much of its first operand as it returns.
_READS_A_PART = ("dynamic-slice", "slice", "gather")
# What returns its first operand's buffer with other numbers in places.
_WRITES_A_PART = ("dynamic-update-slice", "scatter")
# What a fusion that only moves a weight elsewhere is made of.
_MOVES = (
    *("parameter", "constant", "bitcast", "copy", "convert", "transpose", "reshape"),
    *("dynamic-slice", "slice"),
)


@dataclasses.dataclass(frozen=True)
class Reads:
    """What a program reads of one of its arguments, and of what it writes in its place.

    Attributes:
      bytes: of the argument.
      read: bytes that leave memory for the core, in all.
      copied: bytes of copies of it in memory, in another layout or precision or to be written on.
    """

    bytes: int
    read: int
    copied: int

    @property
    def times(self) -> float:
        """How often it is read."""
        return self.read / self.bytes if self.bytes else 0.0


def argument_reads(module: Module) -> dict[str, Reads]:
    """For each argument, by the name JAX gave it, how much of it is read from memory.

    What XLA first moves close to the core is read once, however often it is used there.
    """
    reads = {}
    for parameter in module.entry.instructions:
        if parameter.opcode == "parameter":
            tally = _Tally(module)
            read = tally.reads(module.entry, parameter.name, None)
            size = shape_bytes(parameter.shape)
            reads[parameter.op_name or parameter.name] = Reads(size, read, tally.copied)
    return reads


class _Tally:
    """Follows one buffer through a program; `copied` sums up its copies in memory."""

    def __init__(self, module: Module):
        self._module = module
        self.copied = 0

    def reads(self, computation: Computation, name: str, index: int | None) -> int:
        """Bytes read of the buffer called `name`, or that is its element `index`."""
        total = 0
        for user in computation.users[name]:
            if index is not None and user.opcode == "get-tuple-element":
                if user.integer("index") == index:
                    total += self.reads(computation, user.name, None)
            elif user.opcode in _SAME_BUFFER:
                total += self.reads(computation, user.name, index)
            elif user.opcode == "tuple":
                for i, operand in enumerate(user.operands):
                    if operand == name and not user.is_root:
                        total += self.reads(computation, user.name, i)
            elif user.opcode == "while":
                total += self._loop(computation, user, index)
            elif user.opcode in ("call", "conditional"):
                total += self._call(computation, user, name, index)
            elif index is None and user.opcode != "get-tuple-element":
                total += self._use(computation, user, name)
                for place in self._updated(user, name):
                    total += self.reads(computation, user.name, place)
        return total

    def _loop(self, computation: Computation, loop: Instruction, index: int) -> int:
        body = self._module.computations[loop.called("body")]
        turns = trip_count(self._module, computation, loop) or 1
        before = self.copied
        total = turns * self.reads(body, body.parameter(0).name, index)
        self.copied = before + turns * (self.copied - before)
        return total + (self.reads(computation, loop.name, index) if passes(body, index) else 0)

    def _call(self, computation, user: Instruction, name: str, index: int | None) -> int:
        counts = [0]
        for place, callee in enumerate(callees(user)):
            called = self._module.computations[callee]
            # A branch takes the operand at its own place, after the index.
            at = [i for i, operand in enumerate(user.operands) if operand == name]
            if user.opcode == "conditional":
                at = [0] if place + 1 in at else []
            counts.append(sum(self.reads(called, called.parameter(i).name, index) for i in at))
        return max(counts)

    def _use(self, computation: Computation, user: Instruction, name: str) -> int:
        """Bytes that one instruction reads of a whole array."""
        operand = computation.by_name[name]
        whole = shape_bytes(operand.shape)
        if not in_hbm(operand.shape):
            return 0
        if user.opcode in ("fusion", "async-start"):
            called = self._module.computations[user.called("calls")]
            places = [i for i, each in enumerate(user.operands) if each == name]
            read = sum(self._inside(called, called.parameter(i).name, whole) for i in places)
            if {i.opcode for i in called.instructions} <= set(_MOVES) and in_hbm(user.shape):
                self.copied += shape_bytes(user.shape)
            return min(read, whole)
        if user.opcode in _READS_A_PART and user.operands[0] == name:
            return min(shape_bytes(user.shape), whole)
        if user.opcode == "slice-start":
            part = tuple_elements(user.shape)[1]
            return min(shape_bytes(part), whole)
        if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            return 0
        if user.opcode == "copy-start" and self._is_for_next_run(computation, user):
            return 0
        if user.opcode == "copy" and in_hbm(user.shape):
            self.copied += whole
        if user.opcode == "copy-start" and in_hbm(tuple_elements(user.shape)[0]):
            self.copied += whole
        return whole

    def _updated(self, user: Instruction, name: str) -> list[int | None]:
        """Which results of an instruction are the buffer, of which it has written a part."""
        if user.opcode in _WRITES_A_PART:
            return [None] if user.operands[0] == name else []
        places = [i for i, operand in enumerate(user.operands) if operand == name]
        if user.opcode == "custom-call":
            _, _, noted = user.attributes.partition("output_to_operand_aliasing={")
            aliases = re.findall(r"\{(\d*)\}: \((\d+), \{", noted.partition(")}")[0])
            return [int(out) if out else None for out, i in aliases if int(i) in places]
        if user.opcode != "fusion":
            return []
        called = self._module.computations[user.called("calls")]
        root, inside = called.root, {called.parameter(i).name for i in places}
        if root.opcode == "tuple":
            return [i for i, out in enumerate(root.operands) if _base(called, out) in inside]
        return [None] if _base(called, root.name) in inside else []

    @staticmethod
    def _is_for_next_run(computation: Computation, start: Instruction) -> bool:
        """Whether nobody reads a copy: it then stands in for the first one of the next run."""
        return not any(computation.users[done.name] for done in computation.users[start.name])

    def _inside(self, fused: Computation, name: str, whole: int) -> int:
        """Bytes read of the parameter of a fusion."""
        total = 0
        for user in fused.users[name]:
            if user.opcode == "bitcast":
                total += self._inside(fused, user.name, whole)
            elif user.opcode == "fusion":
                called = self._module.computations[user.called("calls")]
                places = [i for i, each in enumerate(user.operands) if each == name]
                if {i.opcode for i in called.instructions} <= {"parameter", "bitcast"}:
                    total += self._inside(fused, user.name, whole)
                total += sum(self._inside(called, called.parameter(i).name, whole) for i in places)
            elif user.opcode in _READS_A_PART and user.operands[0] == name:
                total += shape_bytes(user.shape)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.opcode not in ("tuple", "get-tuple-element"):
                total += whole
        return min(total, whole)


def _base(fused: Computation, name: str) -> str | None:
    """Whose buffer a result of a fusion is, where it writes a part of one."""
    value, writes = fused.by_name[name], False
    while value.opcode in _WRITES_A_PART or value.opcode == "bitcast":
        writes |= value.opcode in _WRITES_A_PART
        value = fused.by_name[value.operands[0]]
    return value.name if writes else None
