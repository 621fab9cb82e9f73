"""Pretraining of a mixture of experts goes on, balanced in another way.

    python -m tools.train --config=configs/train/moe_balance.py:global --workdir=runs/global
    python -m tools.train --config=configs/train/moe_balance.py:micro --workdir=runs/micro
    python -m tools.train --config=configs/train/moe_balance.py:loss_free --workdir=runs/loss_free

The arms are those of `ARMS`; their numbers are --config.step.balance.loss, whose unit is a loss
that is 1 where experts are used evenly, --config.step.balance.bias_rate, and so on. The model is
Qwen3-30B-A3B-Base, another one --config.model=Qwen/Qwen1.5-MoE-A2.7B. The data are directories
that `tools.prepare_data` made: data/general and data/code as in `pretrain.py`, in rows of 4,096
tokens. A micro-batch is 4 rows, as in arXiv 2501.11873. What arms do to a small model is told by
`experiments.moe_balance`.

Made for 64 accelerators of 80 GB, --config.mesh=fsdp:8,expert:8; not run at this size.
`metrics.jsonl` has the routers' figures as means over layers, such as "router/max_vio", and
`router.jsonl` those of all layers, with every expert's load. What each arm has done to
specialisation is told by

    python -m experiments.moe_balance --analyze --model=runs/global/model --domains=texts/ \\
        --workdir=results/global
    python -m experiments.moe_balance --workdir=results/global --compare=results/micro

Small, on two cores, behind `upcycle.py:small`, whose model has 8 experts:

    python -m tools.train --config=configs/train/moe_balance.py:global,small \\
        --workdir=runs/small/global
"""

import dataclasses

from ml_collections import ConfigDict

from configs.train.recipe import SMALL_STEP, recipe, small_data, small_model, split
from qwen_jax.nn.router import Assignment, RouterOptions
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.data import DataOptions, SourceOptions
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.report import ReportOptions
from qwen_jax.training.run_options import ConfigChanges
from qwen_jax.training.step_options import TrainOptions

_ROWS = 4
_LOSS_FREE = {"loss": 0.0, "bias_rate": 1e-3}

# What balances, by the word behind the colon: fields of BalanceOptions.
ARMS: dict[str, dict] = {
    "none": {"loss": 0.0},
    "sequence": {"loss": 0.01, "group": "sequence"},
    "micro": {"loss": 0.01, "group": "micro"},
    "device": {"loss": 0.01, "group": "device"},
    "global": {"loss": 0.01},
    "shuffled": {"loss": 0.01, "group": "shuffled"},
    "buffer": {"loss": 0.01, "group": "buffer"},
    "global_micro": {"loss": 0.01, "complement": 1e-4, "complement_group": "micro"},
    "gshard": {"loss": 0.01, "form": "first"},
    # As transformers has it, with the coefficient of config.json.
    "pooled": {"loss": None, "pooling": "model"},
    "loss_free": _LOSS_FREE,
    "loss_free_proportional": {**_LOSS_FREE, "bias_update": "proportional"},
    # DeepSeek-V3's.
    "loss_free_sequence": {**_LOSS_FREE, "complement": 1e-4},
    "z_loss": {"loss": 0.0, "z_loss": 1e-3},
    "similarity": {"loss": 0.0, "similarity": 0.01},
    "noise": {"loss": 0.0},
    "capacity": {"loss": 0.01},
    "sinkhorn": {"loss": 0.0},
    "base": {"loss": 0.0},
    "expert_choice": {"loss": 0.0},
}
# And how tokens and experts come together, where that is not each token's choice.
ROUTERS = {
    "noise": RouterOptions(noise=0.1),
    "capacity": RouterOptions(capacity_factor=1.25),
    "sinkhorn": RouterOptions(Assignment.SINKHORN),
    "base": RouterOptions(Assignment.BASE, rows=1),
    "expert_choice": RouterOptions(Assignment.EXPERT_CHOICE, rows=1),
}


def get_config(argument: str = "global") -> ConfigDict:
    """The run's settings; `argument` is an arm, such as "micro" or "micro,small"."""
    (arm,), is_small = split(argument, tuple(ARMS))
    options = {
        "balance": BalanceOptions(microbatch_rows=_ROWS, **ARMS[arm]),
        "router": ROUTERS.get(arm, RouterOptions()),
    }
    changes = ConfigChanges(score_bias=True) if ARMS[arm].get("bias_rate") else ConfigChanges()
    if is_small:
        return recipe(
            model=small_model("upcycle"),
            changes=changes,
            optimiser=OptimiserOptions(learning_rate=1e-3, warmup_steps=10),
            step=dataclasses.replace(SMALL_STEP, **options),
            loop=LoopOptions(num_steps=60, checkpoint_every=30, eval_every=30),
            report=ReportOptions(every=10),
            **small_data({"reasoning": None}, length=256, batch_size=8),
        )
    sources = (SourceOptions("data/general", 0.8), SourceOptions("data/code", 0.2))
    return recipe(
        model="Qwen/Qwen3-30B-A3B-Base",
        changes=changes,
        data=DataOptions(sources, length=4096, batch_size=512),
        optimiser=OptimiserOptions(learning_rate=1e-5, warmup_steps=100),
        step=TrainOptions(z_loss=1e-4, **options),
        loop=LoopOptions(num_steps=2000, checkpoint_every=200),
        report=ReportOptions(every=10),
    )
