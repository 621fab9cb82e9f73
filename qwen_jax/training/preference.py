"""Direct Preference Optimisation (arXiv 2305.18290): learning which of two answers is better."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.low_rank import detach, low_rank_weights
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
from qwen_jax.training.stacking import Params
from qwen_jax.training.step_options import TrainOptions

# In the state's `beside`: the parameters that answers are compared with.
REFERENCE = "reference"


@dataclasses.dataclass(frozen=True)
class PreferenceOptions:
    """How pairs of answers are learned.

    Attributes:
      beta: how far the model may go from its reference; less goes further.
      label_smoothing: the probability that a pair's answers were swapped (conservative DPO).
      sft: coefficient of the chosen answers' mean cross entropy, which keeps them likely.

    Raises:
      UserError: a value that none of these can have.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    sft: float = 0.0

    def __post_init__(self):
        check_fields(
            self,
            beta=Bounds(above=0),
            label_smoothing=Bounds(least=0, below=0.5),
            sft=Bounds(least=0),
        )


@flax.struct.dataclass
class PreferenceSums:
    """What pairs add up to, float32 [] each but for the routers'.

    Attributes:
      pairs: how many.
      loss: of each pair.
      correct: of how many the chosen answer has the higher reward.
      chosen, rejected: rewards, beta times how much likelier the model makes an answer than the
        reference does.
      tokens: of all answers.
      chosen_tokens, cross_entropy: of the chosen answers.
      router: of the sparse layers; None without experts.
    """

    pairs: jax.Array
    loss: jax.Array | float = 0.0
    correct: jax.Array | float = 0.0
    chosen: jax.Array | float = 0.0
    rejected: jax.Array | float = 0.0
    tokens: jax.Array | float = 0.0
    chosen_tokens: jax.Array | float = 0.0
    cross_entropy: jax.Array | float = 0.0
    router: RouterSums | None = None


def preference(options: PreferenceOptions) -> Objective:
    """The objective of DPO.

    Batches are a `Batch` of [P, 2, T]: the prompt with the chosen answer, and with the rejected
    one; loss weights are 1 at answers. A mesh and microbatches split P, so that pairs stay whole.
    The reference is `beside["reference"]`, or where that is not there and the parameters have
    adapters, what is below those.

    Its metrics are "loss", the mean over pairs; "accuracy", the share of pairs whose chosen answer
    has the higher reward; "margin", "chosen_reward" and "rejected_reward", means; "sft_loss", the
    chosen answers' mean cross entropy; "tokens", of answers; and `router_metrics`.
    """

    def loss(
        model: Decoder,
        params: Params,
        batch: Batch,
        step: TrainOptions,
        whole: PreferenceSums | None = None,
        beside: dict[str, Params] | None = None,
    ) -> tuple[jax.Array, PreferenceSums]:
        rows = _rows(batch)
        ours = score(model, params, rows, step)
        reference = score(model, reference_of(params, beside), rows, step)
        reference = jax.lax.stop_gradient(reference.log_probs)
        pairs = (*batch.input_ids.shape[:2], -1)
        weights = ours.weights.reshape(pairs)
        ratios = (ours.log_probs - reference).reshape(pairs)
        rewards = options.beta * jnp.where(weights > 0, weights * ratios, 0).sum(axis=-1)
        margin = rewards[:, 0] - rewards[:, 1]
        right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
        smoothing = options.label_smoothing
        losses = -(1 - smoothing) * right - smoothing * wrong
        chosen, logs = weights[:, 0], ours.log_probs.reshape(pairs)[:, 0]
        real = _are_real(weights)

        def total(values: jax.Array) -> jax.Array:
            return jnp.where(real, values, 0).sum()

        sums = PreferenceSums(
            pairs=real.sum(dtype=jnp.float32),
            loss=total(losses),
            correct=total(margin > 0).astype(jnp.float32),
            chosen=total(rewards[:, 0]),
            rejected=total(rewards[:, 1]),
            tokens=weights.sum(),
            chosen_tokens=chosen.sum(),
            cross_entropy=-jnp.where(chosen > 0, chosen * logs, 0).sum(),
            router=ours.router,
        )
        whole = sums if whole is None else whole
        found = share(sums.loss, whole.pairs)
        found += options.sft * share(sums.cross_entropy, whole.chosen_tokens)
        return found + router_loss(model, params, ours.router, step, whole.router), sums

    return Objective(loss, ahead_of(_count, _rows), _metrics)


def _count(batch: Batch) -> PreferenceSums:
    weights = targets_of(_rows(batch), 1)[1][0].reshape(*batch.input_ids.shape[:2], -1)
    return PreferenceSums(
        pairs=_are_real(weights).sum(dtype=jnp.float32), chosen_tokens=weights[:, 0].sum()
    )


def _metrics(model: Decoder, sums: PreferenceSums, step: TrainOptions) -> Metrics:
    return {
        "loss": share(sums.loss, sums.pairs),
        "accuracy": share(sums.correct, sums.pairs),
        "margin": share(sums.chosen - sums.rejected, sums.pairs),
        "chosen_reward": share(sums.chosen, sums.pairs),
        "rejected_reward": share(sums.rejected, sums.pairs),
        "sft_loss": share(sums.cross_entropy, sums.chosen_tokens),
        "tokens": sums.tokens,
        **router_metrics(model, sums.router, step),
    }


def _rows(batch: Batch) -> Batch:
    """The pairs [P, 2, T] as rows [2 P, T], those of a pair next to each other on its device."""
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), batch)


def _are_real(weights: jax.Array) -> jax.Array:
    """bool [P], which pairs are none of those that fill up a batch."""
    return (weights > 0).any(axis=-1).all(axis=-1)


def reference_of(params: Params, beside: dict[str, Params] | None) -> Params:
    """The parameters to compare with: `beside["reference"]`, else what is below `params`' adapters.

    Raises:
      ValueError: there are neither.
    """
    if beside is not None and REFERENCE in beside:
        return beside[REFERENCE]
    if any(low_rank_weights(params)):
        return detach(params)[0]
    raise ValueError(
        f"give the parameters to compare with: state.replace(beside={{{REFERENCE!r}: params}})"
    )
