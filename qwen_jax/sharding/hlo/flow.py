"""Which instructions of a program run, and how often."""

import dataclasses
import re
from collections.abc import Iterator

from qwen_jax.sharding.hlo.text import Computation, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Place:
    """An instruction that runs, and where.

    Attributes:
      computation: it stands in.
      instruction: itself.
      times: how often it runs; a loop whose number of turns is not known counts as one.
      is_counted: whether the turns of all loops around it are known.
      op_name: of the innermost instruction around it that has one.
    """

    computation: Computation
    instruction: Instruction
    times: int
    is_counted: bool
    op_name: str


def walk(module: Module) -> Iterator[Place]:
    """Every instruction that runs, in order; of a conditional, all branches."""
    yield from _walk(module, module.entry, 1, True, "")


def _walk(
    module: Module, computation: Computation, times: int, is_counted: bool, op_name: str
) -> Iterator[Place]:
    for instruction in computation.instructions:
        yield Place(computation, instruction, times, is_counted, op_name)
        name = instruction.op_name or op_name
        if instruction.opcode == "while":
            turns = trip_count(module, computation, instruction)
            inner = times * (1 if turns is None else turns)
            body = module.computations[instruction.called("body")]
            yield from _walk(module, body, inner, is_counted and turns is not None, name)
        for callee in callees(instruction):
            yield from _walk(module, module.computations[callee], times, is_counted, name)


def callees(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs once, those of a loop left out."""
    match instruction.opcode:
        case "fusion" | "async-start":
            return [instruction.called("calls")]
        case "call":
            return [instruction.called("to_apply")]
        case "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            if branches:
                return re.findall(r"%?([\w.\-]+)", branches[1])
            return [instruction.called(f"{side}_computation") for side in ("true", "false")]
    return []


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs: as XLA notes it, or from `i < n` with constant n and start.

    None where that depends on data.
    """
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted[1])
    condition = module.computations[loop.called("condition")]
    body = module.computations[loop.called("body")]
    root = condition.root
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    carried = computation.by_name[loop.operands[0]]
    index, bound = (condition.by_name[name] for name in root.operands)
    place = index.integer("index") if index.opcode == "get-tuple-element" else None
    if place is None or carried.opcode != "tuple":
        return None

    def start_of(i: int) -> int | None:
        return _constant(module, computation, computation.by_name[carried.operands[i]])

    if bound.opcode == "get-tuple-element":
        i = bound.integer("index")
        stop = start_of(i) if passes(body, i) else None
    else:
        stop = _constant(module, condition, bound)
    start = start_of(place)
    step = _step(module, body, place)
    if None in (start, stop, step):
        return None
    return max(-(-(stop - start) // step), 0)


def _constant(module: Module, computation: Computation, value: Instruction) -> int | None:
    while value.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
        value = computation.by_name[value.operands[0]]
    if value.opcode != "constant" or not re.fullmatch(r"-?\d+", value.literal):
        return None
    return int(value.literal)


def passes(body: Computation, i: int) -> bool:
    """Whether a loop hands on its i-th carry as it is."""
    result = body.by_name[body.root.operands[i]]
    return result.opcode == "get-tuple-element" and result.integer("index") == i


def _step(module: Module, body: Computation, i: int) -> int | None:
    """What each turn adds to the i-th carry; None where that is not a constant above 0."""
    if body.root.opcode != "tuple":
        return None
    value = body.by_name[body.root.operands[i]]
    while value.opcode in ("copy", "bitcast"):
        value = body.by_name[value.operands[0]]
    if value.opcode == "fusion":
        called = module.computations[value.called("calls")]
        inner = called.root
        if inner.opcode != "add":
            return None
        steps = [_constant(module, called, called.by_name[name]) for name in inner.operands]
    elif value.opcode == "add":
        steps = [_constant(module, body, body.by_name[name]) for name in value.operands]
    else:
        return None
    known = [step for step in steps if step is not None]
    return known[0] if len(known) == 1 and known[0] > 0 else None
