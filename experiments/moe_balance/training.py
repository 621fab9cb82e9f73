"""Small Qwen3-MoE models, trained as an arm says: all on the same texts in the same order.

Arms of the same sizes begin with the same parameters, so that what differs at the end is the arm's
doing, and noise.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.initial import draw_params
from experiments.moe_balance.arms import MICROBATCH_ROWS, Arm, Experts, Phase
from experiments.moe_balance.domains import VOCAB_SIZE, TrainingBatches
from experiments.workers import is_worker
from qwen_jax.config import LayerKind, ModelConfig, MoeSpec
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.training.checkpoints import Checkpoints
from qwen_jax.training.loop import LoopOptions, train
from qwen_jax.training.optimisers import OptimiserOptions, make_optimiser
from qwen_jax.training.report import Lines, ReportOptions, Sink, open_sinks
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.train_step import TrainState, TrainStep, init_train_state, make_train_step
from qwen_jax.training.upcycle import UpcycleOptions, upcycle
from tools import command_line

# Steps that a line of a run's log is the mean of.
LOG_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the models, and how long they are trained.

    Attributes:
      steps: of training.
      hidden_size: D, of four heads.
      layers: how many, all with experts.
      length: of a row, in tokens.
    """

    steps: int = 500
    hidden_size: int = 48
    layers: int = 2
    length: int = 32

    def __post_init__(self):
        if self.hidden_size % 8:
            raise UserError(
                f"--hidden_size={self.hidden_size}: four heads have an even number of channels "
                "each; give a multiple of 8"
            )

    def config(self, experts: Experts, score_bias: bool = False) -> ModelConfig:
        """Of a model with experts."""
        fields = dataclasses.asdict(experts)
        moe = MoeSpec(layers=tuple(range(self.layers)), score_bias=score_bias, **fields)
        return ModelConfig(
            family="qwen3_moe",
            vocab_size=VOCAB_SIZE,
            hidden_size=self.hidden_size,
            intermediate_size=experts.intermediate_size,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=self.hidden_size // 4,
            layer_types=(LayerKind.FULL_ATTENTION,) * self.layers,
            max_position_embeddings=self.length,
            tie_word_embeddings=True,
            qk_norm=True,
            moe=moe,
            dtype="float32",
        )

    def dense_config(self, experts: Experts) -> ModelConfig:
        """Of the model whose feed-forward blocks are as wide as a token's experts together."""
        width = experts.num_experts_per_tok * experts.intermediate_size
        config = self.config(experts)
        return dataclasses.replace(config, family="qwen3", moe=None, intermediate_size=width)

    @property
    def optimiser(self) -> OptimiserOptions:
        """Of all arms."""
        return OptimiserOptions(
            learning_rate=4e-3,
            schedule="cosine",
            warmup_steps=self.steps // 10,
            final_learning_rate=0.05,
            weight_decay=0.1,
            b2=0.95,
        )


@dataclasses.dataclass(frozen=True)
class _Part:
    """Batches from one on, by their number, for grain."""

    batches: TrainingBatches
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return self.batches[self.start + number]


# Of a run's directory, the step and the parameters, figures for the run's log.
Evaluate = Callable[[Path, int, Any], dict[str, float]]


def config_of(sizes: Sizes, arm: Arm) -> ModelConfig:
    """Of the model that an arm ends with."""
    return sizes.config(arm.experts, bool(arm.balance.bias_rate))


def begin(sizes: Sizes, arm: Arm, seed: int) -> Any:
    """The parameters that an arm begins with; of one that is upcycled, those of the dense model."""
    dense = arm.phases[0].balance is None
    config = sizes.dense_config(arm.experts) if dense else config_of(sizes, arm)
    return draw_params(config, jax.random.key(seed))


