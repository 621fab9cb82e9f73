"""Distillation (arXiv 1503.02531) of a larger checkpoint's predictions into a smaller one.

    python -m tools.train --config=configs/train/distil.py:chats.jsonl --workdir=runs/distil

Qwen3-0.6B learns what Qwen3-4B predicts for each token of the assistant's in `chats.jsonl` (lines
as in `sft.py`; texts work as well). --config.distillation.teacher names another one with the same
vocabulary and tokenizer. The teacher lies beside in bfloat16: one device of 40 GB or more, or
--config.mesh=fsdp:4. `kl`, in nats a token, should halve within some hundred steps.

Small, on two cores, behind `sft.py:small` (a model of two narrow layers learns from it, from
nothing):

    python -m tools.train --config=configs/train/distil.py:small --workdir=runs/small/distil

Two minutes; `eval_kl` falls to 0.14 nats, and `eval_cross_entropy` to 1.38, near the 1.23 that the
teacher itself has.
"""

from ml_collections import ConfigDict

from configs.train.recipe import (
    SMALL_STEP,
    recipe,
    small_base,
    small_data,
    small_model,
    split,
)
from qwen_jax.training.data import DataOptions, SourceOptions
from qwen_jax.training.distillation import DistillationOptions
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.report import ReportOptions
from qwen_jax.training.step_options import TrainOptions


def get_config(argument: str = "chats.jsonl") -> ConfigDict:
    """The run's settings; `argument` is the file that is learned, or "small"."""
    words, is_small = split(argument)
    if is_small:
        return recipe(
            model=small_base("student"),
            from_scratch=True,
            distillation=DistillationOptions(small_model("sft"), dtype="float32", mix=0.9),
            optimiser=OptimiserOptions(learning_rate=6e-3, warmup_steps=20),
            step=SMALL_STEP,
            loop=LoopOptions(num_steps=200, checkpoint_every=100, eval_every=50),
            report=ReportOptions(every=10),
            **small_data({"chats": None}, length=512, batch_size=4),
        )
    sources = (SourceOptions(",".join(words)),)
    return recipe(
        model="Qwen/Qwen3-0.6B",
        distillation=DistillationOptions("Qwen/Qwen3-4B"),
        data=DataOptions(sources, length=4096, batch_size=8),
        optimiser=OptimiserOptions(learning_rate=1e-5, warmup_steps=20, weight_decay=0.0),
        step=TrainOptions(),
        loop=LoopOptions(num_steps=1000),
        report=ReportOptions(),
    )
