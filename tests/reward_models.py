"""The two-layer reward heads, whose published code is remote, as plain PyTorch modules."""

import json
from pathlib import Path

import safetensors.torch
import torch
import transformers

from tests.reference import random_reference

ARCHITECTURES = {1: "Qwen2ForRewardModel", 2: "Qwen2ForProcessRewardModel"}


class RewardModel(torch.nn.Module):
    """A bare model and the head: linear, ReLU, linear, all with biases."""

    def __init__(self, base: transformers.PreTrainedModel, labels: int):
        super().__init__()
        width = base.config.hidden_size
        self.model = base
        self.score = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, labels)
        )

    def forward(self, ids, mask=None):
        """Scores [B, T, labels] at every token."""
        out = self.model(ids, attention_mask=mask, use_cache=False)
        return self.score(out.last_hidden_state)


def random_reward_model(labels: int, seed: int = 0, **fields) -> RewardModel:
    """Every tensor random, the head's biases too; scores of unit scale."""
    base = random_reference("qwen2", seed, transformers.AutoModel, **fields)
    model = RewardModel(base, labels).eval()
    with torch.no_grad():
        for name, parameter in model.score.named_parameters():
            scale = 0.5 if name.endswith("bias") else (2 / parameter.shape[-1]) ** 0.5
            parameter.copy_(scale * torch.randn_like(parameter))
    return model


def save_reward_model(model: RewardModel, directory: Path, **more: torch.Tensor) -> Path:
    """A directory as the published ones are, with `more` tensors in it."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in {**model.state_dict(), **more}.items()}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    labels = model.score[-1].out_features
    config = model.model.config.to_dict()
    config |= {"architectures": [ARCHITECTURES[labels]], "auto_map": {"AutoModel": "remote.Code"}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
