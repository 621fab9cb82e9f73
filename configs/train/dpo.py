"""Preferences by DPO (arXiv 2305.18290), on pairs of answers.

    python -m tools.train --config=configs/train/dpo.py:pairs.jsonl --workdir=runs/dpo
    python -m tools.train --config=configs/train/dpo.py:pairs.jsonl,lora --workdir=runs/dpo-lora

`pairs.jsonl` has a pair a line: {"prompt": [{"role": "user", "content": "..."}], "chosen":
{"role": "assistant", "content": "..."}, "rejected": {...}}. The model is held near where it began:
a copy of it lies beside the training, in the step's dtype; with adapters it is what is below them
and costs nothing. Made for one device of 24 GB or more, or 8 GB with adapters; spread over several
with --config.mesh=fsdp:4. `loss` begins at ln 2 = 0.693, where there is no margin yet; `accuracy`
should pass 0.6 and `margin` rise within some hundred steps. Where `chosen_reward` falls far below
0, --config.preference.sft=0.1 holds the chosen answers up.

Small, on two cores, behind `sft.py:small` (right answers against wrong ones):

    python -m tools.train --config=configs/train/dpo.py:small --workdir=runs/small/dpo
    python -m tools.train --config=configs/train/dpo.py:small,lora --workdir=runs/small/dpo-lora

Under two minutes each. On held-out problems `eval_accuracy` is 0.58 in the end, `eval_margin` 0.04
and `eval_loss` 0.681; with adapters 0.54, 0.08 and 0.667. A model of this size knows few answers.
"""

import dataclasses

from ml_collections import ConfigDict

from configs.train.lora import TARGETS
from configs.train.recipe import SMALL_STEP, recipe, small_data, small_model, split
from qwen_jax.training.data import DataOptions, SourceOptions
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.lora import LoraOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.preference import PreferenceOptions
from qwen_jax.training.report import ReportOptions
from qwen_jax.training.step_options import TrainOptions


def get_config(argument: str = "pairs.jsonl") -> ConfigDict:
    """The run's settings; `argument` is the file of pairs, or "small", and "lora" for adapters."""
    words, is_small = split(argument)
    if is_small:
        config = recipe(
            model=small_model("sft"),
            preference=PreferenceOptions(beta=0.1),
            optimiser=OptimiserOptions(learning_rate=3e-4, warmup_steps=10, weight_decay=0.0),
            step=SMALL_STEP,
            loop=LoopOptions(num_steps=80, checkpoint_every=40, eval_every=20),
            report=ReportOptions(every=5),
            **small_data({"pairs": None}, length=192, batch_size=16, pack=False),
        )
    else:
        pairs = ",".join(word for word in words if word != "lora")
        sources = (SourceOptions(pairs, too_long="truncate"),)
        config = recipe(
            model="Qwen/Qwen3-0.6B",
            preference=PreferenceOptions(beta=0.1),
            data=DataOptions(sources, length=2048, batch_size=32, pack=False),
            optimiser=OptimiserOptions(learning_rate=5e-7, warmup_steps=50, weight_decay=0.0),
            step=TrainOptions(),
            loop=LoopOptions(num_steps=1000),
            report=ReportOptions(),
        )
    if "lora" in words:
        config.lora = dataclasses.asdict(LoraOptions(rank=16, alpha=32, targets=TARGETS))
        config.optimiser.learning_rate = 2e-3 if is_small else 5e-6
        # The base is not stacked anew in each step.
        config.step.scan = False
    return config
