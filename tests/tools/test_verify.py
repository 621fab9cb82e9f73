"""`python -m tools.verify`: the verdict is the exit status."""

import json
import shutil

import numpy as np
import pytest

from configs.models import get_preset
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.errors import UserError
from qwen_jax.evaluation.parity import compare_with_reference
from qwen_jax.hf_config import write_hf_config
from tests.commands import only_line
from tests.reward_models import random_reward_model, save_reward_model
from tests.tools.conftest import refusal


def test_a_good_checkpoint_passes_with_a_table(run_tool, checkpoint):
    result = run_tool("verify", f"--model={checkpoint}", "--prompt=the sea")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["max", "|diff|", "scale", "relative"]
    assert [" ".join(line.split()[:-3]) for line in lines[1:-1]] == [
        "embeddings",
        "layer 0",
        "final norm",
        "logits",
    ]
    assert all(float(line.split()[-1]) < 1e-4 for line in lines[1:-1])
    assert lines[-1] == "top-1 agreement 100.00%"


def test_a_difference_beyond_the_tolerance_fails(run_tool, checkpoint):
    result = run_tool("verify", f"--model={checkpoint}", "--tolerance=1e-12")
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 6
    line = only_line(result.stderr)
    assert line.startswith(f"{checkpoint}: ")
    assert line.endswith("beyond --tolerance=1e-12")


def test_without_the_reference_it_says_what_to_install(run_tool, checkpoint, tmp_path):
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    result = run_tool("verify", f"--model={checkpoint}", PYTHONPATH=str(tmp_path))
    assert "pip install -r requirements-dev.txt" in refusal(result)


def test_a_checkpoint_that_contradicts_itself_is_refused(run_tool, checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    assert str(directory) in refusal(run_tool("verify", f"--model={directory}"))


def test_of_a_reward_model_the_table_says_what_is_not_compared(run_tool, tmp_path):
    directory = save_reward_model(random_reward_model(1, num_hidden_layers=1), tmp_path / "reward")
    result = run_tool("verify", f"--model={directory}", "--tokens=8")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [" ".join(line.split()[:-3]) for line in lines[1:-1]] == ["embeddings", "final norm"]
    assert lines[-1] == (
        "the two_layer_score head is not compared: transformers has no class for it"
    )


def test_a_model_that_transformers_has_no_class_for_is_refused_plainly(run_tool, tmp_path):
    config = write_hf_config(get_preset("qwen-1_8b"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refusal(run_tool("verify", f"--model={tmp_path}")) == (
        f"transformers cannot load {tmp_path}: it has no class for model_type qwen, and code that "
        "a checkpoint brings is not run; there is nothing to compare with"
    )


def test_an_orbax_checkpoint_is_to_be_converted_first(checkpoint, tmp_path):
    target = tmp_path / "orbax"
    convert(checkpoint, target, "orbax")
    with pytest.raises(
        UserError, match=r"convert it first .*tools\.convert --format=hf$"
    ) as caught:
        compare_with_reference(target, np.arange(4)[None])
    assert str(caught.value).startswith(f"{target}: ")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"pad_token_id": 99999}, "Padding_idx must be within num_embeddings"),
        ({"use_cache": "maybe"}, "Validation error for field 'use_cache': "),
    ],
    ids=["line", "heading"],
)
def test_what_transformers_refuses_is_said_in_one_line(checkpoint, tmp_path, fields, reason):
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(UserError) as caught:
        compare_with_reference(directory, np.arange(4)[None])
    message = str(caught.value)
    assert message.startswith(f"transformers cannot load {directory}: {reason}")
    assert "\n" not in message
    assert not message.endswith(":")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--tolerance=nan", "--tolerance=nan should be"),
        ("--seed=-1", "flag --seed=-1"),
        ("--layers=0", "--layers is for a preset"),
    ],
    ids=["tolerance", "seed", "layers"],
)
def test_bad_flags_are_refused_in_one_line(run_tool, checkpoint, argument, message):
    assert refusal(run_tool("verify", f"--model={checkpoint}", argument)).startswith(message)


def test_more_tokens_than_positions_are_refused(run_tool, checkpoint):
    message = refusal(run_tool("verify", f"--model={checkpoint}", "--tokens=100000"))
    assert "100000 tokens are more than the model's" in message
    both = run_tool("verify", f"--model={checkpoint}", "--tokens=2", "--prompt=the sea")
    assert refusal(both) == "give --prompt or --tokens, and not both"


@pytest.mark.parametrize("layers", ["x", "0,-1", "", "0,28", "0,0", "3,2"])
def test_layers_that_a_preset_does_not_have_are_refused(run_tool, layers):
    message = refusal(run_tool("verify", "--model=qwen3-0.6b", f"--layers={layers}"))
    assert "layer" in message
