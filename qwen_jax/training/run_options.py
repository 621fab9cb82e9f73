"""The settings of a whole run: a value that a configuration file fills in."""

import dataclasses

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.training.checks import SEED, Bounds, check_fields
from qwen_jax.training.data import DataOptions
from qwen_jax.training.distillation import DistillationOptions
from qwen_jax.training.grpo import GrpoOptions
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.lora import LoraOptions
from qwen_jax.training.optimisers import OptimiserOptions
from qwen_jax.training.preference import PreferenceOptions
from qwen_jax.training.report import ReportOptions
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.upcycle import UpcycleOptions

# Each makes something else small than the next token's cross entropy.
OBJECTIVES = ("preference", "distillation", "grpo")


@dataclasses.dataclass(frozen=True)
class ConfigChanges:
    """What a run changes of its model's config.json, before it trains; None leaves it.

    Attributes:
      rope_theta: base of RoPE's wavelengths; more of it for longer texts (arXiv 2309.16039).
      max_position_embeddings: the length that the model declares, in tokens.
      renormalise: whether the chosen experts' probabilities are divided by their sum.
      score_bias: whether each expert has a bias that takes part in the choice alone, for
        `step.balance.bias_rate` to move; it begins with 0.

    Raises:
      UserError: a value that none of these can have.
    """

    rope_theta: float | None = None
    max_position_embeddings: int | None = None
    renormalise: bool | None = None
    score_bias: bool | None = None

    def __post_init__(self):
        some = Bounds(above=0)
        check_fields(self, rope_theta=some, max_position_embeddings=some)

    def of(self, config: ModelConfig) -> ModelConfig:
        """`config` with the changes."""
        if self.rope_theta is not None:
            rope = dataclasses.replace(config.rope, theta=self.rope_theta)
            config = dataclasses.replace(config, rope=rope)
        if self.max_position_embeddings is not None:
            length = self.max_position_embeddings
            config = dataclasses.replace(config, max_position_embeddings=length)
        asked = {name: getattr(self, name) for name in ("renormalise", "score_bias")}
        changed = {name: value for name, value in asked.items() if value is not None}
        if changed and config.moe is None:
            raise UserError(f"changes.{next(iter(changed))}: the model has no experts")
        if changed:
            moe = dataclasses.replace(config.moe, **changed)
            config = dataclasses.replace(config, moe=moe)
        return config


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """A run.

    Attributes:
      model: a checkpoint directory or hub id to begin with; with `from_scratch` one whose
        config.json is taken alone, or None where a config is given.
      data: what is learned.
      loop: how long.
      optimiser: how gradients become updates.
      step: how a step computes.
      report: what is told.
      eval_data: of which the loss is taken, as `loop.eval_every` says; all of it, so that `epochs`
        must be 1.
      lora: adapters to train in place of the parameters; None to train those.
      preference: learns which of two answers is better, of data in pairs; None for no such thing.
        The reference is the model that the run began with.
      distillation: learns what a teacher predicts, of any data; None for no such thing.
      grpo: learns from rewards of its own answers to prompts; None for no such thing. One of these
        three at most; with none, the next token is learned. A step of the loop is then a rollout
        with its updates, and evaluations are of one greedy answer to each prompt; they have no
        loss, so that of checkpoints the newest stay alone.
      upcycle: makes a model with experts of the dense `model` first; None to leave it dense.
      changes: of the model's config; None for none.
      from_scratch: whether the parameters are drawn from `seed`.
      tokenizer: a directory or hub id; None for the model's.
      packed: whether a quantised checkpoint stays packed, below adapters.
      mesh: such as "fsdp:4,tensor:2"; None for one device.
      seed: of what is drawn: parameters, adapters, experts.

    Raises:
      UserError: settings that do not go together.
    """

    data: DataOptions
    loop: LoopOptions
    model: str | None = None
    optimiser: OptimiserOptions = dataclasses.field(default_factory=OptimiserOptions)
    step: TrainOptions = dataclasses.field(default_factory=TrainOptions)
    report: ReportOptions = dataclasses.field(default_factory=ReportOptions)
    eval_data: DataOptions | None = None
    lora: LoraOptions | None = None
    preference: PreferenceOptions | None = None
    distillation: DistillationOptions | None = None
    grpo: GrpoOptions | None = None
    upcycle: UpcycleOptions | None = None
    changes: ConfigChanges | None = None
    from_scratch: bool = False
    tokenizer: str | None = None
    packed: bool = False
    mesh: str | None = None
    seed: int = 0

    def __post_init__(self):
        check_fields(self, seed=SEED)
        if self.model is None and not self.from_scratch:
            raise UserError("model is missing; name a checkpoint, or set from_scratch")
        if self.model is None and self.tokenizer is None:
            raise UserError("tokenizer is missing; name a checkpoint that has one")
        if self.packed and self.lora is None:
            raise UserError("packed: packed weights have no gradients; give lora, or leave it out")
        if self.loop.eval_every and self.eval_data is None:
            raise UserError(f"loop.eval_every = {self.loop.eval_every} needs eval_data")
        if self.eval_data is not None and self.eval_data.epochs != 1:
            raise UserError(f"eval_data.epochs = {self.eval_data.epochs} must be 1")
        chosen = [name for name in OBJECTIVES if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)}: a run has one objective; leave one out")
        self._check_together()

    def _check_together(self) -> None:
        reasons = {
            ("lora", "from_scratch"): "adapters are beside weights that are learned",
            ("preference", "from_scratch"): "there is no model yet whose answers could be compared",
            ("grpo", "from_scratch"): "there is no model yet that could answer",
            ("upcycle", "from_scratch"): "there is no dense model yet to cut experts of",
            ("lora", "upcycle"): "adapters belong to a checkpoint, and that one has no experts",
            ("lora", "changes"): "adapters belong to a checkpoint, and that one keeps its config",
        }
        for (one, other), reason in reasons.items():
            if self._asks_for(one) and self._asks_for(other):
                raise UserError(f"{one} with {other}: {reason}; leave one out")

    def _asks_for(self, name: str) -> bool:
        return getattr(self, name) not in (None, False, ConfigChanges())
