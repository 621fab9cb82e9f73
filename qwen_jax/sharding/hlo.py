"""What a compiled program does, read from its optimised HLO text.

Everything is per device, and what a loop repeats counts as often as the loop runs. Written for what
XLA prints for TPUs, where collectives hide in fusions, in pieces beside other work; CPUs' plainer
programs read the same way.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What passes on its operand's buffer.
_SAME_BUFFER = ("bitcast", "optimization-barrier", "copy-done", "slice-done", "async-done")
# What reads as much of its first operand as it returns.
_READS_A_PART = ("dynamic-slice", "slice", "gather")
# What a fusion that only moves a weight elsewhere is made of.
_MOVES = (
    *("parameter", "constant", "bitcast", "copy", "convert", "transpose", "reshape"),
    *("dynamic-slice", "slice"),
)


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
    for dtype, sizes in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
        total += math.ceil(math.prod(int(n) for n in sizes.split(",") if n) * bits / 8)
    return total


def _sizes(shape: str) -> list[int]:
    """Of an array's axes."""
    return [int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n]


def _elements(shape: str) -> int:
    return math.prod(_sizes(shape)) if "[" in shape else 0


def _in_hbm(shape: str) -> bool:
    """Whether an array lies in memory and not close to the core, where `S(1)` and the like say."""
    return "S(" not in shape


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
    for place in _walk(module, module.entry, 1, True, ""):
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


@dataclasses.dataclass(frozen=True)
class _Place:
    computation: Computation
    instruction: Instruction
    times: int
    is_counted: bool
    op_name: str


def _walk(
    module: Module, computation: Computation, times: int, is_counted: bool, op_name: str
) -> Iterator[_Place]:
    """Every instruction that runs, and how often; of a conditional, all branches."""
    for instruction in computation.instructions:
        yield _Place(computation, instruction, times, is_counted, op_name)
        name = instruction.op_name or op_name
        if instruction.opcode == "while":
            turns = trip_count(module, computation, instruction)
            inner = times * (1 if turns is None else turns)
            body = module.computations[instruction.called("body")]
            yield from _walk(module, body, inner, is_counted and turns is not None, name)
        for callee in _callees(instruction):
            yield from _walk(module, module.computations[callee], times, is_counted, name)


def _callees(instruction: Instruction) -> list[str]:
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


def _collective_kind(place: _Place) -> str | None:
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
        stop = start_of(i) if _passes(body, i) else None
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


def _passes(body: Computation, i: int) -> bool:
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


def repeated_flops(module: Module) -> int:
    """Operations of products in loops after the first turn, which XLA's own analysis leaves out.

    Such loops are of the program, or XLA's: it computes a product in pieces while others travel.
    Every product is a convolution in a program for TPUs.
    """
    return sum(
        (place.times - 1) * _convolution_flops(place)
        for place in _walk(module, module.entry, 1, True, "")
        if place.instruction.opcode == "convolution" and place.times > 1
    )


def _convolution_flops(place: _Place) -> int:
    """Multiplications and additions, those with padding left out."""
    instruction, by_name = place.instruction, place.computation.by_name
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    shapes = (*(by_name[name].shape for name in instruction.operands), instruction.shape)
    x, kernel, out = (
        dict(zip(names, _sizes(shape), strict=True))
        for names, shape in zip(labels, shapes, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    flops = 2 * out["b"] * out["f"] * kernel["i"]
    for i in range(len(kernel) - 2):

        def field(name: str, default: str, i: int = i) -> str:
            return fields[name].split("x")[i] if name in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        stride, *dilations = (
            int(field(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate")
        )
        met = (
            stride * o + dilations[0] * k - low
            for o in range(out[str(i)])
            for k in range(kernel[str(i)])
        )
        stop = dilations[1] * (x[str(i)] - 1) + 1
        flops *= sum(0 <= at < stop and at % dilations[1] == 0 for at in met)
    return flops


@dataclasses.dataclass(frozen=True)
class Reads:
    """What a program reads of one of its arguments.

    Attributes:
      bytes: of the argument.
      read: bytes that leave memory for the core, in all.
      copied: bytes of copies of it in memory, in another layout or precision.
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
        return total

    def _loop(self, computation: Computation, loop: Instruction, index: int) -> int:
        body = self._module.computations[loop.called("body")]
        turns = trip_count(self._module, computation, loop) or 1
        before = self.copied
        total = turns * self.reads(body, body.parameter(0).name, index)
        self.copied = before + turns * (self.copied - before)
        return total + (self.reads(computation, loop.name, index) if _passes(body, index) else 0)

    def _call(self, computation, user: Instruction, name: str, index: int | None) -> int:
        counts = [0]
        for place, callee in enumerate(_callees(user)):
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
        if not _in_hbm(operand.shape):
            return 0
        if user.opcode in ("fusion", "async-start"):
            called = self._module.computations[user.called("calls")]
            places = [i for i, each in enumerate(user.operands) if each == name]
            read = sum(self._inside(called, called.parameter(i).name, whole) for i in places)
            if {i.opcode for i in called.instructions} <= set(_MOVES) and _in_hbm(user.shape):
                self.copied += shape_bytes(user.shape)
            return min(read, whole)
        if user.opcode in _READS_A_PART and user.operands[0] == name:
            return min(shape_bytes(user.shape), whole)
        if user.opcode == "slice-start":
            part = _tuple_elements(user.shape)[1]
            return min(shape_bytes(part), whole)
        if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            return 0
        if user.opcode == "copy-start" and self._is_for_next_run(computation, user):
            return 0
        if user.opcode == "copy" and _in_hbm(user.shape):
            self.copied += whole
        if user.opcode == "copy-start" and _in_hbm(_tuple_elements(user.shape)[0]):
            self.copied += whole
        return whole

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


def _tuple_elements(shape: str) -> list[str]:
    """The shapes in a tuple's, those of nested tuples as one."""
    parts, depth, start = [], 0, 0
    inside = shape[1:-1]
    for i, character in enumerate(inside):
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and depth == 0:
            parts.append(inside[start:i])
            start = i + 1
    return [*parts, inside[start:]]
