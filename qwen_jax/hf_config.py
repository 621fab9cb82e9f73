"""`config.json` <-> `ModelConfig`.

Reading follows transformers: the same defaults for absent fields, both layouts of the rotary
settings (`rope_theta` + `rope_scaling`, and `rope_parameters`) and of the dtype (`torch_dtype` and
`dtype`). A field that could change the forward pass is honoured or refused by name; bookkeeping is
listed in `_INERT`, and a field on no list is refused too unless it is null or empty, since nobody
can tell what it does.
"""

import dataclasses
import enum
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.config import (
    DeltaSpec,
    DualChunkSpec,
    LayerKind,
    ModelConfig,
    MoeSpec,
    RopeKind,
    RopeSpec,
)
from qwen_jax.errors import UserError
from qwen_jax.hf_heads import read_head, write_head
from qwen_jax.hf_rope import read_rope, write_rope_scaling
from qwen_jax.json_fields import Fields, disagreement, read_json_object, shown

DTYPES = ("float32", "bfloat16", "float16")

# Identity, training, generation and output settings: none of them reaches the logits.
_INERT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path attn_dropout_prob
    attn_implementation auto_map emb_dropout_prob onnx_safe softmax_in_fp32 use_cache_kernel
    use_flash_attn
    begin_suppress_tokens bad_words_ids chunk_size_feed_forward decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size attention_dropout
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label is_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_nextn_predict_layers
    num_return_sequences mtp_num_hidden_layers
    query_category_map query_risk_level_map response_category_map response_risk_level_map
    output_attentions output_hidden_states output_router_logits output_scores prefix
    pretraining_tp problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    seq_length suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torchscript transformers_version typical_p
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
""".split()
)


class _Bias(enum.Enum):
    """Which projections of attention have biases, and what says so."""

    QKV_ALWAYS = enum.auto()
    QKV_BY_FIELD = enum.auto()
    ALL_BY_FIELD = enum.auto()


class _Renormalise(enum.Enum):
    """Whether the chosen experts' probabilities are made to sum to one, where no field says."""

    NO = False
    YES = True
    ALWAYS = enum.auto()


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a model_type means: its mechanisms, and transformers' defaults for absent fields.

    Attributes:
      stem: that its architectures begin with.
      bias: on the projections of attention.
      num_key_value_heads: default.
      head_dim: default; None for hidden_size / num_attention_heads.
      qk_norm: as `ModelConfig` has it.
      hybrid: whether layers may be linear attention, and norms and attention are those of such
        models: gated, zero-centred, a quarter of each head rotated.
      experts: whether there may be any, and how they are weighted.
      shared_expert: whether there is one beside them.
      dense_layers: whether some layers may go without.
      layer_kinds: rule that gives `layer_types` where config.json does not.
    """

    stem: str
    bias: _Bias
    num_key_value_heads: int
    head_dim: int | None = None
    qk_norm: bool = False
    hybrid: bool = False
    experts: _Renormalise | None = None
    shared_expert: bool = False
    dense_layers: bool = True
    layer_kinds: Callable[[Fields, int, int | None], list[str]] | None = None


def _upper_slide(fields: Fields, num_layers: int, window: int | None) -> list[str]:
    first = fields.take("max_window_layers", "integer", 28)
    return [_sliding(window is not None and i >= first) for i in range(num_layers)]


def _every_other_lower_slides(fields: Fields, num_layers: int, window: int | None) -> list[str]:
    end = fields.take("max_window_layers", "integer", 28)
    return [_sliding(window is not None and i % 2 == 0 and i < end) for i in range(num_layers)]


def _all_slide(fields: Fields, num_layers: int, window: int | None) -> list[str]:
    fields.take("max_window_layers", "integer")
    return [_sliding(window is not None)] * num_layers


def _sliding(slides: bool) -> str:
    return "sliding_attention" if slides else "full_attention"


def _interleaved(fields: Fields, num_layers: int, window: int | None) -> list[str]:
    interval = fields.take("full_attention_interval", "integer", 4)
    if interval < 1:
        raise fields.refuse("full_attention_interval", interval, "at least 1 is needed")
    return [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)
    ]


_FAMILIES = {
    "qwen2": _Family("Qwen2", _Bias.QKV_ALWAYS, 32, layer_kinds=_upper_slide),
    "qwen2_moe": _Family(
        "Qwen2Moe", _Bias.QKV_BY_FIELD, 16, experts=_Renormalise.NO, shared_expert=True,
        layer_kinds=_every_other_lower_slides,
    ),
    "qwen3": _Family(
        "Qwen3", _Bias.ALL_BY_FIELD, 32, 128, qk_norm=True, layer_kinds=_upper_slide
    ),
    "qwen3_moe": _Family(
        "Qwen3Moe", _Bias.ALL_BY_FIELD, 4, qk_norm=True, experts=_Renormalise.NO,
        layer_kinds=_all_slide,
    ),
    "qwen3_next": _Family(
        "Qwen3Next", _Bias.ALL_BY_FIELD, 2, 256, qk_norm=True, hybrid=True,
        experts=_Renormalise.YES, shared_expert=True, layer_kinds=_interleaved,
    ),
    "qwen3_5_text": _Family(
        "Qwen3_5", _Bias.ALL_BY_FIELD, 4, 256, qk_norm=True, hybrid=True,
        layer_kinds=_interleaved,
    ),
    "qwen3_5_moe_text": _Family(
        "Qwen3_5Moe", _Bias.ALL_BY_FIELD, 2, 256, qk_norm=True, hybrid=True,
        experts=_Renormalise.ALWAYS, shared_expert=True, dense_layers=False,
        layer_kinds=_interleaved,
    ),
}  # fmt: skip

# The families that are others with experts in place of the feed-forward block.
_WITH_EXPERTS = {
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "qwen3_5_text": "qwen3_5_moe_text",
}

# The vision-language models whose text tower is one of the families.
_TEXT_TOWERS = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}

# What a vision-language model has beside its text tower.
_OF_PICTURES = frozenset(
    """
    text_config vision_config model_type image_token_id video_token_id vision_start_token_id
    vision_end_token_id language_model_only
