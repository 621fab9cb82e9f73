"""Plans of every released size, compiled for TPUs: a table, a picture, all figures as JSON.

    python -m tools.plan_table                       # rows of configs/plans without figures
    python -m tools.plan_table --only=qwen3-0.6b     # some rows anew, the others as they were

What a row's figures are, `python -m tools.plan --help` says.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tqdm
from absl import flags

import configs.plans
from configs.models import get_preset
from configs.plans import ROWS, Row
from qwen_jax.errors import UserError
from qwen_jax.sharding.axes import read_mesh
from qwen_jax.sharding.chips import read_topology
from qwen_jax.sharding.jobs import Job
from qwen_jax.sharding.plan import compile_plan
from tools import command_line
from tools.plan_figures import as_json, draw_memory

_WORKDIR = flags.DEFINE_string(
    "workdir", str(Path(configs.plans.__file__).parent), "Where the results are and go."
)
_ONLY = flags.DEFINE_list(
    "only", None, "Models whose rows to compile anew; if not given, rows that have no figures."
)

_GIB = 1 << 30


def main() -> None:
    """Compiles the rows, keeping each as it is done, and writes the table and the picture."""
    jax.config.update("jax_platforms", "cpu")
    workdir = command_line.path(_WORKDIR)
    figures_file, new = workdir / "plans.json", workdir / "plans.json.new"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
        new.touch()
        new.unlink()
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{figures_file}: cannot be used ({error})") from None
    for row in tqdm.tqdm(_chosen(figures), desc="programs", disable=None):
        figures[row.model] = {"row": row._asdict(), **as_json(compile_plan(job_of(row)))}
        new.write_text(json.dumps(_sorted(figures), indent=1) + "\n", encoding="utf-8")
        new.replace(figures_file)
    missing = _without_figures(figures)
    if missing:
        names = ", ".join(row.model for row in missing)
        print(f"no table yet: {names} have no figures; run this without --only")
        return
    (workdir / "README.md").write_text(page(figures), encoding="utf-8")
    bars = [(f"{row.model}, {row.mode}", figures[row.model]) for row in ROWS]
    draw_memory(
        [(name, plan["memory"], plan["available"]) for name, plan in bars],
        "Memory of every released size",
        workdir / "memory.png",
    )
    print(table(figures))


def _without_figures(figures: dict[str, Any]) -> list[Row]:
    return [row for row in ROWS if figures.get(row.model, {}).get("row") != row._asdict()]


def _sorted(figures: dict[str, Any]) -> dict[str, Any]:
    """Those of `ROWS` in its order."""
    return {row.model: figures[row.model] for row in ROWS if row.model in figures}


def _chosen(figures: dict[str, Any]) -> list[Row]:
    if _ONLY.value is None:
        return _without_figures(figures)
    known = {row.model for row in ROWS}
    for name in _ONLY.value:
        if name not in known:
            raise UserError(f"--only={name}: there is no row of it in configs/plans")
    return [row for row in ROWS if row.model in _ONLY.value]


def job_of(row: Row) -> Job:
    """What is to be compiled for a row."""
    return Job(
        get_preset(row.model),
        read_topology(row.topology),
        tuple(read_mesh(row.mesh).items()),
        row.mode,
        row.batch,
        row.length,
    )


def table(figures: dict[str, Any]) -> str:
    """The rows as Markdown, in the order of `ROWS`."""
    head = (
        "model",
        "program",
        "chips",
        "mesh",
        "batch x length",
        "GiB a chip",
        "temporaries",
        "step at least",
        "bound by",
        "sent, MB",
    )
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line(_cells(row, figures[row.model])) for row in ROWS]
    return "\n".join(lines)


def _cells(row: Row, plan: dict[str, Any]) -> list[str]:
    return [
        row.model,
        row.mode,
        row.topology,
        row.mesh,
        f"{row.batch} x {row.length:,}",
        f"{plan['needed'] / _GIB:.1f} of {plan['available'] / _GIB:.1f}",
        f"{plan['memory']['temporaries'] / _GIB:.2f}",
        f"{1e3 * plan['step_seconds']:,.1f} ms",
        plan["bound"],
        f"{sum(each['sent'] for each in plan['traffic']) / 1e6:,.0f}",
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(figures: dict[str, Any]) -> str:
    """The README of `configs/plans`."""
    return f"""# Plans of every released size

Made by `python -m tools.plan_table`: each program of [`ROWS`](__init__.py) is compiled for its
topology by libtpu, without a TPU, and these are the compiler's own figures for one chip: what has
to be in memory, of that the temporaries, the least time that a step takes if computing, memory and
interconnect each work at their peak, which of them that is, and what a chip sends to others in a
step. Decoding is one token a row behind a full cache; a train step has float32 masters, AdamW and
rematerialised layers. All other figures are in [plans.json](plans.json). No step was timed.

A decode step reads every weight once and copies none; of the cache it copies less than a hundredth,
the windows of DeltaNet's convolutions. Its temporaries are at most 5% of the cache and 64 MB. In
three lists of buffers (`XLA_FLAGS="--xla_dump_to=DIR --xla_dump_hlo_as_text"`), of the 72B, of 8
layers of 27B and of 4 of Next-80B, most of that are tables: each copy that runs beside other work
and each operation with several results has 16 KB of its own. So the step is compiled without
fetching weights in pieces, which had more than doubled them in those two hybrids.

