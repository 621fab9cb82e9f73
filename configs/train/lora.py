"""Adapters on chats, beside frozen weights, which may be packed.

    python -m tools.train --config=configs/train/lora.py:chats.jsonl --workdir=runs/lora
    python -m tools.generate --model=Qwen/Qwen3-0.6B --adapter=mine=runs/lora/adapter \\
        --use_adapter=mine --chat --prompt="Hello"

As `sft.py`, with adapters of rank 16 on every linear layer of the layers: `loss` ends near that of
all parameters trained. One device of 8 GB or more. Of a checkpoint that
`tools.convert --quantize=int4` wrote, --config.packed=True keeps the weights in 4 bits (QLoRA).

Small, on two cores, behind the last stage of `pretrain.py`:

    python -m tools.train --config=configs/train/lora.py:small --workdir=runs/small/lora

Two minutes; `eval_loss` falls from 2.09 at step 50 to 1.75 at 200, above that of `sft.py:small`.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.train import sft
from configs.train.recipe import split
from qwen_jax.training.lora import LoraOptions

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def get_config(argument: str = "chats.jsonl") -> ConfigDict:
    """The run's settings; `argument` is the file that is learned, or "small"."""
    config = sft.get_config(argument)
    config.lora = dataclasses.asdict(LoraOptions(rank=16, alpha=32, targets=TARGETS))
    config.packed = False
    config.optimiser.learning_rate = 5e-3 if split(argument)[1] else 2e-4
    # The base is not stacked anew in each step.
    config.step.scan = False
    return config
