"""Supervised fine-tuning on chats, packed into rows.

    python -m tools.train --config=configs/train/sft.py:chats.jsonl --workdir=runs/sft

`chats.jsonl` has a conversation a line: {"messages": [{"role": "user", "content": "..."}, ...]}.
What the assistant says is learned, its thinking and tool calls included. Made for one device of
24 GB or more (0.6 B parameters: float32 masters, AdamW's moments and gradients take 10 GB); spread
over several with --config.mesh=fsdp:4. `loss` should fall in the first tens of steps by a fifth or
more, to what the data leave open, and stay level after; where it rises again in evaluations, stop.

Small, on two cores, behind the last stage of `pretrain.py`:

    python -m tools.train --config=configs/train/sft.py:small --workdir=runs/small/sft

Two minutes; `eval_loss`, of answers to held-out problems, went from 1.51 at step 50 to 1.23.
"""

from ml_collections import ConfigDict

from configs.train.recipe import SMALL_STEP, recipe, small_data, small_model, split
from qwen_jax.training.data import DataOptions, SourceOptions
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.report import ReportOptions
from qwen_jax.training.step_options import TrainOptions


def get_config(argument: str = "chats.jsonl") -> ConfigDict:
    """The run's settings; `argument` is the file that is learned, or "small"."""
    words, is_small = split(argument)
    if is_small:
        return recipe(
            model=small_model("long"),
            optimiser=OptimiserOptions(learning_rate=2e-3, warmup_steps=20, weight_decay=0.0),
            step=SMALL_STEP,
            loop=LoopOptions(num_steps=200, checkpoint_every=100, eval_every=50),
            report=ReportOptions(every=10),
            **small_data({"chats": None}, length=512, batch_size=4),
        )
    return recipe(
        model="Qwen/Qwen3-0.6B",
        data=DataOptions(sources=(SourceOptions(",".join(words)),), length=4096, batch_size=8),
        optimiser=OptimiserOptions(learning_rate=1e-5, warmup_steps=20, weight_decay=0.0),
        step=TrainOptions(),
        loop=LoopOptions(num_steps=500),
        report=ReportOptions(),
    )
