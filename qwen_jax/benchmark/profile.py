"""Where the time of a decode step or a prefill goes: a profiler's trace, by parts of the model.

A trace has the names of a program's instructions, the program's text for each of them the place in
the model that it was made for, by JAX's names. Reading the trace takes what JAX brings along.
"""

import collections
import dataclasses
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from qwen_jax.benchmark.programs import (
    Prefills,
    compiled_anew,
    filled_cache,
    lower_decode,
    random_params,
)
from qwen_jax.benchmark.report import markdown, three_digits
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.models.decoder import Decoder
from qwen_jax.sharding.hlo.text import Computation, Instruction, Module, read_module

QKV, ATTENTION, OUTPUT = "qkv projections", "attention over the cache", "o_proj"
GATE_UP, DOWN, EXPERTS = "gate/up", "down", "experts"
HEAD, REST, SAMPLING, HOST = "output head", "norms and the rest", "sampling", "host"
# From the model's first part to its last.
PARTS = (QKV, ATTENTION, OUTPUT, GATE_UP, DOWN, EXPERTS, HEAD, REST, SAMPLING, HOST)

# The first that is found in where an instruction comes from.
_PLACES = (
    (HEAD, r"/Decoder\.read/|/lm_head/"),
    (EXPERTS, r"/mlp/experts/"),
    (OUTPUT, r"/(self_attn/o_proj|linear_attn/out_proj)/"),
    (QKV, r"/(self|linear)_attn/\w+_proj/"),
    (ATTENTION, r"/self_attn\._attend/|/linear_attn/(?!norm/)|^state\.cache\.layers"),
    (GATE_UP, r"/(gate|up)_proj/"),
    (DOWN, r"/down_proj/"),
    (SAMPLING, r"^jit\(\w+\)/(?!.*\bDecoder\b)"),
)
_PRODUCTS = ("dot", "convolution", "ragged-dot", "custom-call")
# Steps before those that count, which compile.
_WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Profile:
    """Attributes:
    step: seconds of a step, or of a prefill, under the profiler, by the wall.
    undisturbed: the same without the profiler, just before.
    parts: part -> seconds a step; they add up to `step`.
    """

    step: float
    undisturbed: float
    parts: dict[str, float]

    def share(self, part: str) -> float:
        """Of a part in the step."""
        return self.parts[part] / self.step


@dataclasses.dataclass(frozen=True)
class Event:
    """A span of one line of a trace, such as a thread's or a stream's, in nanoseconds."""

    name: str
    start: float
    end: float


def part_of(op_name: str) -> str:
    """The part of the model that JAX's name of an operation, or of an argument, belongs to."""
    # Of an argument: params['layers_0']['mlp']['up_proj']['weight'].
    path = re.sub(r"\['?|'?\]", "/", op_name).replace("//", "/")
    return next((part for part, place in _PLACES if re.search(place, path)), REST)


def parts_of(module: Module) -> dict[str, str]:
    """Instruction -> part, of all instructions of a program."""
    parts: dict[str, str] = {}
    for computation in module.computations.values():
        for instruction in computation.instructions:
            parts[instruction.name] = _part_of_instruction(module, computation, instruction)
    return parts


def _part_of_instruction(module: Module, where: Computation, instruction: Instruction) -> str:
    """By its product of matrices, which takes its time; by its name; by what goes into it.

    What XLA makes of an operation may have lost its name, products on CPUs among it: they are told
    by the weight that they read.
    """
    inner = list(_inner(module, instruction))
    products = [i for i in (instruction, *inner) if i.opcode in _PRODUCTS]
    arguments = [_argument(where, name) for name in instruction.operands] if products else []
    found = [part_of(i.op_name) for i in products] + [_reader_of(name) for name in arguments]
    for part in found:
        if part is not REST:
            return part
    if instruction.op_name:
        return part_of(instruction.op_name)
    counts = collections.Counter(part_of(i.op_name) for i in inner if "/" in i.op_name)
    if counts:
        return counts.most_common(1)[0][0]
    for name in instruction.operands:
        source = where.by_name.get(name)
        if source is not None and source.opcode not in ("parameter", "constant"):
            return _part_of_instruction(module, where, source)
    return REST


