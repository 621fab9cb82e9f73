"""Distillation (arXiv 1503.02531): learning from all that a larger checkpoint predicts."""

import dataclasses

import flax.struct
import jax

from qwen_jax.config import HeadKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.models.placement import arrange
from qwen_jax.training.balancing import RouterSums
from qwen_jax.training.batch import Batch, targets_of
from qwen_jax.training.checks import Bounds, check_fields
from qwen_jax.training.divergence import divergence
from qwen_jax.training.forward import as_computed, forward, output_head
from qwen_jax.training.objective import (
    Metrics,
    Objective,
    ahead_of,
    router_loss,
    router_metrics,
    share,
)
from qwen_jax.training.stacking import Params
from qwen_jax.training.step_options import DTYPES, TrainOptions

# In the state's `beside`: the parameters that are learned from.
TEACHER = "teacher"


@dataclasses.dataclass(frozen=True)
class DistillationOptions:
    """What is learned from, and how.

    Attributes:
      teacher: a checkpoint directory or hub id with the model's vocabulary.
      dtype: of the teacher's parameters and activations.
      temperature: that both models' logits are divided by.
      mix: the share of the divergence from the teacher; the rest is the cross entropy of the data.

    Raises:
      UserError: a value that none of these can have.
    """

    teacher: str
    dtype: str = "bfloat16"
    temperature: float = 1.0
    mix: float = 1.0

    def __post_init__(self):
        if not self.teacher:
            raise UserError("teacher is empty; name a checkpoint")
        check_fields(self, dtype=DTYPES, temperature=Bounds(above=0), mix=Bounds(above=0, most=1))


@flax.struct.dataclass
class DistillationSums:
    """What texts add up to, float32 [] each but for the routers'.

    Attributes:
      weights: of the targets.
      total: of what is made small, weighted; without the routers' losses.
      kl, cross_entropy: weighted.
      router: of the sparse layers; None without experts.
    """

    weights: jax.Array
    total: jax.Array | float = 0.0
    kl: jax.Array | float = 0.0
    cross_entropy: jax.Array | float = 0.0
    router: RouterSums | None = None


def distillation(options: DistillationOptions, teacher: Decoder) -> Objective:
    """The objective of distillation from `teacher`, whose parameters are `beside["teacher"]`.

    Its metrics are "loss", `mix * temperature**2 * kl + (1 - mix) * cross_entropy`; "kl" and
    "cross_entropy", means over tokens in nats; "tokens"; and `router_metrics`.
    """

    def loss(
        model: Decoder,
        params: Params,
        batch: Batch,
        step: TrainOptions,
        whole: DistillationSums | None = None,
        beside: dict[str, Params] | None = None,
    ) -> tuple[jax.Array, DistillationSums]:
        check_teacher(model.config, teacher.config)
        step = dataclasses.replace(step, mtp_loss=0.0)
        taught = dataclasses.replace(step, dtype=options.dtype)
        if beside is None or TEACHER not in beside:
            raise ValueError(f"give the teacher: state.replace(beside={{{TEACHER!r}: params}})")
        with jax.named_scope("teacher"):
            known = as_computed(teacher, beside[TEACHER], taught)
            (y,), *_ = forward(teacher, known, batch, taught)
            y, teacher_head = jax.lax.stop_gradient((y, output_head(teacher, known)))
        params = as_computed(model, params, step)
        (x,), tokens, router = forward(model, params, batch, step)
        (targets,), (weights,) = targets_of(batch, 1)
        with jax.named_scope("loss"):
            total, found = divergence(
                x,
                output_head(model, params),
                y,
                teacher_head,
                arrange(tokens, targets),
                arrange(tokens, weights),
                temperature=options.temperature,
                mix=options.mix,
                block_size=step.block_size,
                layout=tokens.layout,
            )
        sums = DistillationSums(weights.sum(), total, **found, router=router)
        whole = sums if whole is None else whole
        mean = share(total, whole.weights)
        return mean + router_loss(model, params, router, step, whole.router), sums

    return Objective(loss, ahead_of(_count), _metrics, of_texts=True)


def check_teacher(config: ModelConfig, teacher: ModelConfig) -> None:
    """Checks that the two predict the same tokens.

    Raises:
      UserError: the teacher predicts others, or none.
    """
    if teacher.head is not HeadKind.VOCABULARY:
        raise UserError(f"the teacher has a {teacher.head.value} head, which predicts no tokens")
    if teacher.vocab_size != config.vocab_size:
        raise UserError(
            f"the teacher's vocab_size = {teacher.vocab_size}, the model's {config.vocab_size}; "
            "take a teacher with the same vocabulary"
        )


def _count(batch: Batch) -> DistillationSums:
    return DistillationSums(targets_of(batch, 1)[1][0].sum())


def _metrics(model: Decoder, sums: DistillationSums, step: TrainOptions) -> Metrics:
    return {
        "loss": share(sums.total, sums.weights),
        "kl": share(sums.kl, sums.weights),
        "cross_entropy": share(sums.cross_entropy, sums.weights),
        "tokens": sums.weights,
        **router_metrics(model, sums.router, step),
    }
