"""GRPO's step: prompts -> answers by the model as it is -> rewards -> updates.

It stands where the loop has a train step. All that is drawn is of the run's seed and the number of
updates that were made, so that a run that goes on draws what it would have drawn.
"""

import functools
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.inference.defaults import GenerationDefaults, stop_ids_of
from qwen_jax.models.decoder import Decoder
from qwen_jax.text import Tokenizer
from qwen_jax.training.batch import Batch, check_parts, in_parts
from qwen_jax.training.data.options import DataOptions
from qwen_jax.training.data.prompts import PromptRecords
from qwen_jax.training.grpo import GrpoOptions
from qwen_jax.training.log_probs import score
from qwen_jax.training.partition import combine
from qwen_jax.training.preference import reference_of
from qwen_jax.training.rollouts import (
    Rollout,
    figures_of,
    read_prompts,
    roll_out,
    to_learn,
)
from qwen_jax.training.stacking import Params, unstack_layers
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.train_step import TrainState, TrainStep

Arrays = Mapping[str, np.ndarray]
Figures = dict[str, Any]
_NO_DEFAULTS = GenerationDefaults()


def check_rollouts(model: Decoder, stop_ids: Collection[int]) -> None:
    """Checks that answers can be written while a model trains, and end with one of `stop_ids`.

    Raises:
      UserError: they cannot, or would not be what is learned.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"grpo: {jax.process_count()} processes; answers are written by one process alone, on "
            "all of its devices; start one"
        )
    if model.config.rope.depends_on_length:
        raise UserError(
            "grpo: the model's RoPE depends on the length of the text, so that a token's "
            "probability while it is written is not that in the finished text; set changes or "
            "take another model"
        )
    if not stop_ids:
        raise UserError(
            "neither the model's config.json nor its tokenizer names an eos token, so that no "
            "answer ends; name one as eos_token in tokenizer_config.json"
        )


def make_grpo_step(
    model: Decoder,
    step: TrainStep,
    tokenizer: Tokenizer,
    data: DataOptions,
    options: GrpoOptions,
    step_options: TrainOptions,
    seed: int,
    defaults: GenerationDefaults = _NO_DEFAULTS,
) -> Callable[[TrainState, Arrays], tuple[TrainState, Figures]]:
    """A function of (state, prompts) that makes `options.updates` updates of rollouts.

    Prompts are a batch of `data.prompts`. Its figures are those of `grpo`'s objective, each the
    mean over the updates, of `rollouts.figures_of`, and "rollout_seconds"; where one update was not
    finite, "finite" is false.

    Answers are written with the parameters in `step_options.dtype`, with the very arrays where that
    is theirs and they do not lie stacked. Their log-probabilities before the first update are not
    those that they were drawn with but the training forward's, at `options.temperature`: taken by a
    pass ahead where there are several updates, else by the update itself, whose ratio is then 1.

    Args:
      model: that learns.
      step: of `make_train_step` with the objective `grpo(options)`.
      tokenizer: of the model.
      data: of which the prompts are.
      options: of the answers.
      step_options: of the step.
      seed: of the draws.
      defaults: of the checkpoint's generation_config.json, for what ends an answer.

    Raises:
      UserError: answers cannot be written here, see `check_rollouts`; or a batch of them does not
        divide into the step's parts.
    """
    stop_ids = stop_ids_of(defaults, model.config, tokenizer)
    check_rollouts(model, stop_ids)
    check_parts(data.batch_size, step_options.microbatches)
    records = PromptRecords(data)
    score_all = _scorer(model, step_options, options.temperature)

    def run(state: TrainState, arrays: Arrays) -> tuple[TrainState, Figures]:
        started = time.monotonic()
        params = state.to_run()
        reference = reference_of(params, state.beside) if options.kl else None
        prompts, own = read_prompts(arrays, records)
        number = int(state.step)
        rollout = roll_out(
            model,
            params_to_write_with(state, step_options.dtype),
            tokenizer,
            prompts,
            own,
            options,
            stop_ids=stop_ids,
            seed=int(np.random.SeedSequence((seed, number)).generate_state(1)[0]),
            length=data.length,
        )
        seconds = time.monotonic() - started
        answers = to_learn(rollout, options, len(arrays["input_ids"]), data.length)
        if options.updates > 1:
            answers = answers.replace(old=score_all(params, answers.batch))
        if options.kl:
            answers = answers.replace(reference=score_all(reference, answers.batch))
        # The step takes over the memory of what it trains.
        del params, reference
        found = []
        for _ in range(options.updates):
            state, metrics = step(state, answers)
            found.append(metrics)
        return state, _mean(found) | figures_of(rollout) | {"rollout_seconds": seconds}

    return run


def make_grpo_evaluation(
    model: Decoder,
    tokenizer: Tokenizer,
    data: DataOptions,
    options: GrpoOptions,
    dtype: str,
    defaults: GenerationDefaults = _NO_DEFAULTS,
) -> Callable[[TrainState, Iterable[Arrays]], dict[str, float]]:
    """A function of (state, batches of prompts): figures of one greedy answer to each.

    They are those of `rollouts.figures_of` that one answer has, with "eval_" before their names,
    and "eval_prompts", how many there were. What ends an answer is as in `make_grpo_step`.
    """
    stop_ids = stop_ids_of(defaults, model.config, tokenizer)
    records = PromptRecords(data)

    def evaluate(state: TrainState, batches: Iterable[Arrays]) -> dict[str, float]:
        params = params_to_write_with(state, dtype)
        rollouts: list[Rollout] = []
        for arrays in batches:
            prompts, own = read_prompts(arrays, records)
            count = len(prompts)
            # As many in the last batch as in the others.
            prompts += prompts[-1:] * (len(arrays["input_ids"]) - count)
            own += own[-1:] * (len(prompts) - count)
            rollout = roll_out(
                model,
                params,
                tokenizer,
                prompts,
                own,
                options,
                stop_ids=stop_ids,
                seed=0,
                length=data.length,
                greedy=True,
            )
            rollouts.append(_first(rollout, count))
        whole = functools.reduce(_joined, rollouts)
        figures = figures_of(whole)
        del figures["no_signal"]
        figures["prompts"] = float(len(whole.prompts))
        return {f"eval_{name}": value for name, value in figures.items()}

    return evaluate


def params_to_write_with(state: TrainState, dtype: str) -> Params:
    """The state's parameters in `dtype`: the same arrays where they are that, and lie apart."""
    trained = state.params
    if any(leaf.dtype != dtype for leaf in jax.tree.leaves(trained)):
        return combine(_as_dtype(trained, dtype), state.frozen)
    return state.whole()