def _inner(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    """What runs within an instruction."""
    name = instruction.called("calls") or instruction.called("to_apply")
    if name in module.computations and instruction.opcode in ("fusion", "call"):
        for i in module.computations[name].instructions:
            yield i
            yield from _inner(module, i)


def _argument(where: Computation, name: str) -> str:
    """JAX's name of the program's argument that an operand is, or is a copy of; else empty."""
    source = where.by_name.get(name)
    while source is not None and source.opcode != "parameter":
        if len(source.operands) != 1:
            return ""
        source = where.by_name.get(source.operands[0])
    return source.op_name if source is not None else ""


def _reader_of(argument: str) -> str:
    """The part whose products read an argument."""
    return HEAD if "['embed_tokens']" in argument else part_of(argument)


def exclusive_seconds(lines: Iterable[Iterable[Event]]) -> dict[str, float]:
    """Seconds of each name in a trace: of what is innermost; what runs at once shares the time.

    They add up to the time in which anything ran. Events of one line nest or follow each other.
    """
    # Everything that is innermost from some time on, and no longer.
    changes: list[tuple[float, int, str]] = []
    for events in lines:
        stack: list[Event] = []
        begun = 0.0

        def close(until: float, stack: list[Event] = stack) -> None:
            nonlocal begun
            while stack and stack[-1].end <= until:
                event = stack.pop()
                changes.extend([(begun, 1, event.name), (event.end, -1, event.name)])
                begun = event.end

        for event in sorted(events, key=lambda e: (e.start, -e.end)):
            close(event.start)
            if stack:
                changes.extend([(begun, 1, stack[-1].name), (event.start, -1, stack[-1].name)])
            stack.append(event)
            begun = event.start
        close(float("inf"))
    seconds: dict[str, float] = collections.defaultdict(float)
    running: collections.Counter[str] = collections.Counter()
    last = 0.0
    # At equal times what ends comes first; nothing is lost by it.
    for at, change, name in sorted(changes):
        count = running.total()
        for other, times in running.items() if count else ():
            seconds[other] += (at - last) * times / count / 1e9
        running[name] += change
        if not running[name]:
            del running[name]
        last = at
    return dict(seconds)


def read_trace(path: Path, program: str, known: Mapping[str, str]) -> list[list[Event]]:
    """The operations of a program in an .xplane.pb file, line by line.

    A CPU's are among the host's events, and say which program they are of; so do a GPU's. A TPU has
    a line for operations.

    Args:
      path: of the file.
      program: its name, such as "jit_step".
      known: its instructions.
    """
    lines = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            events = []
            for event in line.events:
                stats = dict(event.stats)
                if line.name == "XLA Ops":
                    name = event.name.partition(" = ")[0].removeprefix("%")
                elif stats.get("hlo_module") == program:
                    name = str(stats.get("hlo_op"))
                else:
                    continue
                if name in known:
                    end = event.start_ns + event.duration_ns
                    events.append(Event(name, event.start_ns, end))
            if events:
                lines.append(events)
    return lines


def profile_decode(
    config: ModelConfig, rows: int, filled: int, steps: int, repeats: int
) -> list[Profile]:
    """Decode steps as `generate` runs them, of random weights, traced `repeats` times.

    A profiler notes each operation, which costs time too, most where operations are small.

    Args:
      config: the shape.
      rows: texts at once.
      filled: tokens of each in the cache.
      steps: in a trace.
      repeats: traces.

    Raises:
      UserError: the profiler has no operations of a program on this platform.
    """
    total = _WARM_UP + 2 * steps * repeats
    capacity = filled + total + 1
    cache = filled_cache(config, rows, capacity, filled)
    with compiled_anew():
        text = lower_decode(config, rows, cache.capacity).compile().as_text()
    params = random_params(config)
    stream = TokenStream(Decoder(config), params, [[0]] * rows, total, stop_ids=(), cache=cache)
    _seconds(stream, _WARM_UP)
    return _profiles(lambda: _seconds(stream, steps), text, steps, repeats)


def profile_prefill(config: ModelConfig, rows: int, length: int, repeats: int) -> list[Profile]:
    """As `profile_decode`, of the first pass over prompts of `length` tokens."""
    prefills = Prefills(config, random_params(config), rows, length)
    prefills.seconds()
    return _profiles(prefills.seconds, prefills.text, 1, repeats)


def _profiles(run: Callable[[], float], text: str, steps: int, repeats: int) -> list[Profile]:
    """Of `repeats` traces of what `run` runs, `steps` of the program `text`; it gives seconds."""
    program, known = re.match(r"HloModule ([\w.\-]+)", text)[1], parts_of(read_module(text))
    return [_profile(run, program, known, steps) for _ in range(repeats)]


def _profile(
    run: Callable[[], float], program: str, known: Mapping[str, str], steps: int
) -> Profile:
    undisturbed = run() / steps
    options = jax.profiler.ProfileOptions()
    # Python's own calls are many and are no part of this.
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        jax.profiler.start_trace(directory, profiler_options=options)
        try:
            step = run() / steps
        finally:
            jax.profiler.stop_trace()
        paths = sorted(Path(directory).rglob("*.xplane.pb"))
        lines = [line for path in paths for line in read_trace(path, program, known)]
    if not lines:
        raise UserError(
            f"the profiler's trace has no operations of {program} on {jax.default_backend()}, so "
            "that their time cannot be told; run --workload=profile on a platform that has"
        )
    parts = dict.fromkeys(PARTS, 0.0)
    for name, seconds in exclusive_seconds(lines).items():
        parts[known[name]] += seconds / steps
    parts[HOST] = max(step - sum(parts.values()), 0.0)
    return Profile(step, undisturbed, parts)


def _seconds(stream: TokenStream, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
    return time.perf_counter() - start


def parts_in(profiles: Sequence[Profile]) -> list[str]:
    """The parts that take any time, in the model's order."""
    return [part for part in PARTS if any(profile.parts[part] for profile in profiles)]


def profile_table(profiles: Sequence[Profile]) -> str:
    """A Markdown table: of each part, milliseconds a step and its share, medians of the traces."""
    rows = []
    for part in parts_in(profiles):
        ms = statistics.median(1e3 * profile.parts[part] for profile in profiles)
        share = statistics.median(100 * profile.share(part) for profile in profiles)
        rows.append([part, three_digits(ms), three_digits(share)])
    steps = (
        statistics.median(1e3 * getattr(profile, name) for profile in profiles)
        for name in ("step", "undisturbed")
    )
    step, undisturbed = map(three_digits, steps)
    rows.append(["whole step", step, "100"])
    text = markdown(["part", "ms a step", "% of the step"], rows)
    return f"{text}\n\nwithout the profiler a step takes {undisturbed} ms"