{table(figures)}

![memory of a chip](memory.png)

{_explained(figures)}
"""


# The row whose collectives are explained.
_EXPLAINED = "qwen3-30b-a3b"


class Sum(NamedTuple):
    """Collectives of one kind in one direction, all together.

    Attributes:
      kind: such as "all-gather".
      backward: whether they are of the backward pass, in which layers also run forward again.
      sent: bytes that a chip sends, by arithmetic.
      why: what they are.
    """

    kind: str
    backward: bool
    sent: float
    why: str


def expected_traffic(row: Row) -> list[Sum]:
    """What a train step of a mixture of experts on an fsdp and expert mesh has to send, bfloat16.

    A ring of s devices that gathers an array, or sums it up to shards, sends (s - 1) / s of it.
    """
    config, mesh = get_preset(row.model), read_mesh(row.mesh)
    moe, D, L = config.moe, config.hidden_size, config.num_hidden_layers
    devices = mesh["fsdp"] * mesh["expert"]
    tokens = row.batch * row.length // devices * mesh["expert"]
    of_fsdp, of_experts = ((n - 1) / n for n in (mesh["fsdp"], mesh["expert"]))
    wide, narrow = (
        2 * 2 * D * config.head_dim * heads
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    attention = wide + narrow
    experts = 2 * 3 * D * moe.intermediate_size * moe.num_experts // mesh["expert"]
    layers = L * of_fsdp * (attention + experts + 2 * D * moe.num_experts)
    table = D * config.vocab_size
    hidden = L * of_experts * tokens * 2 * D
    small = 2 * (moe.num_experts * D + 2 * D + 2 * config.head_dim)
    # int32: how often each expert is chosen, in each row, and together with each other.
    counts = 4 * moe.num_experts * (1 + row.batch + moe.num_experts)
    k = moe.num_experts_per_tok
    choices, weights = (L * of_experts * tokens * size * k for size in (4, 2))
    return [
        Sum(
            "all-gather",
            False,
            layers + of_fsdp * 2 * 2 * table + hidden + choices + weights,
            "weights of each layer, embeddings and head put together over `fsdp`; tokens with "
            "their choices brought to the experts over `expert`",
        ),
        Sum("reduce-scatter", False, hidden, "what the experts made of the tokens, summed at home"),
        Sum(
            "all-gather",
            True,
            layers + 2 * hidden + choices + weights,
            "the same again, since layers run once more, but for embeddings and head; gradients "
            "of what the experts made, brought to them",
        ),
        Sum(
            "reduce-scatter",
            True,
            hidden + weights + L * of_fsdp * (experts + wide),
            "gradients of tokens and of their weights, summed at home; gradients of experts,"
            " queries and outputs, summed to where each part is stored",
        ),
        Sum(
            "all-reduce",
            True,
            2 * of_fsdp * (L * narrow + (2 + 4) * table)
            + 2 * of_experts * (L * attention + (2 + 4) * table) / mesh["fsdp"]
            + 2 * (devices - 1) / devices * L * (small + counts),
            "gradients of keys, values, embeddings and, in float32, the head, which XLA sums whole "
            "over `fsdp` before each chip takes its part; these and those of attention then over "
            "`expert`; norms, routers and counts of experts' use over both",
        ),
    ]


def found_traffic(plan: dict[str, Any], wanted: Sum) -> float:
    """Bytes that a chip sends by such collectives in a plan; all-reduces of both directions."""
    return sum(
        each["sent"]
        for each in plan["traffic"]
        if each["kind"] == wanted.kind
        and (wanted.kind == "all-reduce" or each["place"].startswith("backward") == wanted.backward)
    )


def _explained(figures: dict[str, Any]) -> str:
    (row,) = (row for row in ROWS if row.model == _EXPLAINED)
    plan = figures[row.model]
    lines = [_line(("collective", "pass", "what", "by arithmetic, MB", "in the HLO, MB"))]
    lines.append(_line(["---"] * 5))
    for each in expected_traffic(row):
        numbers = (each.sent, found_traffic(plan, each))
        cells = [f"{n / 1e6:,.0f}" for n in numbers]
        lines.append(_line([each.kind, _PASS[each.backward], each.why, *cells]))
    table_of_kinds = "\n".join(lines)
    share = plan["seconds"]["interconnect"] / plan["step_seconds"]
    return f"""## What goes between the chips in a train step of {row.model}

On {row.topology} with `{row.mesh}` each chip has {row.batch * row.length // _chips(row):,} tokens
of its own, and with the {read_mesh(row.mesh)["expert"]} chips along `expert` all experts of a layer
among them. No chip ever gathers experts that are not its own: tokens travel to experts, and of each
expert's weights only the parts that `fsdp` cut are put together, in the layer that uses them. Both
ways, a chip sends what this arithmetic says:

{table_of_kinds}

All of it takes {1e3 * plan["seconds"]["interconnect"]:,.0f} ms over two links of a chip,
{share:.0%} of the least time of the step, beside which it can run."""


_PASS = {False: "forward", True: "backward"}


def _chips(row: Row) -> int:
    return read_topology(row.topology).num_chips


if __name__ == "__main__":
    command_line.run(main)
