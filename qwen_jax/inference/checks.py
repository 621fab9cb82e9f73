"""What inference asks of its arguments and of the model, refused in plain words."""

import numbers
from collections.abc import Container

from qwen_jax.config import HeadKind, ModelConfig
from qwen_jax.errors import UserError

_MODELS = {
    HeadKind.VOCABULARY: "a language model",
    HeadKind.NONE: "an embedder without an output head",
    HeadKind.SCORE: "a sequence classifier",
    HeadKind.SCORE_WITH_BIAS: "a token classifier",
    HeadKind.TWO_LAYER_SCORE: "a reward model",
    HeadKind.GUARD: "a guard",
}


def check_integer(name: str, value: int, least: int, most: int | None = None) -> None:
    """Refuses what is no integer from `least` to `most`, a boolean too.

    Raises:
      UserError: it is none; `name` is what the error calls it.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):
        range_ = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} = {value!r} should be an integer, {range_}")


def check_head(config: ModelConfig, wanted: Container[HeadKind], otherwise: str) -> None:
    """Refuses a model without one of the `wanted` heads.

    Args:
      config: of the model.
      wanted: heads that will do.
      otherwise: what a model without them cannot do, and what to take instead, as a clause.

    Raises:
      UserError: the model has another head.
    """
    if config.head not in wanted:
        raise UserError(f"the model is {_MODELS[config.head]}, which {otherwise}")


def check_writes_text(config: ModelConfig) -> None:
    """Refuses a model that scores instead of writing.

    Raises:
      UserError: its head is not one over the vocabulary.
    """
    check_head(
        config,
        (HeadKind.VOCABULARY,),
        "writes no text; tools.embed makes vectors and scores with it",
    )
