"""The command line of tools.convert, as a user runs it."""

import pytest
import safetensors.numpy
from transformers import AutoModel

import qwen_jax
from tests.commands import only_line
from tests.reference import random_reference, save_reference
from tests.reward_models import random_reward_model, save_reward_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_reference(random_reference("qwen2"), tmp_path_factory.mktemp("source"))


def test_there_and_back_says_in_one_line_what_was_written(run_tool, source, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    for arguments, target in (
        ((f"--source={source}", f"--target={there}", "--format=orbax"), there),
        ((f"--source={there}", f"--target={back}", "--format=hf", "--dtype=bfloat16"), back),
    ):
        done = run_tool("convert", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"wrote {target}: 39 tensors, ")
        assert done.stdout.count("\n") == 1
    tensors = safetensors.numpy.load_file(back / "model.safetensors")
    assert {values.dtype.name for values in tensors.values()} == {"bfloat16"}
    qwen_jax.load_pretrained(back)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--source"),
        (("--source={source}", "--target={target}"), "--format"),
        (("--source={source}", "--target={target}", "--format=gguf"), "gguf"),
        (("--source={source}", "--target={target}", "--format=hf", "--dtype=int8"), "int8"),
        (("--source={source}", "--target={source}", "--format=hf"), "exists already"),
        (("--source={target}", "--target={target}", "--format=hf"), "no such directory"),
        (("--source={source}", "--target=", "--format=hf"), "--target is empty"),
        (("--source=", "--target={target}", "--format=hf"), "the source is empty"),
    ],
)
def test_bad_input_ends_as_one_line_and_status_1(run_tool, source, tmp_path, arguments, part):
    target = tmp_path / "target"
    done = run_tool("convert", *(a.format(source=source, target=target) for a in arguments))
    assert (done.returncode, done.stdout) == (1, "")
    line = only_line(done.stderr)
    assert part in line
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example_and_the_flags(run_tool):
    done = run_tool("convert", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m tools.convert --source=" in done.stdout
    assert "--format: <hf|orbax>" in done.stdout
    flags = " ".join(done.stdout.split())
    assert "<int8|int4>: With --format=hf: " in flags
    assert "With --quantize, of language models: " in flags


def test_predictions_of_a_model_that_makes_none_are_refused_before_writing(run_tool, tmp_path):
    embedder = random_reference("qwen3", 0, AutoModel, num_hidden_layers=1)
    save_reference(embedder, tmp_path / "embedder")
    save_reward_model(random_reward_model(1, num_hidden_layers=1), tmp_path / "reward")
    for name, kind in (("embedder", "an embedder"), ("reward", "a reward model")):
        source, target = tmp_path / name, tmp_path / "target"
        arguments = (f"--source={source}", f"--target={target}", "--format=hf", "--quantize=int8")
        done = run_tool("convert", *arguments, "--measure")
        assert (done.returncode, done.stdout) == (1, "")
        line = only_line(done.stderr)
        assert line.startswith(f"{source}: the model is {kind}")
        assert line.endswith("of the next token, which --measure compares; leave it out")
        assert not target.exists()
