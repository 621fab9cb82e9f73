"""What a model needs on TPUs, without having any: memory, operations, traffic, step time.

    python -m tools.plan --model=qwen3-0.6b --topology=v5e:1x1 --mode=decode --batch=8 --length=4096
    python -m tools.plan --model=qwen3-32b --topology=v5p:4x4x8 --mesh=fsdp:32,tensor:4 \
        --mode=train --batch=128 --length=4096 --json=plan.json --picture=plan.png
    python -m tools.plan --model=qwen3-8b --topology=v5e:2x4 --mode=decode --sweep

The program that would run is compiled for the topology by libtpu, which takes from seconds to
minutes; all figures are of one chip unless they say otherwise. Without libtpu the part that follows
from the shapes is printed. Memory is what the compiler allots; operations count matrix products, by
formula, over the traced program, and by XLA; the step time is the least that computing, memory and
interconnect allow, each at its peak.

--sweep compiles models of one and two repeats of the layers for each mesh that divides the model,
extrapolates, and prints the best ones.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import jax
import tqdm
from absl import flags

from configs.models import find_config
from qwen_jax.errors import UserError
from qwen_jax.sharding import aot
from qwen_jax.sharding.axes import read_mesh
from qwen_jax.sharding.chips import Topology, read_topology
from qwen_jax.sharding.jobs import Job
from qwen_jax.sharding.plan import Plan, compile_plan, estimate, sweep
from qwen_jax.training.objective import TrainOptions
from tools import cache_flag, command_line
from tools.plan_figures import as_json, draw_memory

_MODEL = flags.DEFINE_string(
    "model", None, "Preset, checkpoint directory or hub id.", required=True
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips, such as v5e:4x4, v5p:8x8x8 or v6e:16x16.", required=True
)
_MESH = flags.DEFINE_string("mesh", None, "Such as fsdp:4,tensor:2; by default fsdp or tensor.")
_MODE = flags.DEFINE_enum("mode", "decode", ["train", "prefill", "decode"], "What to run.")
_BATCH = flags.DEFINE_integer("batch", 1, "Rows, of all chips together.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 4096, "Tokens of a row; slots of its cache.", 1)
_REMAT = flags.DEFINE_enum(
    "remat", "full", ["none", "dots", "full"], "What training computes again instead of keeping it."
)
_SWEEP = flags.DEFINE_bool("sweep", False, "Try the meshes that divide the model.")
_JSON = flags.DEFINE_string("json", None, "File for all figures.")
_PICTURE = flags.DEFINE_string("picture", None, "PNG of the memory by part.")

# Rows of a table that is not printed whole; the file given by --json has all of them.
_ROWS = 8
_GIB = 1 << 30


def main() -> None:
    """Plans, prints, writes."""
    # A plan needs no accelerator, and looking for one where libtpu is installed takes time.
    jax.config.update("jax_platforms", "cpu")
    if _SWEEP.value and _MESH.value is not None:
        raise UserError("--mesh is not for --sweep, which tries them all")
    outputs = [command_line.path(flag) for flag in (_JSON, _PICTURE) if flag.value is not None]
    for path in outputs:
        _check_writable(path)
    topology = read_topology(_TOPOLOGY.value)
    job = Job(
        config=find_config(_MODEL.value),
        topology=topology,
        mesh=tuple(_mesh(topology).items()),
        mode=_MODE.value,
        batch=_BATCH.value,
        length=_LENGTH.value,
        options=TrainOptions(remat=_REMAT.value),
        cache_dtype=cache_flag.CACHE_DTYPE.value,
    )
    title = f"{_MODE.value} of {_MODEL.value} on {topology.name}"
    if job.cache_dtype is not None:
        title += f" with a cache in {job.cache_dtype}"
    plans = []
    if _SWEEP.value:
        plans = sweep(job, lambda jobs: tqdm.tqdm(jobs, desc="meshes", disable=None))
        print(f"{title}, batch {job.batch}, length {job.length}\n{sweep_table(plans)}\n")
        job = dataclasses.replace(job, mesh=tuple(read_mesh(plans[0].mesh).items()))
    if aot.has_compiler():
        best = compile_plan(job)
    else:
        best = estimate(job)
        print("libtpu is not here, so nothing is compiled: pip install libtpu==0.0.42")
    print(report(best, title))
    if _JSON.value is not None:
        command_line.path(_JSON).write_text(
            json.dumps({"model": _MODEL.value, **as_json(best), "sweep": list(map(as_json, plans))})
            + "\n",
            encoding="utf-8",
        )
    if _PICTURE.value is not None:
        bars = [(plan.mesh, plan.memory, plan.available) for plan in plans[:_ROWS] or [best]]
        draw_memory(bars, title, command_line.path(_PICTURE))


def _mesh(topology: Topology) -> dict[str, int]:
    if _MESH.value is not None:
        return read_mesh(_MESH.value)
    axis = "fsdp" if _MODE.value == "train" else "tensor"
    return read_mesh(f"{axis}:{topology.num_chips}")


def _check_writable(path: Path) -> None:
    """Refuses a file that cannot be written, before the minutes of compiling."""
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    if is_new:
        path.unlink()


def report(plan: Plan, title: str) -> str:
    """A plan as text, `fits: yes` or `fits: no` in its second line."""
    missing = plan.needed - plan.available
    lines = [
        f"{title}: mesh {plan.mesh}, batch {plan.batch}, length {plan.length}",
        f"fits: {'yes' if plan.fits else 'no'}",
    ]
    if not plan.fits:
        lines.append(f"  {_gib(missing)} GiB a chip too much; {plan.advice}")
    lines.append(f"memory, GiB of {_gib(plan.available)}: {_gib(plan.needed)}")
    lines += [f"  {part:<14}{_gib(size):>8}" for part, size in plan.memory.items()]
    analytic = sum(plan.flops_by_part.values())
    lines.append("operations of a step, all chips")
    for name, flops in (
        ("formula", analytic),
        ("traced", plan.traced_flops),
        ("XLA", plan.xla_flops),
    ):
        if flops is not None:
            lines.append(f"  {name:<14}{flops:8.3g}  {flops / analytic:.3f} of the formula")
    if plan.weight_reads is not None:
        lines.append(
            f"weights: read {plan.weight_reads:.2f} times a step, {_gib(plan.weight_copies)} GiB "
            f"of copies; {_gib(plan.cache_copies)} GiB of copies of the cache"
        )
    if plan.traffic:
        lines.append("between chips, MB sent a step" + ("" if plan.counts_all else " (at least)"))
        lines += [
            f"  {each.kind:<20}{each.sent / 1e6:>10.3f}  {each.times} x {each.place}"
            for each in plan.traffic[:_ROWS]
        ]
        rest = plan.traffic[_ROWS:]
        if rest:
            lines.append(f"  {'others':<20}{sum(each.sent for each in rest) / 1e6:>10.3f}")
    lines.append(f"step: {_time(plan.step_seconds)} at the least, bound by {plan.bound}")
    lines += [f"  {name:<14}{_time(seconds):>10}" for name, seconds in plan.seconds.items()]
    return "\n".join(lines)


def sweep_table(plans: Iterable[Plan]) -> str:
    """The first plans of a sweep, the best on top."""
    rows = [
        (
            plan.mesh,
            "yes" if plan.fits else "no",
            _gib(plan.needed),
            _time(plan.step_seconds),
            plan.bound,
        )
        for plan in list(plans)[:_ROWS]
    ]
    rows = [("mesh", "fits", "GiB", "step", "bound by"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3f} ms"


if __name__ == "__main__":
    command_line.run(main)
