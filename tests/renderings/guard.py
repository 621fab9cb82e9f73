"""The guard, whose published code is remote: its head from its formulas, on a bare model."""

import json
from pathlib import Path

import safetensors.torch
import torch
import transformers

from tests.reference import random_reference

SIZES = {
    "guard_inner_size": 24,
    "num_risk_level": 3,
    "num_category": 8,
    "num_query_risk_level": 3,
    "num_query_category": 9,
}
LEVELS = {"0": "Safe", "1": "Unsafe", "2": "Controversial"}


class GuardModel(torch.nn.Module):
    """A projection and a norm, then two linear layers; twice, and all without biases."""

    def __init__(self, base: transformers.PreTrainedModel, sizes: dict[str, int] = SIZES):
        super().__init__()
        inner = sizes["guard_inner_size"]
        self.model, self.eps = base, base.config.rms_norm_eps
        for query in ("", "query_"):
            for name, width in (
                ("risk_level_head", sizes[f"num_{query}risk_level"]),
                ("category_head", sizes[f"num_{query}category"]),
            ):
                self.register_module(query + name, torch.nn.Linear(inner, width, bias=False))
            project = torch.nn.Linear(base.config.hidden_size, inner, bias=False)
            self.register_module(f"{query}risk_level_category_pre", project)
            norm = torch.nn.RMSNorm(inner, self.eps)
            self.register_module(f"{query}risk_level_category_layernorm", norm)

    def forward(self, ids, mask=None):
        """[B, T, 3 + 8 + 3 + 9]: risk and category of an answer, then of a query."""
        x = self.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        parts = []
        for query in ("", "query_"):
            y = self.get_submodule(f"{query}risk_level_category_pre")(x)
            y = self.get_submodule(f"{query}risk_level_category_layernorm")(y)
            parts += [self.get_submodule(f"{query}{n}_head")(y) for n in ("risk_level", "category")]
        return torch.cat(parts, dim=-1)


def random_guard(seed: int = 0) -> GuardModel:
    """Every tensor random; logits of unit scale."""
    model = GuardModel(random_reference("qwen3", seed, transformers.AutoModel)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model."):
                continue
            noise = torch.randn_like(parameter)
            is_norm = parameter.ndim == 1
            parameter.copy_(1 + 0.3 * noise if is_norm else noise / parameter.shape[-1] ** 0.5)
    return model


def save_guard(model: GuardModel, directory: Path) -> Path:
    """A directory as the published ones are."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    maps = {f"{what}_risk_level_map": LEVELS for what in ("query", "response")}
    maps |= {f"{what}_category_map": {"0": "Violent"} for what in ("query", "response")}
    config = model.model.config.to_dict() | SIZES | maps
    config |= {"architectures": ["Qwen3ForGuardModel"], "auto_map": {"AutoModel": "remote.Code"}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
