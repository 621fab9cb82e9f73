"""In bfloat16 nobody equals the float32 reference; we may not be further off than it is itself."""

import copy

import numpy as np
import pytest
import torch

import qwen_jax
from tests.models.passes import mean_kl
from tests.reference import random_reference, reference_logits, save_reference


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "qwen3_next"])
def test_divergence_from_float32_is_no_larger_than_the_references(family, tmp_path):
    ratios = []
    for seed in range(3):
        reference = random_reference(family, seed, num_hidden_layers=6, hidden_size=128)
        # Both start from the same rounded weights, so that only the arithmetic differs.
        reference = reference.to(torch.bfloat16).float()
        rounded = copy.deepcopy(reference).to(torch.bfloat16)
        model, params = qwen_jax.load_pretrained(
            save_reference(rounded, tmp_path / str(seed)), dtype="bfloat16"
        )
        assert params["norm"]["weight"].dtype == "bfloat16"
        ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (4, 64))
        truth = reference_logits(reference, ids).astype(np.float64)
        ours = np.asarray(model.apply({"params": params}, ids).logits, np.float64)
        theirs = reference_logits(rounded, ids).astype(np.float64)
        ratios.append(mean_kl(ours, truth) / mean_kl(theirs, truth))
    assert max(ratios) <= 1.5, ratios