@functools.partial(jax.jit, static_argnums=1)
def _as_dtype(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), unstack_layers(params))


def _scorer(
    model: Decoder, options: TrainOptions, temperature: float
) -> Callable[[Params, Batch], jax.Array]:
    """Log-probabilities [B, T] of a batch, in as many parts as a step has."""
    count = options.microbatches

    @jax.jit
    def run(params: Params, batch: Batch) -> jax.Array:
        if count == 1:
            return score(model, params, batch, options, temperature).log_probs
        found = jax.lax.map(
            lambda part: score(model, params, part, options, temperature).log_probs,
            in_parts(batch, count),
        )
        return found.swapaxes(0, 1).reshape(batch.input_ids.shape)

    return run


def _mean(rows: list[Figures]) -> Figures:
    """Of several updates' metrics."""
    if len(rows) == 1:
        return rows[0]
    found = jax.tree.map(lambda *values: jnp.stack(values).mean(axis=0), *rows)
    return found | {"finite": jnp.stack([row["finite"] for row in rows]).all()}


def _first(rollout: Rollout, count: int) -> Rollout:
    return Rollout(
        rollout.prompts[:count],
        rollout.answers[:count],
        rollout.rewards[:count],
        {name: values[:count] for name, values in rollout.terms.items()},
        rollout.cut[:count],
    )


def _joined(one: Rollout, other: Rollout) -> Rollout:
    return Rollout(
        one.prompts + other.prompts,
        one.answers + other.answers,
        np.concatenate([one.rewards, other.rewards]),
        {name: np.concatenate([one.terms[name], other.terms[name]]) for name in one.terms},
        np.concatenate([one.cut, other.cut]),
    )
