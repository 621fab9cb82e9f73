"""What a model needs on TPUs that are not there: memory, operations, traffic, time.

The program that would run is compiled for the topology through libtpu, and its own figures are
read. Without libtpu there are those that follow from the shapes.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.nn.cache import CacheDtype
from qwen_jax.sharding import aot, hlo
from qwen_jax.sharding.flops import Mode, analytic_flops, count_flops, extrapolate
from qwen_jax.sharding.jobs import (
    Job,
    build_program,
    check,
    mean_turns,
    mesh_of_no_devices,
    share_filled,
    share_seen,
)
from qwen_jax.training.stacking import segments


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind from one place of the model, per device and step.

    Attributes:
      kind: such as "all-gather".
      place: such as "layers/mlp/down_proj", behind "backward" for gradients.
      times: how often one runs.
      bytes: of the arrays, whole.
      sent: bytes that a device sends.
    """

    kind: str
    place: str
    times: int
    bytes: int
    sent: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures of a job; those of a program that was not compiled are None.

    Attributes:
      topology, mesh: as the user writes them.
      mode, batch, length, cache_dtype: of the job.
      fits: whether a chip has the memory; without a program, for what is there before it starts.
      available: bytes of a chip.
      needed: bytes that it has to have.
      memory: bytes of a chip by part. "other" is what a program is given beside the named parts,
        "temporaries" what it needs while it runs, "outputs" what it returns in memory of its own.
      flops_by_part: operations of all chips by part of the model, by formula.
      traced_flops: operations of all chips, counted over the traced program.
      xla_flops: the same as XLA counts them, but of loops all turns (one where their number depends
        on data), and kernels and products over groups as traced (see `count_flops`); extrapolated
        over layers.
      traffic: what goes between chips, the most first.
      counts_all: whether the number of turns of every loop with a collective in it is known.
      weight_reads: how often a step reads the weights from memory; of a decode step.
      weight_copies: bytes of copies of weights that it makes in memory.
      cache_copies: bytes of copies of the cache, before its new slot is written or after.
      seconds: the least that a step takes for "compute" and "memory", and of a compiled program for
        "interconnect".
      advice: what to change where it does not fit; else empty.
    """

    topology: str
    mesh: str
    mode: Mode
    batch: int
    length: int
    cache_dtype: CacheDtype | None
    fits: bool
    available: int
    needed: int
    memory: dict[str, int]
    flops_by_part: dict[str, float]
    traced_flops: float
    xla_flops: float | None
    traffic: tuple[Traffic, ...]
    counts_all: bool
    weight_reads: float | None
    weight_copies: int | None
    cache_copies: int | None
    seconds: dict[str, float]
    advice: str

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def step_seconds(self) -> float:
        """The least that a step takes: all of them run beside each other."""
        return max(self.seconds.values())


def _bytes_of_a_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def estimate(job: Job) -> Plan:
    """The figures that need no compiler.

    Raises:
      UserError: the mesh does not fit the model or the topology, or the job is none.
    """
    check(job)
    mesh = mesh_of_no_devices(job)
    program = build_program(job, mesh)
    parts = {name: _bytes_of_a_device(tree) for name, tree in program.parts.items()}
    traced = program.function.trace(*program.arguments)
    return _plan(job, parts, _traced_flops(job, mesh, traced))


def _traced_flops(job: Job, mesh: Mesh | AbstractMesh, traced: jax.stages.Traced) -> float:
    filled = share_filled(job, mesh)
    return count_flops(traced.jaxpr, mean_turns(job, mesh), share_seen(job), filled)


def compile_plan(job: Job, *, with_xla_flops: bool = True) -> Plan:
    """All figures, the program compiled.

    Args:
      job: what is to run.
      with_xla_flops: whether to have XLA's own count, for which a train step that scans over its
        layers is compiled twice more, short.

    Raises:
      UserError: as `estimate`, and without libtpu.
    """
    check(job)
    mesh = aot.make_mesh(job.topology, job.sizes)
    program = build_program(job, mesh)
    parts = {name: _bytes_of_a_device(tree) for name, tree in program.parts.items()}
    traced = program.function.trace(*program.arguments)
    flops = _traced_flops(job, mesh, traced)
    try:
        compiled = aot.compile_program(traced.lower())
    except aot.DoesNotFitError as error:
        return _plan(job, parts, flops, error=error)
    xla_flops = None
    if with_xla_flops and job.mode == "train" and job.options.scan:
        xla_flops = _extrapolated_xla_flops(job, mesh)
    elif with_xla_flops:
        xla_flops = _xla_flops(job, mesh, traced, compiled)
    return _plan(job, parts, flops, compiled=compiled, xla_flops=xla_flops)


def _xla_flops(job: Job, mesh: Mesh, traced: jax.stages.Traced, compiled: aot.Compiled) -> float:
    """XLA's count on all chips, all turns of its loops; kernels and groups put right as traced."""
    taken = count_flops(traced.jaxpr, mean_turns(job, mesh), as_xla=True)
    unseen = _traced_flops(job, mesh, traced) - taken
    repeated = hlo.repeated_flops(hlo.read_module(compiled.hlo))
    return (compiled.flops + repeated) * job.topology.num_chips + unseen


