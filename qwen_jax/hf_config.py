"""`config.json` <-> `ModelConfig`.

Reading follows transformers: the same defaults for absent fields, both layouts of the rotary
settings (`rope_theta` + `rope_scaling`, and `rope_parameters`) and of the dtype (`torch_dtype` and
`dtype`). A field that could change the forward pass is honoured or refused by name; bookkeeping is
listed in `_INERT`, and a field on no list is refused too unless it is null or empty, since nobody
can tell what it does.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.config import LayerKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_rope import read_rope, read_rope_parameters, write_rope_scaling
from qwen_jax.json_fields import Fields, disagreement, read_json_object, shown

DTYPES = ("float32", "bfloat16", "float16")

# Identity, training, generation and output settings: none of them reaches the logits.
_INERT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path attn_implementation auto_map
    begin_suppress_tokens bad_words_ids chunk_size_feed_forward decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size attention_dropout
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label is_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    seq_length suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torchscript transformers_version typical_p
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
""".split()
)

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Fields with one value that the decoder computes; any other is a mechanism it does not have.
_ONLY = {
    "hidden_act": "silu",
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "mlp_bias": False,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
}

# Where removing the field, as `_refuse_leftovers` advises, would not help.
_WHY_REFUSED = dict.fromkeys(
    ("quantization_config", "quantization", "compression_config"),
    "quantised tensors are not read; use the unquantised checkpoint",
)


def load_config(directory: Path) -> ModelConfig:
    """Reads `directory/config.json`.

    Raises:
      UserError: absent or broken file, unknown `model_type`, or a field that is not honoured.
    """
    path = Path(directory) / "config.json"
    return read_hf_config(read_json_object(path), str(path))


