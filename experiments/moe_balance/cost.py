"""What the routers' figures cost: train steps with and without them, in turns within one run."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments.files import replace, write_records
from experiments.initial import draw_params
from experiments.intervals import bootstrap_interval
from experiments.moe_balance.arms import MICROBATCH_ROWS, Experts
from experiments.moe_balance.training import Sizes
from qwen_jax.benchmark.report import markdown
from qwen_jax.config import ModelConfig
from qwen_jax.models.decoder import Decoder
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.batch import Batch
from qwen_jax.training.optimisers import OptimiserOptions, make_optimiser
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.train_step import init_train_state, make_train_step

_WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Work:
    """A step to time.

    Attributes:
      name: in reports.
      config: of the model.
      rows, length: of the batch.
    """

    name: str
    config: ModelConfig
    rows: int
    length: int


def works() -> tuple[Work, ...]:
    """The study's own model; and one whose layers have the proportions of Qwen3-30B-A3B's.

    Of the second width, experts and head are an eighth as wide: 128 experts, 8 for each token.
    """
    small = Sizes()
    wide = dataclasses.replace(
        Sizes(hidden_size=256).config(Experts(128, 8, 96)),
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=4096,
        max_position_embeddings=512,
    )
    return (
        Work("the study's", small.config(Experts()), 32, small.length),
        Work("an eighth of Qwen3-30B-A3B's width", wide, 8, 128),
    )


def measure(workdir: Path, repeats: int, origin: Mapping[str, Any]) -> str:
    """Times all works; writes cost.jsonl, cost.csv and cost.md, and returns the last."""
    rows = []
    for work in works():
        steps = {name: _step(work, name == "with") for name in ("without", "with")}
        seconds = _in_turns(steps, repeats, work.name)
        ratios = np.array(seconds["with"]) / np.array(seconds["without"])
        # Neighbours in time, which the machine's drift spares; medians, which its hiccups do.
        low, high = bootstrap_interval(_means_of_parts(ratios))
        rows.append(
            {
                "work": work.name,
                "without_ms": 1e3 * float(np.median(seconds["without"])),
                "with_ms": 1e3 * float(np.median(seconds["with"])),
                "ratio": float(np.median(ratios)),
                "low": low,
                "high": high,
                "repeats": repeats,
            }
        )
    write_records(workdir / "cost", rows, origin)
    cells = [
        [
            row["work"],
            f"{row['without_ms']:.1f}",
            f"{row['with_ms']:.1f}",
            f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
        ]
        for row in rows
    ]
    heads = ["train step of", "without figures, ms", "with", "with to without"]
    text = f"# What the routers' figures cost\n\n{markdown(heads, cells)}\n"
    replace(workdir / "cost.md", text)
    return text


def _step(work: Work, figures: bool) -> Callable[[], None]:
    """A function that makes one step and waits for it."""
    balance = BalanceOptions(0.01, microbatch_rows=MICROBATCH_ROWS, num_domains=8, figures=figures)
    options = TrainOptions(dtype="float32", scan=False, remat="none", balance=balance)
    params = draw_params(work.config, jax.random.key(0))
    optimiser = make_optimiser(OptimiserOptions(), 1000, params)
    model = Decoder(work.config)
    step = make_train_step(model, optimiser, options)
    ids = np.random.default_rng(0).integers(0, work.config.vocab_size, (work.rows, work.length))
    domains = jnp.arange(work.rows) * 8 // work.rows
    batch = Batch(jnp.asarray(ids, jnp.int32), domains=domains)
    held = [init_train_state(model, optimiser, params=params)]

    def run() -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    return run


def _in_turns(
    steps: Mapping[str, Callable[[], None]], repeats: int, name: str
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in tqdm.trange(_WARM_UP + repeats, desc=name, disable=None):
        # Each is first as often as second.
        for which in list(steps) if turn % 2 else list(steps)[::-1]:
            begun = time.perf_counter()
            steps[which]()
            if turn >= _WARM_UP:
                seconds[which].append(time.perf_counter() - begun)
    return seconds


def _means_of_parts(ratios: Sequence[float], parts: int = 10) -> list[float]:
    return [float(np.median(part)) for part in np.array_split(np.asarray(ratios), parts)]