def _extrapolated_xla_flops(job: Job, mesh: Mesh) -> float | None:
    """The same of a train step that scans; None where even short models do not fit."""

    def measure(config: ModelConfig) -> float:
        # Without a loop over layers, of which XLA would count one turn.
        options = dataclasses.replace(job.options, scan=False)
        program = build_program(dataclasses.replace(job, config=config, options=options), mesh)
        traced = program.function.trace(*program.arguments)
        return _xla_flops(job, mesh, traced, aot.compile_program(traced.lower()))

    try:
        return extrapolate(job.config, segments(job.config), measure)
    except aot.DoesNotFitError:
        return None


def _plan(
    job: Job,
    parts: dict[str, int],
    traced_flops: float,
    *,
    compiled: aot.Compiled | None = None,
    error: aot.DoesNotFitError | None = None,
    xla_flops: float | None = None,
) -> Plan:
    memory, chip = dict(parts), job.topology.chip
    traffic, counts_all, buffers = (), True, _Buffers()
    available, needed = chip.hbm_bytes, sum(memory.values())
    moved = needed
    if error is not None:
        available, needed = error.available, error.needed
        memory["temporaries"] = max(needed - sum(memory.values()), 0)
        moved = needed
    elif compiled is not None:
        module = hlo.read_module(compiled.hlo)
        found = hlo.collectives(module)
        traffic, counts_all = _traffic(found), all(each.is_counted for each in found)
        memory["other"] = max(compiled.arguments - sum(memory.values()), 0)
        memory["outputs"] = compiled.outputs - compiled.aliased
        memory["temporaries"] = compiled.temporaries
        memory["program"] = compiled.code
        needed = compiled.peak
        moved = _bytes_moved(job, compiled)
        if job.mode == "decode":
            buffers = _buffers(module)
    seconds = {
        "compute": traced_flops / job.topology.num_chips / chip.flops,
        "memory": moved / chip.hbm_bandwidth,
    }
    if compiled is not None:
        # Around a ring of chips, in both directions.
        sent = sum(each.sent for each in traffic)
        seconds["interconnect"] = sent / (2 * chip.link_bandwidth)
    fits = error is None and needed <= available
    return Plan(
        topology=job.topology.name,
        mesh=mesh_name(job.sizes),
        mode=job.mode,
        batch=job.batch,
        length=job.length,
        cache_dtype=job.cache_dtype,
        fits=fits,
        available=available,
        needed=needed,
        memory=memory,
        flops_by_part=_analytic(job),
        traced_flops=traced_flops,
        xla_flops=xla_flops,
        traffic=traffic,
        counts_all=counts_all,
        weight_reads=buffers.weight_reads,
        weight_copies=buffers.weight_copies,
        cache_copies=buffers.cache_copies,
        seconds=seconds,
        advice="" if fits else _advice(job, memory),
    )


def _bytes_moved(job: Job, compiled: aot.Compiled) -> int:
    """The least that passes between memory and core.

    What a program is given is read and what it makes is written, temporaries both. A decode step
    writes one slot of a cache, and nothing else over what it was given.
    """
    written = compiled.outputs - (compiled.aliased if job.mode == "decode" else 0)
    return compiled.arguments + written + 2 * compiled.temporaries


@dataclasses.dataclass(frozen=True)
class _Buffers:
    """What becomes of a decode step's weights and cache, as `Plan` has it."""

    weight_reads: float | None = None
    weight_copies: int | None = None
    cache_copies: int | None = None


def _buffers(module: hlo.Module) -> _Buffers:
    arguments = hlo.argument_reads(module)
    weights = [
        reads
        for name, reads in arguments.items()
        if name.startswith("params") and name.endswith("['weight']")
    ]
    largest = max(reads.bytes for reads in weights)
    matrices = [reads for reads in weights if reads.bytes * 1000 > largest]
    caches = [reads for name, reads in arguments.items() if name.startswith("state.cache.layers")]
    return _Buffers(
        # Of the one that is read most.
        weight_reads=max(reads.times for reads in matrices),
        weight_copies=sum(reads.copied for reads in weights),
        cache_copies=sum(reads.copied for reads in caches),
    )


def _traffic(found: Iterable[hlo.Collective]) -> tuple[Traffic, ...]:
    sums: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for each in found:
        total = sums[each.kind, place_of(each.op_name)]
        for i, value in enumerate((1, each.bytes, each.sent)):
            total[i] += each.times * value
    rows = (Traffic(kind, place, *total) for (kind, place), total in sums.items())
    return tuple(sorted(rows, key=lambda row: -row.sent))


