"""`python -m tools.demo`, the first thing that a new user runs."""

import re

import pytest

from tests.tools.conftest import refusal


@pytest.fixture(scope="module")
def runs(run_tool, tmp_path_factory):
    """Two runs in one directory, which is not there at first."""
    workdir = tmp_path_factory.mktemp("demo") / "a" / "b"
    results = [run_tool("demo", f"--workdir={workdir}", "--max_new_tokens=24") for _ in range(2)]
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 2
    return workdir, [result.stdout for result in results]


def test_the_demo_writes_loads_checks_and_answers(runs):
    workdir, (out, _) = runs
    assert "Its weights are random" in out
    (difference,) = re.findall(r"token by token equals one pass within (\S+)\.\n", out)
    assert 0 < float(difference) < 1e-4
    pattern = r"Time to the first token (\S+) s \(compiling included\), then (\S+) tokens/s"
    (times,) = re.findall(pattern, out)
    assert all(float(number) > 0 for number in times)
    written = {path.name for path in (workdir / "qwen3-random").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written


def test_a_second_run_says_the_same(runs):
    first, second = (out.partition("assistant: ")[2].partition("\n\nTime")[0] for out in runs[1])
    assert first
    assert first == second


def test_a_directory_that_cannot_be_written_is_named(run_tool, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_tool("demo", f"--workdir={tmp_path / 'file'}")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"--workdir={tmp_path / 'file'}: cannot be written (")


def test_an_empty_prompt_is_refused(run_tool, tmp_path):
    assert refusal(run_tool("demo", f"--workdir={tmp_path}", "--prompt=")).startswith(
        "--prompt is empty"
    )