""".split()
)

# Fields where the whole of a vision-language model decides, whatever its text tower says.
_OF_THE_WHOLE = ("tie_word_embeddings", "id2label", "label2id", "num_labels")

# A file beside config.json, with the `sparse_attention_config` of engines that prefill sparsely.
_SPARSE_PATTERN = "sparse_attention_config.json"

# Fields with one value that the decoder computes; any other is a mechanism it does not have.
_ONLY = {
    "hidden_act": "silu",
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "mlp_bias": False,
    "no_bias": True,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "scale_attn_weights": True,
    "use_cache_quantization": False,
    "partial_rotary_factor": 1.0,
    "mamba_ssm_dtype": "float32",
    "mtp_use_dedicated_embeddings": False,
    "output_gate_type": "swish",
    "use_mrope": False,
}

# It says how tensors are stored and nothing of the model: `checkpoint.quantised` reads it.
_OF_STORAGE = "quantization_config"

# Where removing the field, as `_refuse_leftovers` advises, would not help.
_WHY_REFUSED = dict.fromkeys(
    ("quantization", "compression_config"),
    "quantised tensors are not read; use the unquantised checkpoint",
)


def load_config(directory: Path) -> ModelConfig:
    """Reads `directory/config.json`, and that a pattern of sparse attention lies beside it.

    Raises:
      UserError: absent or broken file, unknown `model_type`, or a field that is not honoured.
    """
    path = Path(directory) / "config.json"
    raw = read_json_object(path)
    dual = raw.get("dual_chunk_attention_config")
    if dual and isinstance(dual, dict) and path.with_name(_SPARSE_PATTERN).is_file():
        raw["dual_chunk_attention_config"] = dual | {"sparse_attention_config": _SPARSE_PATTERN}
    return read_hf_config(raw, str(path))


def read_hf_config(raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads a parsed `config.json`; `source` names it in errors.

    Raises:
      UserError: unknown `model_type`, a missing or mistyped field, or one that is not honoured.
    """
    fields = Fields(raw, source)
    family = fields.require("model_type", "string")
    if family in _TEXT_TOWERS:
        fields = _text_tower(fields)
        family = _TEXT_TOWERS[family]
    if family not in _READERS:
        raise UserError(
            f"{source}: model_type = {shown(family)} is unknown; "
            f"known: {', '.join(sorted((*_READERS, *_TEXT_TOWERS)))}"
        )
    try:
        config = _READERS[family](fields, family)
    except UserError as error:
        if str(error).startswith(source):
            raise
        raise UserError(f"{source}: {error}") from None
    _refuse_leftovers(fields)
    return config


