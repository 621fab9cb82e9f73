"""What each way of running a mixture's experts costs, from which `choose_dispatch` is drawn."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import tqdm

from qwen_jax.benchmark.report import markdown, three_digits
from qwen_jax.config import MoeSpec
from qwen_jax.nn.moe import Dispatch, mix_experts
from qwen_jax.nn.router import capacity_of, limit_capacity, route


@dataclasses.dataclass(frozen=True)
class DispatchRow:
    """One method at one number of tokens.

    Attributes:
      num_tokens: N.
      method: how the experts ran.
      temporaries: bytes that the compiled program takes beside its arguments and results.
      seconds: of each repeat; empty where a limit kept it from running.
      ratio: of the median to the least median at this number of tokens; None where it did not run.
    """

    num_tokens: int
    method: Dispatch
    temporaries: int
    seconds: tuple[float, ...] = ()
    ratio: float | None = None

    @property
    def median(self) -> float | None:
        """Median seconds; None where it did not run."""
        return statistics.median(self.seconds) if self.seconds else None


def measure_dispatch(
    spec: MoeSpec,
    hidden_size: int,
    token_counts: Iterable[int],
    methods: Iterable[Dispatch] = tuple(Dispatch),
    repeats: int = 5,
    gradient: bool = False,
    memory_limit: float = 10e9,
    time_limit: float = 30.0,
    capacity_factor: float = 1.25,
) -> list[DispatchRow]:
    """Seconds of router and experts with random float32 weights, the methods turn by turn.

    Args:
      spec: of the layer; its shared expert is no part of this.
      hidden_size: D.
      token_counts: each N to measure at.
      methods: which; each runs once before it is measured.
      repeats: measurements of each.
      gradient: whether to measure the gradient, of tokens and all weights, in place of the output.
      memory_limit: bytes of temporaries above which a method is compiled but not run.
      time_limit: seconds; a method that took longer once is not measured, nor run with more tokens.
      capacity_factor: of `Dispatch.CAPACITY`.

    Returns:
      A row for each number of tokens and method, in the order given.
    """
    E, F, D = spec.num_experts, spec.intermediate_size, hidden_size
    keys = jax.random.split(jax.random.key(0), 5)
    experts = {
        "gate_proj": jax.random.normal(keys[0], (E, F, D)) * D**-0.5,
        "up_proj": jax.random.normal(keys[1], (E, F, D)) * D**-0.5,
        "down_proj": jax.random.normal(keys[2], (E, D, F)) * F**-0.5,
    }
    router = jax.random.normal(keys[3], (E, D)) * D**-0.5
    methods, rows, slow = tuple(methods), [], set()
    for num_tokens in tqdm.tqdm(tuple(token_counts), desc="measuring", disable=None):
        x = jax.random.normal(keys[4], (num_tokens, D))
        programs = {
            method: jax.jit(_program(spec, method, num_tokens, gradient, capacity_factor))
            .lower(x, router, experts)
            .compile()
            for method in methods
        }
        temporaries = {
            method: program.memory_analysis().temp_size_in_bytes
            for method, program in programs.items()
        }
        runs = [m for m in methods if temporaries[m] <= memory_limit and m not in slow]
        slow |= {m for m in runs if _time(programs[m], x, router, experts) > time_limit}
        seconds = {method: [] for method in runs if method not in slow}
        for _ in range(repeats):
            for method, values in seconds.items():
                values.append(_time(programs[method], x, router, experts))
        best = min((statistics.median(values) for values in seconds.values()), default=None)
        for method in methods:
            values = tuple(seconds.get(method, ()))
            ratio = statistics.median(values) / best if values else None
            rows.append(DispatchRow(num_tokens, method, temporaries[method], values, ratio))
    return rows


def _time(program: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def _program(
    spec: MoeSpec, method: Dispatch, num_tokens: int, gradient: bool, capacity_factor: float
) -> Callable[..., jax.Array]:
    capacity = None
    if method is Dispatch.CAPACITY:
        capacity = capacity_of(num_tokens, spec, capacity_factor)

    def forward(x, router, experts):
        routing = route(x, router, spec)
        if capacity is not None:
            routing = limit_capacity(routing, capacity)
        return mix_experts(x, routing, experts, method, capacity)

    def loss(*arguments):
        return jnp.sum(jnp.square(forward(*arguments)))

    return jax.grad(loss, argnums=(0, 1, 2)) if gradient else forward


def dispatch_table(rows: Sequence[DispatchRow], chosen: Mapping[int, Dispatch]) -> str:
    """A Markdown table: each method's milliseconds and temporaries by the number of tokens.

    Args:
      rows: as `measure_dispatch` has them.
      chosen: number of tokens -> the method that is the default, which is set in bold.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = []
    for n in dict.fromkeys(row.num_tokens for row in rows):
        own = [row for row in rows if row.num_tokens == n]
        lines.append([str(n), *(_cell(row, row.method is chosen[n]) for row in own)])
    text = markdown(["tokens", *methods], lines)
    return f"{text}\nms (temporaries, MB); the default in bold"


def _cell(row: DispatchRow, is_default: bool) -> str:
    milliseconds = "not run" if row.median is None else three_digits(1e3 * row.median)
    cell = f"{milliseconds} ({three_digits(row.temporaries / 1e6)})"
    return f"**{cell}**" if is_default else cell
