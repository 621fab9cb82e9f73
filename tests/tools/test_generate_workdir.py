"""`python -m tools.generate --workdir`: results that outlive the process, in a real one."""

import json
import shutil

import pytest

from tests.tools.conftest import refusal, start_tool


@pytest.fixture(scope="module")
def arguments(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": "the " * (1 + i % 5) + str(i), "id": i} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        f"--model={checkpoint}",
        f"--input={path}",
        "--temperature=0",
        "--max_new_tokens=40",
        "--batch_size=3",
    )


@pytest.fixture(scope="module")
def whole(run_tool, arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    result = run_tool("generate", *arguments, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"24 texts in {workdir / 'completions.jsonl'}\n"
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "completions.jsonl").open()]


def test_they_are_those_that_are_printed(run_tool, arguments, whole):
    printed = run_tool("generate", *arguments, "--output=json").stdout
    assert records(whole) == [json.loads(line) for line in printed.splitlines()]
    assert [record["id"] for record in records(whole)] == list(range(24))
    assert sorted(path.name for path in whole.iterdir()) == ["completions.jsonl", "generate.json"]


def test_a_run_that_was_killed_goes_on(environment, run_tool, arguments, whole, tmp_path):
    parts = tmp_path / "completions.partial.jsonl"
    child = start_tool(environment, "generate", *arguments, f"--workdir={tmp_path}")
    while child.poll() is None and not (parts.is_file() and parts.read_bytes().count(b"\n") > 2):
        pass
    child.kill()
    child.communicate()
    kept = parts.read_bytes()
    assert 2 < kept.count(b"\n") < 24
    # As if the last line had been cut in the middle.
    parts.write_bytes(kept[:-20])
    result = run_tool("generate", *arguments, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert records(tmp_path) == records(whole)
    assert not parts.exists()


def test_a_run_that_is_done_only_says_so(run_tool, arguments, whole):
    before = (whole / "completions.jsonl").stat().st_mtime_ns
    result = run_tool("generate", *arguments, f"--workdir={whole}")
    assert result.stdout == f"24 texts in {whole / 'completions.jsonl'}\n"
    assert (whole / "completions.jsonl").stat().st_mtime_ns == before


def test_other_settings_and_prompts_are_refused(run_tool, arguments, whole, tmp_path):
    line = refusal(run_tool("generate", *arguments, f"--workdir={whole}", "--seed=4"))
    assert line.startswith(f"{whole / 'generate.json'}: an earlier run had other settings; give")
    shutil.copytree(whole, tmp_path / "other")
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x"}\n')
    arguments = (arguments[0], f"--input={path}", *arguments[2:])
    line = refusal(run_tool("generate", *arguments, f"--workdir={tmp_path / 'other'}"))
    assert "an earlier run had other requests" in line
    line = refusal(run_tool("generate", arguments[0], "--prompt=x", f"--workdir={tmp_path}"))
    assert line.startswith("--workdir is for --input=FILE.jsonl")