def _text_tower(fields: Fields) -> Fields:
    """The fields of the text tower of a vision-language model, as one model's."""
    text = fields.require("text_config", "object")
    inner = {k: v for k, v in text.items() if k not in ("model_type", "architectures")}
    for name in ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "dtype",
                 "torch_dtype", "quantization_config"):  # fmt: skip
        outer = fields.values.get(name)
        if outer is not None and inner.get(name) is None:
            inner[name] = outer
    inner |= {name: fields.values.get(name) for name in _OF_THE_WHOLE}
    outer = {k: v for k, v in fields.values.items() if k not in inner and k not in _OF_PICTURES}
    _refuse_leftovers(Fields(outer, fields.source))
    return Fields(inner, f"{fields.source}: text_config")


def _refuse_leftovers(fields: Fields) -> None:
    for name, value in fields.values.items():
        if name in _ONLY:
            # Null means the default, but for is_causal, where transformers takes it for false.
            if value != _ONLY[name] and (value is not None or name == "is_causal"):
                raise fields.refuse(name, value, f"only {shown(_ONLY[name])} is")
            continue
        # Null and empty ask for nothing; false may ask for a mechanism to be left out.
        if name in _INERT or name == _OF_STORAGE or value in (None, [], {}, ""):
            continue
        why = "it may change the logits; remove the field if you know that it does not"
        raise fields.refuse(name, value, _WHY_REFUSED.get(name, why))


def _read_decoder(fields: Fields, name: str) -> ModelConfig:
    """Every family but the first generation."""
    family = _FAMILIES[name]
    head = read_head(fields, family.stem, _is_tower(name))
    hidden_size = fields.require("hidden_size", "integer")
    num_heads = fields.require("num_attention_heads", "integer")
    num_layers = fields.require("num_hidden_layers", "integer")
    if num_layers < 1:
        raise fields.refuse("num_hidden_layers", num_layers, "at least 1 is needed")
    # transformers takes null for the number of heads, an absent field for its default.
    kv_heads = num_heads if "num_key_value_heads" in fields.values else family.num_key_value_heads
    head_dim = fields.take("head_dim", "integer", family.head_dim)
    qkv_bias, output_bias = _read_biases(fields, name, family.bias)
    max_position_embeddings = fields.take("max_position_embeddings", "integer", 32768)
    layer_types, sliding_window = _read_layer_types(fields, num_layers, family)
    if family.hybrid and not fields.take("attn_output_gate", "boolean", True):
        raise fields.refuse("attn_output_gate", False, "this model_type always has the gate")
    moe = _read_experts(fields, num_layers, family)
    if fields.take("use_qk_norm", "boolean", family.qk_norm) != family.qk_norm:
        raise fields.refuse("use_qk_norm", not family.qk_norm, f"{name} is the other way")
    return ModelConfig(
        family=name,
        vocab_size=fields.require("vocab_size", "integer"),
        hidden_size=hidden_size,
        intermediate_size=_read_width(fields, moe, num_layers),
        num_attention_heads=num_heads,
        num_key_value_heads=fields.take("num_key_value_heads", "integer", kv_heads),
        head_dim=hidden_size // max(num_heads, 1) if head_dim is None else head_dim,
        layer_types=layer_types,
        max_position_embeddings=max_position_embeddings,
        rope=read_rope(fields, max_position_embeddings, 0.25 if family.hybrid else None),
        rms_norm_eps=float(fields.take("rms_norm_eps", "number", 1e-6)),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=family.qk_norm,
        output_gate=family.hybrid,
        zero_centered_norm=family.hybrid,
        dual_chunk=_read_dual_chunk(fields),
        delta=_read_delta(fields, layer_types) if family.hybrid else None,
        moe=moe,
        sliding_window=sliding_window,
        **head,
        **_read_common(fields),
    )


def _read_common(fields: Fields) -> dict[str, Any]:
    eos = fields.take("eos_token_id", "integer or list of integers", [])
    return {
        "tie_word_embeddings": fields.take("tie_word_embeddings", "boolean", False),
        "initializer_range": float(fields.take("initializer_range", "number", 0.02)),
        "dtype": _read_dtype(fields),
        "bos_token_id": fields.take("bos_token_id", "integer"),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_token_id": fields.take("pad_token_id", "integer"),
    }


def _read_biases(fields: Fields, family: str, bias: _Bias) -> tuple[bool, bool]:
    """Whether queries, keys and values have biases, and whether the output has one."""
    if bias is _Bias.ALL_BY_FIELD:
        if fields.take("qkv_bias", "boolean", False):
            raise fields.refuse("qkv_bias", True, f"biases of {family} go by attention_bias")
        both = fields.take("attention_bias", "boolean", False)
        return both, both
    found = {name: fields.take(name, "boolean", True) for name in ("attention_bias", "qkv_bias")}
    if bias is _Bias.QKV_BY_FIELD:
        return found["qkv_bias"], False
    for name, value in found.items():
        if not value:
            raise fields.refuse(name, False, f"{family} always has q, k and v biases")
    return True, False


