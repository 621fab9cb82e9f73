"""Pretraining in Qwen3's three stages (arXiv 2505.09388, section 3.2) and on to 256k tokens.

    python -m tools.train --config=configs/train/pretrain.py:general --workdir=runs/general
    python -m tools.train --config=configs/train/pretrain.py:reasoning --workdir=runs/reasoning
    python -m tools.train --config=configs/train/pretrain.py:long --workdir=runs/long
    python -m tools.train --config=configs/train/pretrain.py:64k --workdir=runs/64k
    python -m tools.train --config=configs/train/pretrain.py:128k --workdir=runs/128k
    python -m tools.train --config=configs/train/pretrain.py:256k --workdir=runs/256k

General texts in rows of 4,096 tokens; then mostly mathematics, science, code and synthetic
reasoning; then long texts in rows of 32,768, three quarters of them from 16,384 tokens on, with
RoPE's base raised from 10,000 to 1,000,000. The stages behind it are Qwen2.5-1M's (arXiv
2501.15383): rows of 65,536, 131,072 and 262,144 tokens with bases of 1, 5 and 10 million, three
quarters of them texts of the stage's length and the rest those of the stage before. What each stage
brings is told by

    python -m experiments.long_context --model=runs/64k/model --tasks=ruler \\
        --lengths=32k,64k,128k --workdir=results/64k

Base and length are in the config.json of what a stage leaves. The data are directories that
`tools.prepare_data` made, mixed by weight: data/general, data/code, data/reasoning, data/long,
data/medium, data/64k, data/128k, data/256k. The model has Qwen3-0.6B's sizes; another is
--config.preset=qwen3-4b-base in the first stage.

Made for 16 accelerators of 80 GB or more: --config.mesh=fsdp:16, and from the long stage on
--config.mesh=fsdp:4,context:4. Qwen3 read 30 trillion tokens, 5 trillion and some hundred billion;
the steps here are 52, 10 and 2 billion, to be raised by --config.loop.num_steps. Not run at this
size; watch `loss` fall and `grad_norm` stay below 1.

Small, on two cores, behind `python -m tools.build_samples --workdir=runs/small`:

    python -m tools.train --config=configs/train/pretrain.py:general,small \\
        --workdir=runs/small/general
    python -m tools.train --config=configs/train/pretrain.py:reasoning,small \\
        --workdir=runs/small/reasoning
    python -m tools.train --config=configs/train/pretrain.py:long,small --workdir=runs/small/long

One to two minutes each. `eval_loss` falls from ln 768 = 6.6 to 1.81 in the first stage, to 1.52 on
texts with steps in the second, and to 1.77 on texts four times as long in the third.
"""

import dataclasses

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
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.report import ReportOptions
from qwen_jax.training.run_options import ConfigChanges
from qwen_jax.training.step_options import TrainOptions


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      before: the stage that it goes on from; None for none.
      sources: directories of data by their share of the rows.
      length: tokens of a row.
      rows: of a batch.
      rope_theta: base of RoPE's wavelengths.
      learning_rate: at its highest.
      num_steps: updates.
    """

    before: str | None
    sources: dict[str, float]
    length: int
    rows: int
    rope_theta: float
    learning_rate: float
    num_steps: int


STAGES = {
    "general": Stage(None, {"general": 0.8, "code": 0.2}, 4096, 256, 1e4, 1e-3, 50_000),
    "reasoning": Stage("general", {"reasoning": 0.7, "general": 0.3}, 4096, 256, 1e4, 5e-4, 10_000),
    "long": Stage("reasoning", {"long": 0.75, "medium": 0.25}, 32768, 32, 1e6, 1e-4, 2_000),
    "64k": Stage("long", {"64k": 0.75, "long": 0.25}, 65536, 16, 1e6, 5e-5, 1_000),
    "128k": Stage("64k", {"128k": 0.75, "64k": 0.25}, 131072, 16, 5e6, 3e-5, 500),
    "256k": Stage("128k", {"256k": 0.75, "128k": 0.25}, 262144, 16, 1e7, 2e-5, 250),
}
# Lengths are divided by 16 and 32, and the texts of the last three are those of the long one.
SMALL_STAGES = {
    "general": Stage(None, {"general": 1.0}, 256, 8, 1e4, 4e-3, 200),
    "reasoning": Stage("general", {"reasoning": 0.7, "general": 0.3}, 256, 8, 1e4, 2e-3, 200),
    "long": Stage("reasoning", {"long": 0.75, "reasoning": 0.25}, 1024, 2, 1e6, 1e-3, 80),
    "64k": Stage("long", {"long": 0.75, "reasoning": 0.25}, 2048, 1, 1e6, 5e-4, 40),
    "128k": Stage("64k", {"long": 0.75, "reasoning": 0.25}, 4096, 1, 5e6, 3e-4, 20),
    "256k": Stage("128k", {"long": 0.75, "reasoning": 0.25}, 8192, 1, 1e7, 2e-4, 20),
}


def get_config(argument: str = "general") -> ConfigDict:
    """The run's settings; `argument` is a stage, and "small" behind a comma for two cores."""
    (name,), is_small = split(argument, tuple(STAGES))
    stage = (SMALL_STAGES if is_small else STAGES)[name]
    parts = {
        "changes": ConfigChanges(stage.rope_theta, stage.length),
        "optimiser": OptimiserOptions(
            learning_rate=stage.learning_rate,
            schedule="wsd",
            warmup_steps=stage.num_steps // 20,
            decay_steps=stage.num_steps // 5,
            final_learning_rate=0.1,
        ),
        "report": ReportOptions(every=10),
    }
    if is_small:
        parts |= small_data(stage.sources, length=stage.length, batch_size=stage.rows)
        parts["step"] = SMALL_STEP
        parts["loop"] = LoopOptions(stage.num_steps, checkpoint_every=100, eval_every=40)
    else:
        sources = [SourceOptions(f"data/{part}", share) for part, share in stage.sources.items()]
        parts["data"] = DataOptions(tuple(sources), length=stage.length, batch_size=stage.rows)
        parts["step"] = TrainOptions(z_loss=1e-4)
        parts["loop"] = LoopOptions(stage.num_steps, checkpoint_every=1000)
    if stage.before is not None:
        before = small_model(stage.before) if is_small else f"runs/{stage.before}/model"
        return recipe(model=before, **parts)
    if is_small:
        return recipe(model=small_base(), from_scratch=True, **parts)
    preset, tokenizer = "qwen3-0.6b-base", "Qwen/Qwen3-0.6B-Base"
    return recipe(preset=preset, tokenizer=tokenizer, from_scratch=True, **parts)
