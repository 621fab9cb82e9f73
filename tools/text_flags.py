"""Flags that the command lines which write text share, beside the model's."""

import dataclasses
from typing import Any

from absl import flags

from qwen_jax.errors import UserError
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.models.decoder import Decoder
from qwen_jax.text import StopStrings, Tokenizer
from tools.model_flags import load_model

MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Tokens to generate at most; the checkpoint's default, else 512.",
    lower_bound=1,
)
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Of the draws; the same seed gives the same text.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends the output, itself left out")
THINKING = flags.DEFINE_bool(
    "thinking",
    None,
    "The chat template's enable_thinking, its own default if not given; tools.generate needs "
    "--chat with it.",
)
THINKING_BUDGET = flags.DEFINE_integer(
    "thinking_budget",
    None,
    "Reasoning tokens after which the reasoning is closed and the answer follows; 0 for none. "
    "tools.generate needs --chat with it.",
    lower_bound=0,
)
ALLOW_SPECIAL = flags.DEFINE_bool(
    "allow_special", False, "Control tokens in the given text count; otherwise they are plain text."
)
ALLOW_LONGER = flags.DEFINE_bool(
    "allow_longer", False, "Accept a prompt longer than the model's positions."
)
_OPTIONS = {
    "temperature": flags.DEFINE_float("temperature", None, "0 takes the most likely token."),
    "top_k": flags.DEFINE_integer("top_k", None, "Keep the k most likely tokens; 0 for all."),
    "top_p": flags.DEFINE_float("top_p", None, "Keep the likeliest tokens of this probability."),
    "min_p": flags.DEFINE_float("min_p", None, "Keep tokens this likely, relative to the best."),
    "repetition_penalty": flags.DEFINE_float(
        "repetition_penalty", None, "Divides the logits of tokens seen; 1 for none."
    ),
    "presence_penalty": flags.DEFINE_float(
        "presence_penalty", None, "Subtracted from the logits of tokens generated."
    ),
    "frequency_penalty": flags.DEFINE_float(
        "frequency_penalty", None, "Subtracted for each time that a token was generated."
    ),
}


@dataclasses.dataclass(frozen=True)
class Session:
    """What a command line that writes text runs on.

    Sampling flags that are not given come from the checkpoint's generation_config.json.
    """

    model: Decoder
    params: Any
    tokenizer: Tokenizer
    options: SamplingOptions
    stop_ids: tuple[int, ...] | None
    max_new_tokens: int
    max_window_size: int | None

    def check_length(self, ids: list[int], name: str) -> None:
        """Refuses a prompt that the model has no positions for, unless --allow_longer."""
        config = self.model.config
        if not ALLOW_LONGER.value and config.exceeds_positions(len(ids)):
            raise UserError(
                f"{name}: {len(ids)} tokens are longer than max_position_embeddings = "
                f"{config.max_position_embeddings}; scale with --rope, or give --allow_longer"
            )


def template_variables() -> dict[str, Any]:
    """What the flags pass to the chat template."""
    return {} if THINKING.value is None else {"enable_thinking": THINKING.value}


def open_session() -> Session:
    """Loads what --model names, the cheap things first, so that bad input fails early.

    Raises:
      UserError: bad flags, or whatever is wrong with the checkpoint.
    """
    given = {name: flag.value for name, flag in _OPTIONS.items() if flag.value is not None}
    SamplingOptions(**given)
    StopStrings(STOP.value)
    loaded = load_model()
    return Session(
        model=loaded.model,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        options=dataclasses.replace(loaded.defaults.options, **given),
        stop_ids=loaded.stop_ids,
        max_new_tokens=MAX_NEW_TOKENS.value or loaded.defaults.max_new_tokens or 512,
        max_window_size=loaded.defaults.max_window_size,
    )
