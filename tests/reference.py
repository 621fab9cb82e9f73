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
_CONFIGS = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}


def random_reference(family: str, seed: int = 0, **fields: Any) -> transformers.PreTrainedModel:
    """A float32 model in eval mode: weights, biases and norms random, logits of unit scale."""
    fields = {**_SMALL, **({"head_dim": 24} if family == "qwen3" else {}), **fields}
    attention = fields.pop("attn_implementation")
    config = _CONFIGS[family](**fields)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        ids = torch.arange(64)[None] % config.vocab_size
        # The final norm scales tied and untied logits alike.
        model.model.norm.weight /= model(ids).logits.std()
    forget_lengths(model)
    return model


def forget_lengths(model: transformers.PreTrainedModel) -> None:
    """Makes length-dependent RoPE stateless: transformers keeps the longest text's frequencies."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


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
