"""Checkpoints of random weights."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

import qwen_jax
from qwen_jax.evaluation.random_checkpoint import write_random_checkpoint
from qwen_jax.hf_config import read_hf_config
from tests.reference import random_reference, save_reference

ROOT = Path(__file__).parents[2]


def test_every_tensor_is_random(tmp_path):
    fields = random_reference("qwen2").config.to_dict()
    config = read_hf_config({key: fields[key] for key in fields if key != "_attn_implementation"})
    write_random_checkpoint(config, tmp_path / "model")
    _, params = qwen_jax.load_pretrained(tmp_path / "model")
    attention = params["layers_0"]["self_attn"]
    for leaf in (
        attention["q_proj"]["bias"],
        params["norm"]["weight"],
        attention["q_proj"]["weight"],
    ):
        assert np.std(leaf) > 0.01


# Killed with config.json written, before the weights are.
KILLED = """
import os, signal, sys
from pathlib import Path
import transformers
from qwen_jax.evaluation.random_checkpoint import write_random_checkpoint
from qwen_jax.hf_config import load_config

def save(model, directory):
    (Path(directory) / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)

transformers.PreTrainedModel.save_pretrained = save
write_random_checkpoint(load_config(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_killed_write_leaves_nothing_that_looks_complete(tmp_path):
    tiny = save_reference(random_reference("qwen3"), tmp_path / "tiny")
    target = tmp_path / "preset"
    command = [sys.executable, "-c", KILLED, str(tiny), str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = (path for path in tmp_path.iterdir() if path != tiny)
    assert left.name.startswith(".preset.incomplete-")
    assert (left / "config.json").exists()
