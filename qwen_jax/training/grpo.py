"""Group relative policy optimisation (GRPO; arXiv 2402.03300, 2501.12948): the loss of answers.

Each prompt has a group of answers. An answer's advantage is its reward beside its group's mean; the
probability of its tokens is raised or lowered accordingly, within a clip, and held near a
reference. `rollouts` writes and judges the answers, `grpo_step` makes updates of them.
"""

import dataclasses
from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.training.balancing import RouterSums
from qwen_jax.training.batch import Batch, targets_of
from qwen_jax.training.checks import Bounds, check_fields
from qwen_jax.training.log_probs import score
from qwen_jax.training.objective import (
    Metrics,
    Objective,
    ahead_of,
    router_loss,
    router_metrics,
    share,
)
from qwen_jax.training.rewards import RewardOptions
from qwen_jax.training.stacking import Params
from qwen_jax.training.step_options import TrainOptions

Aggregation = Literal["sequence", "token", "fixed"]
CutAnswers = Literal["zero", "judge", "mask"]
# Beside a group's standard deviation, so that one reward apart is not divided by nothing.
_LEAST_STD = 1e-4


@dataclasses.dataclass(frozen=True)
class GrpoOptions:
    """How a model learns from rewards of its own answers.

    Attributes:
      rewards: whose weighted sum an answer is worth.
      group_size: answers to each prompt; `data.batch_size` counts answers.
      max_new_tokens: of an answer; of `data.length` the rest is for the prompt.
      temperature: of the draws, and that log-probabilities are taken at.
      top_p: of the draws alone: log-probabilities are of the whole vocabulary, so that below 1
        the answers are not quite the policy's.
      write_batch: answers that are written at once; None for all of a batch.
      cut_answers: of those that have not ended after `max_new_tokens`. "zero": their rewards are 0;
        "judge": their rewards are those of what is there; "mask": the same, and their tokens are
        not learned (DAPO's overlong filtering).
      updates: made of the same answers, one after another.
      clip_low, clip_high: how far a token's probability may fall or rise, as a share, before it is
        left alone; a higher `clip_high` lets rare tokens rise (DAPO, arXiv 2503.14476).
      kl: coefficient of the divergence from the model that the run began with; 0 for none, which
        spares that model's copy.
      normalise: whether advantages are divided by their group's standard deviation, or not (Dr.
        GRPO, arXiv 2503.20783).
      aggregation: "sequence": the mean over answers of each answer's mean over its tokens (GRPO);
        "token": the mean over all tokens (DAPO); "fixed": the sum over tokens divided by answers
        times `max_new_tokens` (Dr. GRPO).

    Raises:
      UserError: a value that none of these can have.
    """

    rewards: tuple[RewardOptions, ...] = (RewardOptions("exact"),)
    group_size: int = 8
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    write_batch: int | None = None
    cut_answers: CutAnswers = "zero"
    updates: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0
    normalise: bool = True
    aggregation: Aggregation = "token"

    def __post_init__(self):
        if not self.rewards:
            raise UserError("rewards is empty; give at least one")
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise UserError(f"rewards names {', '.join(names)}; give each once, with its weight")
        some = Bounds(least=1)
        check_fields(
            self,
            group_size=Bounds(least=2),
            max_new_tokens=some,
            # At 0 the answers of a group would not differ.
            temperature=Bounds(above=0),
            top_p=Bounds(above=0, most=1),
            write_batch=some,
            cut_answers=get_args(CutAnswers),
            updates=some,
            clip_low=Bounds(above=0, below=1),
            clip_high=Bounds(above=0),
            kl=Bounds(least=0),
            aggregation=get_args(Aggregation),
        )


@flax.struct.dataclass
class Answers:
    """What an update learns from.

    Attributes:
      batch: of [B, T], each row a prompt and an answer; loss weights are 1 at the answer's tokens
        that are learned.
      advantages: float32 [B].
      old: float32 [B, T], the log-probabilities of each token's successor before the first update,
        as `log_probs.score` has them; None where this is the first.
      reference: the same of the reference; None where `kl` is 0.
    """

    batch: Batch
    advantages: jax.Array
    old: jax.Array | None = None
    reference: jax.Array | None = None


@flax.struct.dataclass
class GrpoSums:
    """What answers add up to, float32 [] each but for the routers'.

    Attributes:
      answers: with tokens that are learned.
      tokens: that are learned.
      by_token, by_answer: the loss, of tokens and of answers' means.
      kl, clipped, surprise: of tokens; the last is minus the log-probability.
      router: of the sparse layers; None without experts.
    """

    answers: jax.Array
    tokens: jax.Array
    by_token: jax.Array | float = 0.0
    by_answer: jax.Array | float = 0.0
    kl: jax.Array | float = 0.0
    clipped: jax.Array | float = 0.0
    surprise: jax.Array | float = 0.0
    router: RouterSums | None = None


