"""A mixture of experts out of a dense checkpoint, as Qwen2's was made (arXiv 2407.10671, 3.1.2).

    python -m tools.train --config=configs/train/upcycle.py --workdir=runs/upcycle

Each feed-forward block of Qwen3-0.6B-Base becomes 32 fine-grained experts of 768 channels, of which
a token goes to 4, as many channels as it had; half of each expert's numbers are drawn anew. Then
pretraining goes on, on data/general and data/code as in `pretrain.py`. 2.6 B parameters, 0.6 B of
them for a token: made for 8 accelerators of 80 GB, --config.mesh=fsdp:4,expert:2. Not run at this
size. `loss` begins well above the dense model's and should fall below it in the end;
`busiest_expert` falls from some to about 1.5 as the experts are balanced.

Small, on two cores, behind the second stage of `pretrain.py`:

    python -m tools.train --config=configs/train/upcycle.py:small --workdir=runs/small/upcycle

Under two minutes; `eval_loss` falls from 1.56 at step 50 to 1.45 at 150, below the 1.52 of the
dense model that it began with.
"""

from ml_collections import ConfigDict

from configs.train.recipe import SMALL_STEP, recipe, small_data, small_model, split
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.data import DataOptions, SourceOptions
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.report import ReportOptions
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.upcycle import UpcycleOptions


def get_config(argument: str = "") -> ConfigDict:
    """The run's settings; `argument` is "small" for two cores."""
    if split(argument)[1]:
        return recipe(
            model=small_model("reasoning"),
            upcycle=UpcycleOptions(8, 2, intermediate_size=176),
            optimiser=OptimiserOptions(learning_rate=2e-3, warmup_steps=10),
            step=SMALL_STEP,
            loop=LoopOptions(num_steps=150, checkpoint_every=50, eval_every=50),
            report=ReportOptions(every=10),
            **small_data({"reasoning": None}, length=256, batch_size=8),
        )
    sources = (SourceOptions("data/general", 0.8), SourceOptions("data/code", 0.2))
    return recipe(
        model="Qwen/Qwen3-0.6B-Base",
        upcycle=UpcycleOptions(32, 4, intermediate_size=768),
        data=DataOptions(sources, length=4096, batch_size=256),
        optimiser=OptimiserOptions(learning_rate=3e-4, warmup_steps=500),
        step=TrainOptions(z_loss=1e-4, balance=BalanceOptions(z_loss=1e-3)),
        loop=LoopOptions(num_steps=20_000, checkpoint_every=1000),
        report=ReportOptions(every=10),
    )