def place_of(op_name: str) -> str:
    """Where in the model an operation is, from the name that JAX gave it, without numbers."""
    backward = "transpose(" in op_name
    names = [name for name in op_name.split("/")[:-1] if re.fullmatch(r"[A-Za-z]\w*", name)]
    noise = r"while|body|closed_call|checkpoint|rematted_computation|shard_map|cond|branch_\d+_fun"
    names = [re.sub(r"_?\d+$", "", name) for name in names if not re.fullmatch(noise, name)]
    layers = [i for i, name in enumerate(names) if name == "layers"]
    place = "/".join(dict.fromkeys(names[layers[-1] :] if layers else names)) or "elsewhere"
    return f"backward {place}" if backward else place


def _advice(job: Job, memory: dict[str, int]) -> str:
    """What makes the largest part smaller."""
    part = max(memory, key=memory.get)
    sharded = "a larger fsdp axis" if job.mode == "train" else "a larger tensor axis"
    if job.config.moe is not None and job.mode != "train":
        sharded = "a larger expert or tensor axis"
    changes = {
        "parameters": f"{sharded} or more chips",
        "optimiser": f"{sharded} or more chips",
        "cache": "fewer rows, a shorter length, or more chips along data or tensor",
    }
    if job.mode == "train":
        activations = "fewer rows, more chips along fsdp or context, or remat of whole layers"
    else:
        activations = "fewer rows, a shorter length, or more chips along context or tensor"
    return f"most of it is {part}: {changes.get(part, activations)}"


def mesh_name(sizes: dict[str, int]) -> str:
    """A mesh as users write it; those axes that cut nothing are left out."""
    return ",".join(f"{axis}:{size}" for axis, size in sizes.items() if size > 1) or "data:1"


def sweep(job: Job, progress: Callable[[list[Job]], Iterable[Job]] = iter) -> list[Plan]:
    """Plans of the meshes that the chips can form, the fastest that fits first.

    Each is of models with one and with two repeats of the layers' pattern, extrapolated; compile
    the best one for exact figures.

    Args:
      job: whose mesh does not matter.
      progress: wraps the jobs, to show how many are done.

    Raises:
      UserError: no mesh fits the model, or as `compile_plan`.
    """
    jobs = list(_candidates(job))
    if not jobs:
        raise UserError(
            f"no mesh of {job.topology.num_chips} chips divides the model; give another topology"
        )
    plans = [_extrapolated(each) for each in progress(jobs)]
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step_seconds, plan.needed))


def _candidates(job: Job) -> Iterator[Job]:
    """Jobs on meshes that divide the model, and whose shards of the batch are not empty."""
    chips = job.topology.num_chips
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    axes = {
        "fsdp": divisors if job.mode == "train" else [1],
        "expert": divisors if job.config.moe is not None else [1],
        "context": divisors if job.mode != "decode" and job.length >= 16384 else [1],
        # Around a host's chips and their neighbours: further away every layer waits.
        "tensor": [n for n in divisors if n <= 16],
    }
    for sizes in itertools.product(*axes.values()):
        named = dict(zip(axes, sizes, strict=True))
        if chips % math.prod(sizes):
            continue
        data = chips // math.prod(sizes)
        if data * named["fsdp"] * named["expert"] > max(job.batch, named["expert"]):
            continue
        mesh = tuple({"data": data, **named}.items())
        candidate = dataclasses.replace(job, mesh=mesh)
        try:
            check(candidate)
        except UserError:
            continue
        if estimate_memory(candidate) <= job.topology.chip.hbm_bytes:
            yield candidate


def estimate_memory(job: Job) -> int:
    """Bytes of a chip that are taken before the program starts."""
    parts = build_program(job, mesh_of_no_devices(job)).parts
    return sum(map(_bytes_of_a_device, parts.values()))


def _extrapolated(job: Job) -> Plan:
    plans: dict[ModelConfig, Plan] = {}

    def whole(figure: Callable[[Plan], float]) -> float:
        def measure(config: ModelConfig) -> float:
            if config not in plans:
                short = dataclasses.replace(job, config=config)
                plans[config] = compile_plan(short, with_xla_flops=False)
            return figure(plans[config])

        return extrapolate(job.config, segments(job.config), measure)

    needed = int(whole(lambda plan: plan.needed))
    one = next(iter(plans.values()))
    memory = {name: int(whole(lambda plan, n=name: plan.memory.get(n, 0))) for name in one.memory}
    fits = needed <= one.available
    return dataclasses.replace(
        one,
        fits=fits,
        needed=needed,
        memory=memory,
        flops_by_part=_analytic(job),
        traced_flops=whole(lambda plan: plan.traced_flops),
        traffic=(),
        seconds={name: whole(lambda plan, n=name: plan.seconds.get(n, 0)) for name in one.seconds},
        advice="" if fits else _advice(job, memory),
    )


def _analytic(job: Job) -> dict[str, float]:
    remat = job.options.remat == "full"
    return analytic_flops(job.config, job.mode, job.batch, job.length, remat)
