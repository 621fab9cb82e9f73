"""The text of a compiled program, taken apart into computations and instructions."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO.

    Attributes:
      name: unique in its computation.
      shape: as printed, with layout and memory space, of a tuple in parentheses.
      opcode: such as "fusion".
      operands: names.
      literal: what stands between the operation's parentheses.
      attributes: the rest of the line.
      is_root: whether it is what its computation returns.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    def integer(self, attribute: str) -> int:
        """The value of a whole-numbered attribute."""
        return int(re.search(rf"\b{attribute}=(\d+)", self.attributes)[1])

    @property
    def op_name(self) -> str:
        """Where in the source it comes from, as JAX names it; empty where XLA made it."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of HLO: its instructions in order, and by name."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """The instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """For each name, the instructions with it as an operand."""
        users = collections.defaultdict(list)
        for instruction in self.instructions:
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in reversed(self.instructions) if i.is_root)

    def parameter(self, index: int) -> Instruction:
        """Its parameter at an index."""
        return next(
            i for i in self.instructions if i.opcode == "parameter" and int(i.literal) == index
        )


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, the one that runs first, and the number of devices."""

    computations: Mapping[str, Computation]
    entry: Computation
    num_devices: int


def read_module(text: str) -> Module:
    """Parses what `compiled.as_text()` gives.

    Raises:
      ValueError: it has no entry computation.
    """
    computations, entry, name, lines = {}, None, None, []
    # What a Pallas kernel notes of itself has lines of its own, within that of its call.
    for line in re.sub(r"kernel_metadata=\{\n.*\n\}", "kernel_metadata={}", text).splitlines():
        if name is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line)
            if head and not line.startswith("HloModule"):
                name, lines = head[2], []
                entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(map(_read_instruction, lines)))
            name = None
        elif " = " in line:
            lines.append(line)
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give the text of a compiled program")
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text[: text.index("\n")])
    return Module(computations, computations[entry], math.prod(map(int, counts)))


def _read_instruction(line: str) -> Instruction:
    head, _, rest = line.partition(" = ")
    shape, rest = _split_shape(rest)
    opcode, _, rest = rest.partition("(")
    inside, attributes = _split_at_parenthesis(rest)
    return Instruction(
        name=head.split()[-1].removeprefix("%"),
        shape=shape,
        opcode=opcode.strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside,
        attributes=attributes,
        is_root=head.lstrip().startswith("ROOT"),
    )


def _split_shape(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    inside, rest = _split_at_parenthesis(text[1:])
    return f"({inside})", rest.lstrip()


def _split_at_parenthesis(text: str) -> tuple[str, str]:
    """What is before the parenthesis that closes, and what is after it."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.start()], text[match.end() :]
    raise ValueError(f"HLO with an open parenthesis: {text[:80]}")


def shape_bytes(shape: str) -> int:
    """Bytes of a shape as printed, those of a tuple together, without padding."""
    total = 0
    for dtype, axes in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
        total += math.ceil(math.prod(int(n) for n in axes.split(",") if n) * bits / 8)
    return total


def sizes(shape: str) -> list[int]:
    """The sizes of an array's axes."""
    return [int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n]


def in_hbm(shape: str) -> bool:
    """Whether an array lies in memory and not close to the core, where `S(1)` and the like say."""
    return "S(" not in shape


def tuple_elements(shape: str) -> list[str]:
    """The shapes in that of a tuple, nested tuples whole."""
    parts, depth, start = [], 0, 0
    inside = shape[1:-1]
    for i, character in enumerate(inside):
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and depth == 0:
            parts.append(inside[start:i])
            start = i + 1
    return [*parts, inside[start:]]
