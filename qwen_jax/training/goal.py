"""What a run makes small: its objective, and what that reads beside the model."""

import dataclasses
from typing import Any

import jax

from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_config import load_config
from qwen_jax.models.decoder import Decoder
from qwen_jax.pretrained import load_pretrained, load_tokenizer
from qwen_jax.text import Tokenizer
from qwen_jax.training.data.form import Form
from qwen_jax.training.data.indexed import fingerprint
from qwen_jax.training.data.pairs import PAIRS
from qwen_jax.training.data.prompts import prompts_form
from qwen_jax.training.distillation import (
    TEACHER,
    DistillationOptions,
    check_teacher,
    distillation,
)
from qwen_jax.training.grpo import grpo
from qwen_jax.training.objective import NEXT_TOKEN, Objective, check_no_token_losses
from qwen_jax.training.preference import REFERENCE, preference
from qwen_jax.training.run_options import OBJECTIVES, RunOptions


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a run makes small.

    Attributes:
      objective: of its steps and evaluations.
      beside: what that reads besides, for `TrainState.beside`.
      forward: configs of the models that a step runs forward besides.
      form: of the records, where they are no texts or chats.
      eval_form: of those of evaluations.
      updates: that a step of the loop makes.
    """

    objective: Objective = NEXT_TOKEN
    beside: dict[str, Any] | None = None
    forward: tuple[ModelConfig, ...] = ()
    form: Form | None = None
    eval_form: Form | None = None
    updates: int = 1


def choose_goal(options: RunOptions, model: Decoder, params: Any, tokenizer: Tokenizer) -> Goal:
    """The goal that a run's options name.

    Args:
      options: of the run.
      model: what is trained.
      params: that it begins with, before adapters; None where they are drawn.
      tokenizer: of the run's data.

    Raises:
      UserError: losses that the objective has not; a teacher that cannot be loaded, or that has
        another vocabulary.
    """
    if any(getattr(options, name) is not None for name in OBJECTIVES):
        # Before a teacher is loaded or a reference copied.
        check_no_token_losses(model, options.step)
    if options.preference is not None:
        beside = _reference(options, params)
        return Goal(preference(options.preference), beside, (model.config,), PAIRS, PAIRS)
    if options.grpo is not None:
        return _rewards(options, model, params)
    if options.distillation is not None:
        teacher, known = _load_teacher(options.distillation, options.mesh, model, tokenizer)
        objective = distillation(options.distillation, teacher)
        return Goal(objective, {TEACHER: known}, (teacher.config,))
    return Goal()


def _reference(options: RunOptions, params: Any) -> dict[str, Any] | None:
    """What a run began with, to compare with; below adapters it is there anyway."""
    if options.lora is not None:
        return None
    # Half the memory of the masters, unless the step computes with as many bits.
    return {REFERENCE: jax.tree.map(lambda leaf: leaf.astype(options.step.dtype), params)}


def _rewards(options: RunOptions, model: Decoder, params: Any) -> Goal:
    grpo_options = options.grpo
    room = grpo_options.max_new_tokens
    passes = (grpo_options.updates > 1) + (grpo_options.kl > 0)
    return Goal(
        grpo(grpo_options),
        _reference(options, params) if grpo_options.kl else None,
        (model.config,) * passes,
        prompts_form(grpo_options.group_size, room),
        # One greedy answer to each.
        prompts_form(1, room),
        grpo_options.updates,
    )


def _load_teacher(
    options: DistillationOptions, mesh: str | None, model: Decoder, tokenizer: Tokenizer
) -> tuple[Decoder, Any]:
    # Before any of its weights are read.
    check_teacher(model.config, load_config(resolve_source(options.teacher, weights=False)))
    if fingerprint(load_tokenizer(options.teacher)) != fingerprint(tokenizer):
        raise UserError(
            f"distillation.teacher = {options.teacher}: its tokenizer is not the model's, so that "
            "what it predicts are other tokens; take a teacher with the same one"
        )
    return load_pretrained(options.teacher, options.dtype, mesh)
