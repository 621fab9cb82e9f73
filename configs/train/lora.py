"""Adapters on chats, beside frozen weights, which may be packed.

    python -m tools.train --config=configs/train/lora.py:chats.jsonl --workdir=runs/lora
    python -m tools.generate --model=Qwen/Qwen3-0.6B --adapter=mine=runs/lora/adapter \\
        --use_adapter=mine --chat --prompt="Hello"

As `sft.py`, with adapters of rank 16 on every linear layer of the layers. Of a checkpoint that
`tools.convert --quantize=int4` wrote, --config.packed=True keeps the weights in 4 bits (QLoRA).
"""

import dataclasses

from ml_collections import ConfigDict

from configs.train import sft
from qwen_jax.training.lora import LoraOptions

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def get_config(chats: str = "chats.jsonl") -> ConfigDict:
    """The run's settings; `chats` is the file that is learned."""
    config = sft.get_config(chats)
    config.lora = dataclasses.asdict(LoraOptions(rank=16, alpha=32, targets=_TARGETS))
    config.packed = False
    config.optimiser.learning_rate = 2e-4
    # The base is not stacked anew in each step.
    config.step.scan = False
    return config