def _read_experts(fields: Fields, num_layers: int, family: _Family) -> MoeSpec | None:
    if family.experts is None:
        return None
    # A second name that transformers 5 writes.
    names = {
        name: fields.take(name, "integer")
        for name in ("num_experts", "num_local_experts")
        if fields.values.get(name) is not None
    }
    if len(set(names.values())) > 1:
        raise UserError(f"{fields.source}: {disagreement(names)}")
    num_experts = next(iter(names.values()), None)
    if num_experts is None:
        raise UserError(f"{fields.source}: num_experts is missing and needed, as an integer")
    step = fields.take("decoder_sparse_step", "integer", 1)
    if step < 1:
        raise fields.refuse("decoder_sparse_step", step, "at least 1 is needed")
    dense = fields.take("mlp_only_layers", "list of integers", [])
    layers = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    if not family.dense_layers and len(layers) < num_layers:
        raise UserError(
            f"{fields.source}: decoder_sparse_step = {step} and mlp_only_layers = {dense} leave "
            "layers without experts, which this model_type does not have; remove both"
        )
    renormalise = True
    if family.experts is not _Renormalise.ALWAYS:
        renormalise = fields.take("norm_topk_prob", "boolean", family.experts.value)
    elif not fields.take("norm_topk_prob", "boolean", True):
        raise fields.refuse("norm_topk_prob", False, "this model_type always renormalises")
    shared = None
    if family.shared_expert:
        shared = fields.require("shared_expert_intermediate_size", "integer")
    elif width := fields.take("shared_expert_intermediate_size", "integer", 0):
        raise fields.refuse(
            "shared_expert_intermediate_size", width, "this model_type has no shared expert"
        )
    spec = MoeSpec(
        layers=layers,
        num_experts=num_experts or 1,
        num_experts_per_tok=fields.require("num_experts_per_tok", "integer"),
        intermediate_size=fields.require("moe_intermediate_size", "integer"),
        renormalise=renormalise,
        shared_intermediate_size=shared,
        aux_loss_coef=float(fields.take("router_aux_loss_coef", "number", 0.001)),
        score_bias=fields.take("router_score_bias", "boolean", False),
    )
    return spec if layers and num_experts else None


def _read_width(fields: Fields, moe: MoeSpec | None, num_layers: int) -> int:
    """The dense width; where no layer is dense, the files may not have it and nobody reads it."""
    if moe is not None and len(moe.layers) == num_layers:
        return fields.take("intermediate_size", "integer", moe.intermediate_size)
    return fields.require("intermediate_size", "integer")


def _read_delta(fields: Fields, layer_types: tuple[LayerKind, ...]) -> DeltaSpec | None:
    sizes = {
        "num_key_heads": fields.take("linear_num_key_heads", "integer", 16),
        "num_value_heads": fields.take("linear_num_value_heads", "integer", 32),
        "key_head_dim": fields.take("linear_key_head_dim", "integer", 128),
        "value_head_dim": fields.take("linear_value_head_dim", "integer", 128),
        "conv_kernel_dim": fields.take("linear_conv_kernel_dim", "integer", 4),
    }
    return DeltaSpec(**sizes) if LayerKind.LINEAR_ATTENTION in layer_types else None


def _read_dual_chunk(fields: Fields) -> DualChunkSpec | None:
    """Dual Chunk Attention, with the defaults of the engine that it was published for (vLLM)."""
    raw = fields.take("dual_chunk_attention_config", "object")
    if not raw:
        return None
    inner = Fields(raw, f"{fields.source}: dual_chunk_attention_config")
    spec = DualChunkSpec(
        inner.take("chunk_size", "integer", 8192),
        inner.take("local_size", "integer", 1024),
        inner.take("original_max_position_embeddings", "integer", 0),
    )
    sparse_config = inner.take("sparse_attention_config", "anything")
    inner.take("sparse_attention_threshold", "integer")
    inner.take("sparse_attention_last_q", "integer")
    if inner.take("sparse_attention_enabled", "boolean", sparse_config is not None):
        warnings.warn(
            f"{inner.source}: sparse_attention_enabled, true where a pattern is given and nothing "
            "else is said, asks for approximate attention in long prompts; attention is exact here",
            stacklevel=2,
        )
    for name, value in inner.values.items():
        raise inner.refuse(name, value, "it is not known; remove it")
    return spec


