"""The command line of tools.convert, as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy

import qwen_jax
from tests.reference import random_reference, save_reference

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.convert", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_reference(random_reference("qwen2"), tmp_path_factory.mktemp("source"))


def test_there_and_back_says_in_one_line_what_was_written(source, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    for arguments, target in (
        ((f"--source={source}", f"--target={there}", "--format=orbax"), there),
        ((f"--source={there}", f"--target={back}", "--format=hf", "--dtype=bfloat16"), back),
    ):
        done = run(*arguments)
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
    ],
)
def test_bad_input_ends_as_one_line_and_status_1(source, tmp_path, arguments, part):
    target = tmp_path / "target"
    done = run(*(a.format(source=source, target=target) for a in arguments))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert part in line
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example_and_the_flags():
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m tools.convert --source=" in done.stdout
    assert "--format: <hf|orbax>" in done.stdout
