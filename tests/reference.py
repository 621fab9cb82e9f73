"""The outside truth: transformers models with every tensor randomised, run in PyTorch."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

_SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 1_000_000.0,
    "attn_implementation": "eager",
}
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 56}
_HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
}
# Of each model_type: its configuration class, and fields beside the small ones.
_FAMILIES = {
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2_moe": (transformers.Qwen2MoeConfig, _SHARED),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 24}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, {"head_dim": 24, **_EXPERTS}),
    "qwen3_next": (transformers.Qwen3NextConfig, {**_HYBRID, **_SHARED}),
    "qwen3_5_text": (transformers.Qwen3_5TextConfig, _HYBRID),
    "qwen3_5_moe_text": (transformers.Qwen3_5MoeTextConfig, {**_HYBRID, **_SHARED}),
}
_ZERO_CENTERED = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def random_reference(
    family: str,
    seed: int = 0,
    auto_class: type = transformers.AutoModelForCausalLM,
    **fields: Any,
) -> transformers.PreTrainedModel:
    """A float32 model in eval mode: weights, biases and norms random, logits of unit scale."""
    config_class, own_fields = _FAMILIES[family]
    fields = {**_SMALL, **own_fields, **fields}
    if "rope_parameters" in fields:
        del fields["rope_theta"]
    attention = fields.pop("attn_implementation")
    config = config_class(**fields)
    config._attn_implementation = attention
    # The other implementations take no matrices of odd sizes.
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = auto_class.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("norm.weight"):
                centered = family in _ZERO_CENTERED and not name.endswith("linear_attn.norm.weight")
                parameter.copy_((0 if centered else 1) + 0.3 * noise)
            elif name.endswith("dt_bias"):
                # States that last: outputs near zero would be normed up with their rounding, in
                # PyTorch's float32 by more than the tolerance of a comparison with float64.
                parameter.copy_(0.5 * noise - 3)
            elif name.endswith(("bias", "A_log")):
                parameter.copy_(0.5 * noise)
            elif name.endswith("conv1d.weight"):
                # Wide, so that the SiLU behind it makes keys and queries of mostly positive values:
                # at right angles to each other they would leave the first outputs near zero too.
                parameter.copy_(1.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        ids = torch.arange(64)[None] % config.vocab_size
        # The final norm scales tied and untied logits alike.
        norm, offset = model.base_model.norm.weight, int(family in _ZERO_CENTERED)
        norm.copy_((norm + offset) / _scale(model(ids)) - offset)
    forget_lengths(model)
    return model


def _scale(out: Any) -> torch.Tensor:
    return out.logits.std() if "logits" in out else out.last_hidden_state.std()


def forget_lengths(model: transformers.PreTrainedModel) -> None:
    """Makes length-dependent RoPE stateless: transformers keeps the longest text's frequencies."""
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(model.config)


def save_reference(model: transformers.PreTrainedModel, directory: Path, **options: Any) -> Path:
    """Writes `model` as transformers writes it, without its progress bar."""
    with quiet():
        model.save_pretrained(directory, **options)
    return directory


@contextlib.contextmanager
def quiet():
    """Runs transformers without progress bars."""
    transformers.utils.logging.disable_progress_bar()
    yield


def reference_logits(
    model: transformers.PreTrainedModel, ids: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """Logits [B, T, V] of one full pass, without a cache."""
    forget_lengths(model)
    with torch.no_grad():
        out = model(
            torch.as_tensor(ids),
            attention_mask=None if mask is None else torch.as_tensor(mask),
            use_cache=False,
        )
    return out.logits.float().numpy()
