"""What is measured: pieces of work, what they should reach, and the least that they take."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from qwen_jax.benchmark.limits import Limits
from qwen_jax.config import ModelConfig
from qwen_jax.models.decoder import parameter_shapes
from qwen_jax.nn.cache import init_cache
from qwen_jax.sharding.flops import analytic_flops

PREFILL, DECODE, TRAIN, START = "prefill", "decode", "train step", "load + first token"


@dataclasses.dataclass(frozen=True)
class Aim:
    """Attributes:
    ratio: how many times the peer's speed.
    share: of the machine's limit; None for none.
    """

    ratio: float
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """A piece of work that engines do in turns.

    Attributes:
      name: of its row.
      model: a preset, or a directory with config.json below the repository.
      kind: "generate" reads prompts and writes after them; "train" makes a step; "start" loads in
        a new process, with the programs that an earlier one has compiled, and writes one token.
      rows: texts at once.
      length: tokens of each prompt, or of each row that is trained on.
      steps: tokens of each row that are written and timed, behind the first; 0 for none.
      aims: figure -> what it should reach.
    """

    name: str
    model: str
    kind: Literal["generate", "train", "start"] = "generate"
    rows: int = 1
    length: int = 512
    steps: int = 16
    aims: tuple[tuple[str, Aim], ...] = ()

    @property
    def figures(self) -> tuple[str, ...]:
        """What is timed."""
        match self.kind:
            case "train":
                return (TRAIN,)
            case "start":
                return (START,)
        return (PREFILL, DECODE) if self.steps else (PREFILL,)

    def describe(self, figure: str) -> str:
        """The work and one of its figures, with their sizes."""
        sizes = {
            PREFILL: f"prefill of {self.rows} x {self.length}",
            DECODE: f"decode of {self.rows}, {self.length} in the cache",
            TRAIN: f"train step of {self.rows} x {self.length}",
            START: START,
        }
        return f"{self.name}: {sizes[figure]}"

    def tokens(self, figure: str) -> int:
        """Tokens that a figure's seconds are of; 0 where it is a time in itself."""
        each = {PREFILL: self.length, DECODE: self.steps, TRAIN: self.length, START: 0}
        return self.rows * each[figure]

    def least_seconds(self, figure: str, config: ModelConfig, limits: Limits) -> float | None:
        """By the machine's limits: of products, or in decoding of what must be read.

        None of a start, which disks and compilers bound.
        """
        match figure:
            case _ if figure == DECODE:
                each = decode_bytes(config, self.rows, self.length + self.steps // 2)
                return self.steps * each / limits.bandwidth
            case _ if figure in (PREFILL, TRAIN):
                mode = "train" if figure == TRAIN else "prefill"
                flops = analytic_flops(config, mode, self.rows, self.length)
                return sum(flops.values()) / limits.matrix_rate
        return None


def decode_bytes(config: ModelConfig, rows: int, filled: int) -> float:
    """What a decode step must read in float32: weights, and the filled part of the cache.

    Of an untied table of embeddings it is a row for each text. Of experts it is those that are
    chosen, `num_experts_per_tok` a token; of several tokens as many as differ on average, were
    choices even.
    """
    shapes = parameter_shapes(config)
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    total = 0.0
    for name, size in sizes.items():
        share = 1.0
        if name.startswith("mtp/"):
            share = 0.0
        elif name.startswith("embed_tokens/") and not config.tie_word_embeddings:
            share = rows / config.vocab_size
        elif "/experts/" in name:
            moe = config.moe
            share = 1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** rows
        total += share * size
    cache = jax.eval_shape(lambda: init_cache(config, rows, filled, jnp.float32))
    total += sum(leaf.size for leaf in jax.tree.leaves(cache.layers))
    return 4 * total


_MOE, _HYBRID = "configs/benchmark/qwen3_30b_a3b_4_layers", "configs/benchmark/qwen3_next_4_layers"
# What the README's table is of.
TABLE = (
    Work(
        "0.6B",
        "qwen3-0.6b",
        steps=32,
        aims=((PREFILL, Aim(1.4, 0.75)), (DECODE, Aim(1.8, 0.8))),
    ),
    Work("0.6B in 8 rows", "qwen3-0.6b", rows=8, aims=((DECODE, Aim(1.8)),)),
    Work("0.6B long", "qwen3-0.6b", length=4096, steps=0, aims=((PREFILL, Aim(1.6, 0.75)),)),
    Work(
        "train",
        "configs/benchmark/train_step",
        "train",
        rows=4,
        aims=((TRAIN, Aim(1.3)),),
    ),
    Work("30B-A3B of 4 layers", _MOE, length=256, aims=((PREFILL, Aim(1.5)), (DECODE, Aim(1.2)))),
    Work("Next of 4 layers", _HYBRID, length=1024, aims=((PREFILL, Aim(2.0)), (DECODE, Aim(1.5)))),
    Work("0.6B start", "qwen3-0.6b", "start", length=64, aims=((START, Aim(1 / 0.7)),)),
)
