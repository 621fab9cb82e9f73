"""What a checkpoint's generation_config.json says about sampling and stopping."""

import dataclasses
from pathlib import Path
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.json_fields import Fields, read_json_object
from qwen_jax.text import Tokenizer

# Identity, and settings of other decoders' caches and batches; none changes the text.
_INERT = frozenset(
    """
    _from_model_config assistant_confidence_threshold bos_token_id
    cache_implementation max_length pad_token_id
    num_assistant_tokens return_dict_in_generate transformers_version use_cache
    """.split()
)

# Values that change nothing, as transformers spells them; any other is not honoured.
_OFF = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "length_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "num_beam_groups": 1,
    "guidance_scale": 1.0,
}


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """Attributes:
    options: how tokens are chosen.
    stop_ids: ids that end a text; None where the file names none.
    max_new_tokens: None where the file has none.
    stop_tokens: control tokens that end a text besides, by what they are called.
    max_window_size: as for `Conversation`; None where the file has none.
    """

    options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    stop_ids: tuple[int, ...] | None = None
    max_new_tokens: int | None = None
    stop_tokens: tuple[str, ...] = ()
    max_window_size: int | None = None


def load_generation_defaults(directory: Path) -> GenerationDefaults:
    """Reads `directory/generation_config.json`; greedy where it is absent.

    Raises:
      UserError: a broken file, or a setting that is not honoured.
    """
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    fields = Fields(read_json_object(path), str(path))
    eos = fields.take("eos_token_id", "integer or list of integers")
    stop_ids = None if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    for ids in fields.take("stop_words_ids", "list of lists of integers", []):
        if len(ids) != 1:
            raise fields.refuse("stop_words_ids", ids, "only single ids stop a text; use --stop")
        stop_ids = tuple(dict.fromkeys((*(stop_ids or ()), *ids)))
    defaults = GenerationDefaults(
        options=_read_options(fields),
        stop_ids=stop_ids,
        max_new_tokens=fields.take("max_new_tokens", "integer"),
        stop_tokens=_read_chat_format(fields),
        max_window_size=fields.take("max_window_size", "integer"),
    )
    if defaults.max_new_tokens is not None and defaults.max_new_tokens < 1:
        raise fields.refuse("max_new_tokens", defaults.max_new_tokens, "at least 1 is needed")
    for name, value in fields.values.items():
        if not (name in _INERT or value in (None, False, [], {}, 0) or value == _OFF.get(name)):
            raise fields.refuse(name, value, "remove it from the file to go without")
    return defaults


def stop_ids_of(
    defaults: GenerationDefaults, config: ModelConfig, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """The ids that end a text of a checkpoint.

    They are generation_config.json's; where that names none, config.json's and the tokenizer's own.
    With those of the chat format.
    """
    ids = defaults.stop_ids
    if ids is None:
        ids = (*config.eos_token_ids, tokenizer.eos_token_id)
    ids = (*ids, *map(tokenizer.added_tokens.get, defaults.stop_tokens))
    return tuple(i for i in dict.fromkeys(ids) if i is not None)


# What ends a text in each format of chats; in the plain one, the eos alone.
_CHAT_FORMATS = {"chatml": ("<|im_end|>", "<|im_start|>"), "raw": ()}


def _read_chat_format(fields: Fields) -> tuple[str, ...]:
    name = fields.take("chat_format", "string", "raw")
    if name not in _CHAT_FORMATS:
        raise fields.refuse("chat_format", name, f"known: {', '.join(_CHAT_FORMATS)}")
    return _CHAT_FORMATS[name]


def _read_options(fields: Fields) -> SamplingOptions:
    options: dict[str, Any] = {
        "temperature": fields.take("temperature", "number", 1.0),
        # transformers samples from 50 tokens unless the file says otherwise.
        "top_k": fields.take("top_k", "integer", 50),
        "top_p": fields.take("top_p", "number", 1.0),
        "min_p": fields.take("min_p", "number", 0.0),
        "repetition_penalty": fields.take("repetition_penalty", "number", 1.0),
        "presence_penalty": fields.take("presence_penalty", "number", 0.0),
        "frequency_penalty": fields.take("frequency_penalty", "number", 0.0),
    }
    if not fields.take("do_sample", "boolean", False):
        # The filters stay, for whoever asks for another temperature.
        options["temperature"] = 0.0
    try:
        return SamplingOptions(**options)
    except UserError as error:
        raise UserError(f"{fields.source}: {error}") from None
