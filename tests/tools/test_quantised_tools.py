"""Quantised checkpoints on the command lines."""

import re

import pytest

from tests.checkpoint.quantised_layouts import quantise_directory
from tests.checkpoint.test_quantised_models import LAYOUTS, is_linear
from tests.reference import random_reference, save_reference
from tests.tools.conftest import refusal, write_tokenizer


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A small GPTQ checkpoint with a tokenizer."""
    directory = tmp_path_factory.mktemp("quantised")
    save_reference(random_reference("qwen3", num_hidden_layers=1), directory)
    quantise_directory(directory, *LAYOUTS["gptq 4 bits"], is_linear)
    write_tokenizer(directory)
    return directory


def test_generation_prints_the_memory_and_writes_the_same_either_way(run_tool, quantised):
    outputs, memory = [], []
    for weights in ("dense", "packed"):
        done = run_tool(
            "generate", f"--model={quantised}", "--prompt=the sea", "--temperature=0",
            "--max_new_tokens=5", f"--weights={weights}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        line = rf"gptq, 4 bits, {weights}: parameters take ([\d.]+) MB\n"
        memory.append(float(re.fullmatch(line, done.stderr)[1]))
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] != ""
    assert memory[1] < memory[0]


def test_verification_is_against_the_dequantised_reference(run_tool, quantised):
    done = run_tool("verify", f"--model={quantised}", "--weights=packed", "--tokens=8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "top-1 agreement 100.00%" in done.stdout


def test_packed_weights_of_a_plain_checkpoint_are_refused(run_tool, checkpoint):
    done = run_tool("generate", f"--model={checkpoint}", "--prompt=a", "--weights=packed")
    assert "not quantised" in refusal(done)


def test_quantising_says_what_it_saves_and_what_it_costs(run_tool, checkpoint, tmp_path):
    target = tmp_path / "int8"
    done = run_tool(
        "convert", f"--source={checkpoint}", f"--target={target}", "--format=hf",
        "--quantize=int8", "--measure",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    wrote, measured = done.stdout.splitlines()
    ratio = re.fullmatch(r"wrote .*, hf format, int8: (0\.\d\d) of the size unquantised", wrote)
    assert 0.25 < float(ratio[1]) < 0.7
    pattern = (
        r"KL\(original \|\| quantised\) (\S+) nats a token, top-1 agreement (\S+)%, over (\d+) "
        r"tokens of text"
    )
    kl, agreement, tokens = map(float, re.fullmatch(pattern, measured).groups())
    assert 0 < kl < 0.01
    assert agreement > 80
    assert tokens > 200


def test_a_quantised_source_is_said_to_be_dequantised(run_tool, quantised, tmp_path):
    done = run_tool(
        "convert", f"--source={quantised}", f"--target={tmp_path / 'dense'}", "--format=hf"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("hf format, dequantised\n")


def test_measuring_needs_something_to_measure(run_tool, checkpoint, tmp_path):
    done = run_tool(
        "convert", f"--source={checkpoint}", f"--target={tmp_path / 'a'}", "--format=hf",
        "--measure",
    )  # fmt: skip
    assert "--quantize" in refusal(done)
    assert not (tmp_path / "a").exists()
