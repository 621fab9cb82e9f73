"""`python -m tools.prepare_data`: what it writes, killed or not, and what it refuses."""

import contextlib
import signal
import time
from pathlib import Path

import pytest

from qwen_jax.text import load_tokenizer
from qwen_jax.training.data.indexed import IndexedRecords, read_meta
from qwen_jax.training.data.options import TokenOptions
from tests.tools.conftest import refusal, start_tool
from tests.training.data.conftest import chat_file, text_file, write_tokenizer

CONFIG = """
import dataclasses
from ml_collections import ConfigDict
from qwen_jax.training.data import DataOptions, SourceOptions

def get_config():
    sources = (SourceOptions("{texts}", weight=1.0), SourceOptions("{chats}", weight=2.0))
    return ConfigDict({{
        "model": "{model}",
        "data": dataclasses.asdict(DataOptions(sources)),
        "train": {{"steps": 3}},
    }})
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    found = {
        "model": str(write_tokenizer(folder / "model")),
        "texts": text_file(folder / "texts.jsonl", 90),
        "chats": chat_file(folder / "chats.jsonl", 20),
        "many": chat_file(folder / "many.jsonl", 1500),
    }
    found["config"] = str(folder / "run.py")
    (folder / "run.py").write_text(CONFIG.format(**found))
    found["both"] = str(folder / "both.py")
    both = 'absent/model", "tokenizer": "{model}'.format(**found)
    (folder / "both.py").write_text(CONFIG.format(**{**found, "model": both}))
    return found


def bytes_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(run_tool, environment, paths, tmp_path):
    def arguments(name, workers):
        return [
            f"--model={paths['model']}",
            f"--input={paths['many']}",
            f"--workdir={tmp_path / name}",
            f"--workers={workers}",
            "--records_a_part=50",
        ]

    marked = {**environment, "TEST_MARK": str(tmp_path)}
    child = start_tool(marked, "prepare_data", *arguments("killed", 2))
    target = tmp_path / "killed" / "many"
    deadline = time.monotonic() + 90
    while not any(target.glob("0*")) and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL
    assert not (target / "meta.json").exists()
    parts = {path.name for path in target.glob("0*")}
    assert 0 < len(parts) < 30
    kept = {name: (target / name / "tokens.bin").stat().st_ino for name in parts}
    # Workers notice that nobody waits for them.
    deadline = time.monotonic() + 20
    while workers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers(tmp_path)
    child.communicate()

    done = run_tool("prepare_data", *arguments("killed", 2))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {name: (target / name / "tokens.bin").stat().st_ino for name in parts} == kept
    assert run_tool("prepare_data", *arguments("whole", 1)).returncode == 0
    assert bytes_of(target) == bytes_of(tmp_path / "whole" / "many")
    meta = read_meta(target)
    assert done.stdout == f"{target}: 1500 records, {sum(meta.tokens)} tokens, chat\n"
    again = run_tool("prepare_data", *arguments("killed", 2))
    assert again.stdout == done.stdout


def workers(mark):
    """Processes with this mark in their environment that still run, by Linux's own list."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"TEST_MARK={mark}".encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


def test_a_configuration_is_read_with_its_changes(run_tool, paths, tmp_path):
    done = run_tool(
        "prepare_data",
        f"--config={paths['config']}",
        f"--workdir={tmp_path}",
        "--config.data.tokens.learn=('user',)",
        "--config.data.sources[1].name=talk",
        "--config.data.epochs=None",
        "--notool_calls",
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / "texts"),
        str(tmp_path / "talk"),
    ]
    tokenizer = load_tokenizer(paths["model"])
    options = TokenOptions(learn=("user",), tool_calls=False)
    chats = IndexedRecords(tmp_path / "talk", tokenizer, options)
    texts = IndexedRecords(tmp_path / "texts", tokenizer, TokenOptions())
    assert (len(texts), len(chats)) == (90, 20)
    assert texts[0].learned.all()
    assert 0 < chats[0].learned.sum() < len(chats[0].learned)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=configs/train/pretrain.py:general", "--config.tokenizer={model}"],
        ["--config={both}"],
    ],
    ids=["no model", "another model"],
)
def test_the_tokenizer_is_the_one_that_the_run_trains_with(run_tool, paths, tmp_path, arguments):
    arguments = [argument.format(**paths) for argument in arguments]
    arguments += [f"--input={paths['texts']}", f"--workdir={tmp_path}"]
    done = run_tool("prepare_data", *arguments)
    assert done.returncode == 0, done.stderr
    records = IndexedRecords(tmp_path / "texts", load_tokenizer(paths["model"]), TokenOptions())
    assert len(records) == 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--input={texts}"],
            "no tokenizer is named; give --model, or tokenizer or model in the configuration",
        ),
        (
            ["--config={config}", "--config.data.lenght=3"],
            "config.data.lenght is not a field of the configuration; did you mean length?",
        ),
        (
            ["--config={config}", "--config.data.sources[7].path=x"],
            "--config.data.sources[7].path=x: the configuration has no such place",
        ),
        (["--config=/absent.py"], "--config: Configuration is not available"),
        (
            ["--config=/absent.py", "--config.data.length=3"],
            "--config: Configuration is not available because of an earlier failure to load",
        ),
        (["--model={model}"], "no source is named; give --input=FILE, or --config=FILE.py"),
        (
            ["--model={model}", "--input={texts}", "--input={texts}"],
            "texts: several sources have this name; give them different names",
        ),
        (
            ["--model={model}", "--input={texts}", "--learn=asistant"],
            "learn is asistant; known roles: system, user, assistant, tool",
        ),
    ],
)
def test_bad_input_is_one_line(run_tool, paths, tmp_path, arguments, message):
    arguments = [argument.format(**paths) for argument in arguments]
    line = refusal(run_tool("prepare_data", f"--workdir={tmp_path}", *arguments))
    assert line.startswith(message.format(**paths))
