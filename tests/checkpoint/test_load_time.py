"""From a bfloat16 file to float32 logits, against transformers, in fresh processes."""

import os
import statistics

import pytest
import torch
import transformers

from qwen_jax.benchmark.engines import ENGINES
from qwen_jax.benchmark.loading import measure_load
from tests.reference import save_reference

ROUNDS = 3


@pytest.mark.slow
def test_bf16_file_to_fp32_logits_takes_at_most_1_2_times_transformers(tmp_path, capsys):
    config = transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_reference(reference, tmp_path)
    del reference
    # Or the first process would share the disk with the writing of the file.
    os.sync()
    totals = {name: [] for name in ENGINES}
    for _ in range(ROUNDS):
        # Turn by turn, so that a drifting machine hits both alike.
        for name in ENGINES:
            load = measure_load(name, tmp_path)
            totals[name].append(load.load_s + load.first_s)
            with capsys.disabled():
                print(f"\n{name}: load + first pass {load.load_s:.2f} + {load.first_s:.2f} s")
    ours, theirs = map(statistics.median, totals.values())
    assert ours <= 1.2 * theirs