def train_arm(
    workdir: Path, sizes: Sizes, arm: Arm, seed: int, evaluate: Evaluate, every: int
) -> Any:
    """The parameters that an arm ends with; what is there of it is gone on from.

    Args:
      workdir: that holds all runs; those of phases that arms have in common are made once.
      sizes: of the models.
      arm: what is trained.
      seed: of parameters and texts.
      evaluate: measures parameters on the way, before the first step and at the end of each phase
        too; of phases that were made before it is not called.
      every: steps between evaluations.
    """
    state: TrainState | None = None
    before: Phase | None = None
    for phase, directory, start, stop in phases_of(workdir, sizes, arm, seed):
        if phase.balance is None:
            config, options = sizes.dense_config(arm.experts), _options(None, phase.router)
        else:
            config, options = config_of(sizes, arm), _options(phase.balance, phase.router)
        model = Decoder(config)
        step, optimiser = _step(config, options, sizes)
        if state is None:
            state = init_train_state(model, optimiser, params=begin(sizes, arm, seed))
        elif phase.balance is not None and before.balance is None:
            state = _upcycled(sizes, arm, state, optimiser, seed)
        batches = TrainingBatches(seed, sizes.steps, MICROBATCH_ROWS, sizes.length)
        measure = None
        if phase.balance is not None:
            measure = functools.partial(_of_state, evaluate, directory)
            # Experts that are cut of a dense model begin in the middle.
            if (before is None or before.balance is None) and not directory.exists():
                measure(state)
        state = _train(step, state, _Part(batches, start, stop), directory, measure, every)
        before = phase
    return state.to_run()


def _of_state(evaluate: Evaluate, directory: Path, state: TrainState) -> dict[str, float]:
    # The loop counts the steps of a phase, the state those of the arm.
    return evaluate(directory, int(state.step), state.to_run())


def phases_of(
    workdir: Path, sizes: Sizes, arm: Arm, seed: int
) -> Iterator[tuple[Phase, Path, int, int]]:
    """Each phase of an arm, the directory of its run, and its first and last step."""
    start = 0
    for number, phase in enumerate(arm.phases):
        stop = round(sizes.steps * phase.until)
        yield phase, _directory(workdir, arm, number, seed), start, stop
        start = stop


def _directory(workdir: Path, arm: Arm, number: int, seed: int) -> Path:
    """Of one phase of an arm. Phases before the last are called by what is done in all up to it."""
    models = workdir / "models" / f"seed_{seed}"
    if number == len(arm.phases) - 1:
        return models / re.sub(r"[^\w.]+", "_", arm.name)
    known = repr((arm.experts, arm.phases[: number + 1]))
    return models / f"until_{hashlib.sha256(known.encode()).hexdigest()[:12]}"


def _options(balance: Any, router: Any) -> TrainOptions:
    more = {} if balance is None else {"balance": balance, "router": router}
    return TrainOptions(dtype="float32", scan=False, remat="none", **more)


@functools.cache
def _step(
    config: ModelConfig, options: TrainOptions, sizes: Sizes
) -> tuple[TrainStep, optax.GradientTransformation]:
    """Compiled once for all seeds."""
    optimiser = make_optimiser(sizes.optimiser, sizes.steps, parameter_shapes(config))
    return make_train_step(Decoder(config), optimiser, options), optimiser


def _upcycled(
    sizes: Sizes,
    arm: Arm,
    dense: TrainState,
    optimiser: optax.GradientTransformation,
    seed: int,
) -> TrainState:
    """The state of a model with experts out of a dense one's, at the same step."""
    fields = dataclasses.asdict(arm.experts)
    config, params = upcycle(
        sizes.dense_config(arm.experts),
        dense.to_run(),
        UpcycleOptions(**fields),
        jax.random.key(seed),
    )
    state = init_train_state(Decoder(config), optimiser, params=params)
    # Moments belong to parameters that are no more; the learning rate goes on.
    opt_state = optax.tree.set(state.opt_state, count=dense.step)
    # Steps take over the memory of each array, which no two may share.
    return jax.tree.map(jnp.copy, state.replace(step=dense.step, opt_state=opt_state))


def _train(
    step: TrainStep,
    state: TrainState,
    batches: _Part,
    directory: Path,
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    every: int,
) -> TrainState:
    steps = len(batches)

    def sinks(start: int) -> list[Sink]:
        if is_worker():
            return [Lines(directory, start)]
        return open_sinks(directory, ReportOptions(), start, steps, {})

    with Checkpoints(directory, keep=1) as checkpoints:
        state, done = train(
            step,
            state,
            iter(grain.MapDataset.source(batches).to_iter_dataset()),
            LoopOptions(num_steps=steps, eval_every=every if evaluate else 0),
            checkpoints,
            sinks,
            evaluate=evaluate,
            every=LOG_EVERY,
        )
    # What comes next would take a model for what it is not yet.
    command_line.leave_if_stopped(done, steps)
    return state
