"""Checkpoints of random weights."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import qwen_jax
from configs.models import get_preset
from qwen_jax.errors import UserError
from qwen_jax.evaluation.random_checkpoint import write_random_checkpoint
from qwen_jax.hf_config import read_hf_config
from tests.reference import random_reference, save_reference

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "qwen3_next", "qwen3_5_text"])
def test_every_tensor_is_random_and_norms_are_around_one(family, tmp_path):
    fields = random_reference(family).config.to_dict()
    config = read_hf_config({key: fields[key] for key in fields if key != "_attn_implementation"})
    write_random_checkpoint(config, tmp_path / "model")
    _, params = qwen_jax.load_pretrained(tmp_path / "model")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert np.std(leaf) > 0.01, path
    factor = np.mean(params["norm"]["weight"]) + config.zero_centered_norm
    assert 0.8 < factor < 1.2


def test_a_part_of_the_layers_is_a_model(tmp_path):
    config = read_hf_config(random_reference("qwen3_next").config.to_dict() | {"id2label": None})
    part = config.with_layers([1, 3])
    assert [kind.value for kind in part.layer_types] == ["linear_attention", "full_attention"]
    assert part.moe.layers == (0, 1)
    assert config.with_layers([3]).delta is None
    write_random_checkpoint(part, tmp_path / "model")
    model, _ = qwen_jax.load_pretrained(tmp_path / "model")
    assert dataclasses.replace(model.config, dtype=part.dtype) == part
    with pytest.raises(UserError, match="layer 4 is not one of the model's 4"):
        config.with_layers([0, 4])


@pytest.mark.parametrize("preset", ["qwen-1_8b", "qwen2.5-math-rm-72b"])
def test_what_the_reference_cannot_write_is_refused(preset, tmp_path):
    with pytest.raises(UserError, match="transformers has no language model to write"):
        write_random_checkpoint(get_preset(preset), tmp_path / "model")
    assert not (tmp_path / "model").exists()


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
