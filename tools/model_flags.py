"""Flags and loading of the command lines that run a language model on text."""

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags

import qwen_jax
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_config import DTYPES, load_config
from qwen_jax.inference.checks import check_writes_text
from qwen_jax.inference.defaults import (
    GenerationDefaults,
    load_generation_defaults,
    stop_ids_of,
)
from qwen_jax.models.decoder import Decoder
from qwen_jax.rope_scaling import parse_rope_flag
from qwen_jax.text import Tokenizer
from tools import mesh_flag, weights_flag

MODEL = flags.DEFINE_string(
    "model", None, "Checkpoint directory or hub id, such as Qwen/Qwen3-0.6B.", required=True
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "Of the parameters; float32 on CPU, else the checkpoint's."
)
ROPE = flags.DEFINE_string(
    "rope",
    "",
    "KIND[:FACTOR][,option=value...], such as yarn:4,original=32768; the checkpoint's own if not "
    "given. Kinds: none or default, linear, ntk, dynamic, stepped_ntk, ntk_by_parts, yarn, "
    "yarn_by_rotations, dynamic_yarn, llama3, longrope, proportional; each behind resonance_ with "
    "whole wavelengths, resonance alone for default; and dca (Dual Chunk Attention), rerope, "
    "self_extend, sinks (StreamingLLM). Options: "
    "original (the trained length), attention_factor, beta_fast, beta_slow, mscale, "
    "mscale_all_dim, truncate, low_freq_factor, high_freq_factor, partial_rotary_factor (of "
    "proportional, 0 for no rotation), factors (a JSON file with longrope's short_factor and "
    "long_factor); of dca chunk_size, local_size and temperature; of rerope, self_extend and sinks "
    "window (distances below it are exact); of rerope stretch; of sinks sinks (how many); with any "
    "kind logn (true, false or a length); with the others window and window_layers (the first so "
    "many layers see so many tokens).",
)
REFUSE_NONFINITE = flags.DEFINE_bool(
    "refuse_nonfinite", False, "Refuse a checkpoint with NaN or infinite weights, not only warn."
)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What --model names.

    Attributes:
      directory: of the checkpoint.
      model, params, tokenizer: as the package loads them.
      defaults: of its generation_config.json.
      stop_ids: that end a text.
    """

    directory: Path
    model: Decoder
    params: Any
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    stop_ids: tuple[int, ...]


def load_model() -> LoadedModel:
    """Loads what --model names, the cheap things first, so that bad input fails early.

    Raises:
      UserError: bad flags, or whatever is wrong with the checkpoint.
    """
    rope_scaling = parse_rope_flag(ROPE.value)
    directory = resolve_source(MODEL.value)
    _check_writes_text(directory, load_config(directory))
    defaults = load_generation_defaults(directory)
    tokenizer = qwen_jax.load_tokenizer(directory)
    model, params = qwen_jax.load_pretrained(
        directory,
        DTYPE.value,
        mesh_flag.MESH.value,
        rope_scaling=rope_scaling,
        allow_nonfinite=not REFUSE_NONFINITE.value,
        weights=weights_flag.WEIGHTS.value,
    )
    # Of some embedders only the tensors tell.
    _check_writes_text(directory, model.config)
    weights_flag.report_memory(directory, params)
    stop_ids = stop_ids_of(defaults, model.config, tokenizer)
    return LoadedModel(directory, model, params, tokenizer, defaults, stop_ids)


def _check_writes_text(directory: Path, config: ModelConfig) -> None:
    try:
        check_writes_text(config)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