def _read_qwen1(fields: Fields, family: str) -> ModelConfig:
    """The first generation, whose code came with the checkpoints."""
    architectures = fields.take("architectures", "list of strings", [])
    if architectures not in ([], ["QWenLMHeadModel"]):
        raise fields.refuse("architectures", architectures, "only QWenLMHeadModel is for qwen")
    num_heads = fields.require("num_attention_heads", "integer")
    num_layers = fields.require("num_hidden_layers", "integer")
    max_positions = fields.take("max_position_embeddings", "integer", 8192)
    trained = fields.take("seq_length", "integer", max_positions)
    doubled = fields.require("intermediate_size", "integer")
    if doubled % 2:
        raise fields.refuse("intermediate_size", doubled, "qwen's is twice the width, so even")
    stepped = fields.take("use_dynamic_ntk", "boolean", True)
    theta = float(fields.take("rotary_emb_base", "number", 10_000.0))
    flags = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    flagged = [dtype for flag, dtype in flags.items() if fields.take(flag, "boolean", False)]
    if flagged and not any(fields.values.get(name) for name in ("dtype", "torch_dtype")):
        fields.values["torch_dtype"] = flagged[0]
    return ModelConfig(
        family=family,
        vocab_size=fields.require("vocab_size", "integer"),
        hidden_size=fields.require("hidden_size", "integer"),
        intermediate_size=doubled // 2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=fields.take("kv_channels", "integer", 128),
        layer_types=(LayerKind.FULL_ATTENTION,) * num_layers,
        max_position_embeddings=max_positions,
        rope=RopeSpec(
            theta=theta,
            kind=RopeKind.STEPPED_NTK if stepped else RopeKind.DEFAULT,
            original_max_position_embeddings=trained if stepped else None,
            partial_rotary_factor=float(fields.take("rotary_pct", "number", 1.0)),
            in_float32=True,
        ),
        rms_norm_eps=float(fields.take("layer_norm_epsilon", "number", 1e-6)),
        qkv_bias=True,
        logn_length=trained if fields.take("use_logn_attn", "boolean", True) else None,
        **_read_common(fields),
    )


