"""Prompts, a reward that random answers differ in, and the settings of a run of GRPO."""

import dataclasses

from qwen_jax.training.data import DataOptions, SourceOptions
from qwen_jax.training.grpo import GrpoOptions
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.rewards import RewardOptions
from qwen_jax.training.run_options import RunOptions
from qwen_jax.training.step_options import TrainOptions
from tests.training.data.conftest import write_lines

EXACT = TrainOptions(dtype="float32", remat="none", block_size=16)


def vowels(record, text):
    """A reward that random answers differ in."""
    return sum(c in "aeiou" for c in text) / (1 + len(text)) + len(record["answer"])


VOWELS = RewardOptions(f"{__name__}:vowels")
# Random models hardly ever end a text.
OPTIONS = GrpoOptions((VOWELS,), group_size=3, max_new_tokens=7, cut_answers="judge")


def prompt_file(path, count=5):
    rows = [
        {
            "messages": [{"role": "user", "content": "the " * (i % 3) + f"{i}?"}],
            "answer": "x" * i,
            "enable_thinking": i % 2 == 0,
        }
        for i in range(1, count + 1)
    ]
    return write_lines(path, rows)


def run_options(directory, prompts, num_steps=4, **changes):
    source = SourceOptions(prompts)
    data = DataOptions((source,), length=96, batch_size=6, pack=False, threads=0)
    fields = {
        "model": str(directory),
        "data": data,
        "eval_data": dataclasses.replace(data, batch_size=4, epochs=1),
        "grpo": dataclasses.replace(OPTIONS, updates=2, kl=0.1),
        "optimiser": OptimiserOptions(learning_rate=3e-3, schedule="constant", warmup_steps=0),
        "step": EXACT,
        "loop": LoopOptions(num_steps, checkpoint_every=2, eval_every=4),
    }
    return RunOptions(**fields | changes)