def advantages_of(rewards: np.ndarray, normalise: bool = True) -> np.ndarray:
    """Each answer's reward beside its group: float32 [P, G], of rewards [P, G].

    Args:
      rewards: of P prompts, G answers each.
      normalise: whether they are divided by the group's standard deviation (of a sample, with
        G - 1) and 0.0001 more.
    """
    rewards = np.asarray(rewards, np.float64)
    apart = rewards - rewards.mean(axis=1, keepdims=True)
    if normalise:
        apart = apart / (rewards.std(axis=1, ddof=1, keepdims=True) + _LEAST_STD)
    return apart.astype(np.float32)


def token_losses(
    log_probs: jax.Array,
    old: jax.Array,
    reference: jax.Array | None,
    advantages: jax.Array,
    options: GrpoOptions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Equation 3 of arXiv 2402.03300 for each token, as a loss: [B, T] each.

    Args:
      log_probs: [B, T], of tokens by the model that learns.
      old: by the model that wrote them.
      reference: by the reference; None where `options.kl` is 0.
      advantages: [B].
      options: the clip and the divergence's coefficient.

    Returns:
      The losses; the estimates of the divergence (exp(d) - d - 1 with d = reference - log_probs,
      never negative, and the divergence in the mean), 0 without a reference; and whether the clip
      takes the gradient away.
    """
    advantages = advantages[:, None]
    ratio = jnp.exp(log_probs - old)
    clipped = jnp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
    losses = -jnp.minimum(ratio * advantages, clipped * advantages)
    is_clipped = clipped * advantages < ratio * advantages
    kl = jnp.zeros_like(losses)
    if reference is not None:
        apart = reference - log_probs
        kl = jnp.exp(apart) - apart - 1
    return losses + options.kl * kl, kl, is_clipped


def grpo(options: GrpoOptions) -> Objective:
    """The objective of GRPO, of batches that are `Answers`. Nothing beside the model is read.

    Its metrics are "loss", as `options.aggregation` says; "clip_share", of tokens; "entropy", the
    mean of minus the tokens' log-probabilities in nats, an estimate of the policy's; "kl", the mean
    divergence from the reference in nats, where there is one; "tokens", that are learned; and
    `router_metrics`.
    """

    def loss(
        model: Decoder,
        params: Params,
        answers: Answers,
        step: TrainOptions,
        whole: GrpoSums | None = None,
        beside: None = None,
    ) -> tuple[jax.Array, GrpoSums]:
        if options.kl and answers.reference is None:
            raise ValueError("give the reference's log-probabilities: kl is not 0")
        ours = score(model, params, answers.batch, step, options.temperature)
        learned = ours.weights > 0
        # Where nothing is learned there may be no number.
        logs = jnp.where(learned, ours.log_probs, 0)
        old, reference = (
            None if other is None else jnp.where(learned, other, 0)
            for other in (answers.old, answers.reference if options.kl else None)
        )
        old = jax.lax.stop_gradient(logs) if old is None else old
        losses, kl, is_clipped = token_losses(logs, old, reference, answers.advantages, options)

        def total(values: jax.Array) -> jax.Array:
            return jnp.where(learned, values, 0).sum()

        counts = learned.sum(axis=-1)
        means = share(jnp.where(learned, losses, 0).sum(axis=-1), counts)
        sums = GrpoSums(
            answers=(counts > 0).sum(dtype=jnp.float32),
            tokens=counts.sum(dtype=jnp.float32),
            by_token=total(losses),
            by_answer=means.sum(),
            kl=total(kl),
            clipped=total(is_clipped).astype(jnp.float32),
            surprise=-total(logs),
            router=ours.router,
        )
        whole = sums if whole is None else whole
        found = _mean(sums, whole, options)
        return found + router_loss(model, params, ours.router, step, whole.router), sums

    def metrics(model: Decoder, sums: GrpoSums, step: TrainOptions) -> Metrics:
        found = {
            "loss": _mean(sums, sums, options),
            "clip_share": share(sums.clipped, sums.tokens),
            "entropy": share(sums.surprise, sums.tokens),
            "tokens": sums.tokens,
        }
        if options.kl:
            found["kl"] = share(sums.kl, sums.tokens)
        return found | router_metrics(model, sums.router, step)

    return Objective(loss, ahead_of(_count, lambda answers: answers.batch), metrics)


def _mean(sums: GrpoSums, whole: GrpoSums, options: GrpoOptions) -> jax.Array:
    match options.aggregation:
        case "sequence":
            return share(sums.by_answer, whole.answers)
        case "token":
            return share(sums.by_token, whole.tokens)
        case "fixed":
            return share(sums.by_token, whole.answers * options.max_new_tokens)


def _count(answers: Answers) -> GrpoSums:
    counts = (targets_of(answers.batch, 1)[1][0] > 0).sum(axis=-1)
    return GrpoSums(
        answers=(counts > 0).sum(dtype=jnp.float32), tokens=counts.sum(dtype=jnp.float32)
    )