_READERS: dict[str, Callable[[Fields, str], ModelConfig]] = {
    "qwen": _read_qwen1,
    **dict.fromkeys(_FAMILIES, _read_decoder),
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


def _read_layer_types(
    fields: Fields, num_layers: int, family: _Family
) -> tuple[tuple[LayerKind, ...], int | None]:
    """`layer_types` where given, else by the family's rule; and the window of sliding layers."""
    use_window = fields.take("use_sliding_window", "boolean", False)
    if family.hybrid and use_window:
        raise fields.refuse("use_sliding_window", True, "no layer of this model_type slides")
    default_window = None if "sliding_window" in fields.values else 4096
    window = fields.take("sliding_window", "integer", default_window)
    if not use_window:
        window = None
    by_rule = family.layer_kinds(fields, num_layers, window)
    layer_types = fields.take("layer_types", "list of strings", by_rule)
    if family.layer_kinds is _all_slide and layer_types != by_rule:
        raise fields.refuse("layer_types", layer_types, "all layers of this model_type are alike")
    known = [LayerKind.FULL_ATTENTION]
    known += [LayerKind.LINEAR_ATTENTION if family.hybrid else LayerKind.SLIDING_ATTENTION]
    for kind in layer_types:
        if kind not in known:
            raise fields.refuse("layer_types", kind, f"known: {', '.join(known)}")
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


def with_experts(config: ModelConfig, moe: MoeSpec) -> ModelConfig:
    """`config` of the family that has experts, which `moe` describes; the rest stays.

    Raises:
      UserError: the model has experts already, or no family has such ones.
    """
    if config.moe is not None:
        raise UserError(f"a model of {config.moe.num_experts} experts has experts already")
    if config.family not in _WITH_EXPERTS:
        raise UserError(
            f"model_type = {config.family} has no kin with experts; there is one of "
            f"{', '.join(_WITH_EXPERTS)}"
        )
    family = _FAMILIES[_WITH_EXPERTS[config.family]]
    if family.shared_expert and moe.shared_intermediate_size is None:
        raise UserError(
            f"shared_intermediate_size is missing: {_WITH_EXPERTS[config.family]} always has an "
            "expert that every token goes to"
        )
    changed = dataclasses.replace(config, family=_WITH_EXPERTS[config.family], moe=moe)
    if len(moe.layers) == config.num_hidden_layers:
        # No layer reads the dense width, and readers of the file may not find it there.
        changed = dataclasses.replace(changed, intermediate_size=moe.intermediate_size)
    write_hf_config(changed)
    return changed


def write_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that reads back as `config`, in the layout that every reader knows.

    `rope_theta` + `rope_scaling` and `torch_dtype` are what transformers 4 and 5, and the engines
    beside them, all accept. The MTP head is told by its tensors.

    Raises:
      UserError: a field of `config` that the format has no place for.
    """
    fields = _write_qwen1(config) if config.family == "qwen" else _write_decoder(config)
    fields |= {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _write_eos(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.dtype,
        "use_cache": True,
    }
    with warnings.catch_warnings():
        # What the config says was told when it was read.
        warnings.simplefilter("ignore")
        back = read_hf_config(fields, "the config.json to write")
    back = dataclasses.replace(back, mtp_layers=config.mtp_layers)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if getattr(back, field.name) != value:
            raise UserError(
                f"a config.json of model_type {config.family} cannot say {field.name} = {value}"
            )
    return fields


def _write_decoder(config: ModelConfig) -> dict[str, Any]:
    family = _FAMILIES[config.family]
    fields = {
        **head_fields(config),
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "attention_dropout": 0.0,
        "rope_theta": config.rope.theta,
        "rope_scaling": write_rope_scaling(config.rope),
        "layer_types": [kind.value for kind in config.layer_types],
    }
    match family.bias:
        case _Bias.QKV_BY_FIELD:
            fields["qkv_bias"] = config.qkv_bias
        case _Bias.ALL_BY_FIELD:
            fields["attention_bias"] = config.qkv_bias
    if family.hybrid:
        fields["partial_rotary_factor"] = config.rope.partial_rotary_factor
    else:
        fields |= _write_window(config, family)
    if config.delta is not None:
        delta = dataclasses.asdict(config.delta)
        fields |= {f"linear_{name}": value for name, value in delta.items()}
    if family.experts is not None:
        fields |= _write_experts(config, family)
    if config.dual_chunk is not None:
        fields["dual_chunk_attention_config"] = dataclasses.asdict(config.dual_chunk)
    return fields


def _write_window(config: ModelConfig, family: _Family) -> dict[str, Any]:
    fields = {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
    }
    if family.layer_kinds is _upper_slide:
        # For readers that know no layer_types.
        slides = LayerKind.SLIDING_ATTENTION
        fields["max_window_layers"] = (*config.layer_types, slides).index(slides)
    return fields


def _write_experts(config: ModelConfig, family: _Family) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        raise UserError(f"a config.json of model_type {config.family} cannot say moe = None")
    fields = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.intermediate_size,
        "router_aux_loss_coef": moe.aux_loss_coef,
    }
    if family.dense_layers:
        dense = [i for i in range(config.num_hidden_layers) if i not in moe.layers]
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if family.experts is not _Renormalise.ALWAYS:
        fields["norm_topk_prob"] = moe.renormalise
    if moe.score_bias:
        # No published checkpoint has one; other readers do not know the field.
        fields["router_score_bias"] = True
    if moe.shared_intermediate_size is not None:
        fields["shared_expert_intermediate_size"] = moe.shared_intermediate_size
    return fields


def _write_qwen1(config: ModelConfig) -> dict[str, Any]:
    trained = config.rope.original_max_position_embeddings or config.logn_length
    return {
        "architectures": ["QWenLMHeadModel"],
        "intermediate_size": 2 * config.intermediate_size,
        "kv_channels": config.head_dim,
        "layer_norm_epsilon": config.rms_norm_eps,
        "rotary_emb_base": config.rope.theta,
        "rotary_pct": config.rope.partial_rotary_factor,
        "seq_length": trained or config.max_position_embeddings,
        "use_dynamic_ntk": config.rope.kind is RopeKind.STEPPED_NTK,
        "use_logn_attn": config.logn_length is not None,
        "no_bias": True,
    }


def head_fields(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of the head of `config`; not of the first generation.

    Raises:
      UserError: a number of labels that no architecture with this head has.
    """
    return write_head(config, _FAMILIES[config.family].stem, _is_tower(config.family))


def _is_tower(family: str) -> bool:
    return family in _TEXT_TOWERS.values()


def _write_eos(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else (list(ids) or None)
