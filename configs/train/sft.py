"""Supervised fine-tuning on chats, packed into rows.

    python -m tools.train --config=configs/train/sft.py:chats.jsonl --workdir=runs/sft

`chats.jsonl` has a conversation a line: {"messages": [{"role": "user", "content": "..."}, ...]}.
What the assistant says is learned, its thinking and tool calls included. Made for one device of
24 GB or more (0.6 B parameters: float32 masters, AdamW's moments and gradients take 10 GB); spread
over several with --config.mesh=fsdp:4.
"""

import dataclasses

from ml_collections import ConfigDict

from qwen_jax.training.data import DataOptions, SourceOptions
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.report import ReportOptions
from qwen_jax.training.step_options import TrainOptions


def get_config(chats: str = "chats.jsonl") -> ConfigDict:
    """The run's settings; `chats` is the file that is learned."""
    parts = {
        "data": DataOptions(sources=(SourceOptions(chats),), length=4096, batch_size=8),
        "optimiser": OptimiserOptions(learning_rate=1e-5, warmup_steps=20, weight_decay=0.0),
        "step": TrainOptions(),
        "loop": LoopOptions(num_steps=500),
        "report": ReportOptions(),
    }
    return ConfigDict(
        {
            "model": "Qwen/Qwen3-0.6B",
            "mesh": None,
            "seed": 0,
            **{name: dataclasses.asdict(part) for name, part in parts.items()},
        }
    )