def read_hf_config(raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads a parsed `config.json`; `source` names it in errors.

    Raises:
      UserError: unknown `model_type`, a missing or mistyped field, or one that is not honoured.
    """
    fields = Fields(raw, source)
    family = fields.require("model_type", "string")
    if family not in _READERS:
        raise UserError(
            f"{source}: model_type = {shown(family)} is unknown; "
            f"known: {', '.join(sorted(_READERS))}"
        )
    try:
        config = _READERS[family](fields, family)
    except UserError as error:
        if str(error).startswith(source):
            raise
        raise UserError(f"{source}: {error}") from None
    _refuse_leftovers(fields)
    return config


def _refuse_leftovers(fields: Fields) -> None:
    for name, value in fields.values.items():
        if name in _ONLY:
            # Null means the default, but for is_causal, where transformers takes it for false.
            if value != _ONLY[name] and (value is not None or name == "is_causal"):
                raise fields.refuse(name, value, f"only {shown(_ONLY[name])} is")
            continue
        # Null and empty ask for nothing; false may ask for a mechanism to be left out.
        if name in _INERT or value in (None, [], {}, ""):
            continue
        why = "it may change the logits; remove the field if you know that it does not"
        raise fields.refuse(name, value, _WHY_REFUSED.get(name, why))


def _read_dense(fields: Fields, family: str) -> ModelConfig:
    """Qwen1.5, 2, 2.5 (`qwen2`: q, k, v biases) and dense Qwen3 (`qwen3`: QK-norm)."""
    is_qwen3 = family == "qwen3"
    architectures = fields.take("architectures", "list of strings", [])
    known = _ARCHITECTURES[family]
    if architectures not in ([], [known]):
        raise fields.refuse("architectures", architectures, f"only {known} is for {family}")

    hidden_size = fields.require("hidden_size", "integer")
    num_heads = fields.require("num_attention_heads", "integer")
    num_layers = fields.require("num_hidden_layers", "integer")
    if num_layers < 1:
        raise fields.refuse("num_hidden_layers", num_layers, "at least 1 is needed")
    default_kv_heads = num_heads if "num_key_value_heads" in fields.values else 32
    num_kv_heads = fields.take("num_key_value_heads", "integer", default_kv_heads)
    head_dim = fields.take("head_dim", "integer")
    if head_dim is None:
        head_dim = 128 if is_qwen3 else hidden_size // max(num_heads, 1)

    attention_bias = fields.take("attention_bias", "boolean", not is_qwen3)
    if not is_qwen3:
        for name, bias in (
            ("attention_bias", attention_bias),
            ("qkv_bias", fields.take("qkv_bias", "boolean", True)),
        ):
            if not bias:
                raise fields.refuse(name, False, "qwen2 always has q, k and v biases")

    max_position_embeddings = fields.take("max_position_embeddings", "integer", 32768)
    layer_types, sliding_window = _read_layer_types(fields, num_layers)
    eos = fields.take("eos_token_id", "integer or list of integers", [])
    return ModelConfig(
        family=family,
        vocab_size=fields.require("vocab_size", "integer"),
        hidden_size=hidden_size,
        intermediate_size=fields.require("intermediate_size", "integer"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        layer_types=layer_types,
        max_position_embeddings=max_position_embeddings,
        rope=read_rope(fields, max_position_embeddings),
        rms_norm_eps=float(fields.take("rms_norm_eps", "number", 1e-6)),
        tie_word_embeddings=fields.take("tie_word_embeddings", "boolean", False),
        qkv_bias=attention_bias,
        output_bias=attention_bias and is_qwen3,
        qk_norm=is_qwen3,
        sliding_window=sliding_window,
        initializer_range=float(fields.take("initializer_range", "number", 0.02)),
        dtype=_read_dtype(fields),
        bos_token_id=fields.take("bos_token_id", "integer"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        pad_token_id=fields.take("pad_token_id", "integer"),
    )


_READERS: dict[str, Callable[[Fields, str], ModelConfig]] = {
    "qwen2": _read_dense,
    "qwen3": _read_dense,
}


def _read_dtype(fields: Fields) -> str:
    found = {
        name: value.removeprefix("torch.")
        for name in ("dtype", "torch_dtype")
        if (value := fields.take(name, "string")) is not None
    }
    for name, value in found.items():
        if value not in DTYPES:
            raise fields.refuse(name, value, f"known: {', '.join(DTYPES)}")
    if len(set(found.values())) > 1:
        raise UserError(f"{fields.source}: {disagreement(found)}")
    return next(iter(found.values()), "float32")


def _read_layer_types(fields: Fields, num_layers: int) -> tuple[tuple[LayerKind, ...], int | None]:
    """`layer_types` where given, else the upper layers slide from `max_window_layers` on."""
    use_window = fields.take("use_sliding_window", "boolean", False)
    default_window = None if "sliding_window" in fields.values else 4096
    window = fields.take("sliding_window", "integer", default_window)
    first_sliding = fields.take("max_window_layers", "integer", 28)
    if not use_window:
        window = None
    layer_types = fields.take("layer_types", "list of strings")
    if layer_types is None:
        layer_types = [
            "sliding_attention" if window is not None and i >= first_sliding else "full_attention"
            for i in range(num_layers)
        ]
    for kind in layer_types:
        if kind not in tuple(LayerKind):
            raise fields.refuse("layer_types", kind, f"known: {', '.join(LayerKind)}")
    if len(layer_types) != num_layers:
        raise UserError(
            f"{fields.source}: layer_types has {len(layer_types)} entries for "
            f"num_hidden_layers = {num_layers}"
        )
    if not use_window and "sliding_attention" in layer_types:
        raise UserError(
            f"{fields.source}: layer_types has sliding_attention, use_sliding_window is false; "
            "set use_sliding_window or remove the sliding layers"
        )
    return tuple(map(LayerKind, layer_types)), window


def with_rope_scaling(config: ModelConfig, rope_scaling: dict[str, Any]) -> ModelConfig:
    """`config` with the rotary scaling replaced, its base kept unless the dict gives one.

    Args:
      config: the model.
      rope_scaling: the dict that config.json would hold.

    Raises:
      UserError: unknown kind, or an option that the kind does not have.
    """
    rope = read_rope_parameters(
        rope_scaling, config.rope.theta, config.max_position_embeddings, "rope_scaling"
    )
    return dataclasses.replace(config, rope=rope)


def write_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that reads back as `config`, in the layout that every reader knows.

    `rope_theta` + `rope_scaling` and `torch_dtype` are what transformers 4 and 5, and the engines
    beside them, all accept.

    Raises:
      UserError: a field of `config` that the format has no place for.
    """
    sliding = config.sliding_window is not None
    fields = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "rope_theta": config.rope.theta,
        "rope_scaling": write_rope_scaling(config.rope),
        "use_sliding_window": sliding,
        "sliding_window": config.sliding_window,
        # For readers that know no layer_types.
        "max_window_layers": (*config.layer_types, LayerKind.SLIDING_ATTENTION).index(
            LayerKind.SLIDING_ATTENTION
        ),
        "layer_types": [kind.value for kind in config.layer_types],
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _write_eos(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.dtype,
        "use_cache": True,
    }
    if config.family == "qwen2":
        del fields["attention_bias"]
    back = read_hf_config(fields, "the config.json to write")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if getattr(back, field.name) != value:
            raise UserError(
                f"a config.json of model_type {config.family} cannot say {field.name} = {value}"
            )
    return fields


def _write_eos(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else (list(ids) or None)
