import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands
from tests.commands import ENVIRONMENT, ROOT, only_line
from tests.reference import random_reference, save_reference
from tests.text.chat_templates import QWEN3
from tests.text.real_vocabulary import byte_characters

ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
DEFAULTS = {"do_sample": True, "temperature": 0.8, "top_k": 30, "max_new_tokens": 9}


def write_tokenizer(directory: Path) -> None:
    """Bytes, three merges, the control tokens: it loads at once."""
    pieces = [*byte_characters(), "Ġt", "he", "Ġthe"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n", encoding="utf-8")
    config = {
        "added_tokens_decoder": {
            str(len(pieces) + i): {"content": token, "special": "|" in token, "normalized": False}
            for i, token in enumerate(ADDED)
        },
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(QWEN3, encoding="utf-8")


def train_log(workdir: Path) -> list[dict]:
    """What a run has written so far, a record a line."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random model of 300 positions with a tokenizer, a chat template and sampling defaults."""
    directory = tmp_path_factory.mktemp("checkpoint")
    reference = random_reference("qwen3", num_hidden_layers=2, max_position_embeddings=300)
    save_reference(reference, directory)
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text(json.dumps(DEFAULTS))
    return directory


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Compiled programs are shared with the tests."""
    return ENVIRONMENT


@pytest.fixture(scope="session")
def run_tool():
    """Runs `python -m tools.NAME` with these arguments as a process of its own."""

    def run(name: str, *arguments: str, **more) -> subprocess.CompletedProcess:
        return commands.run(f"tools.{name}", *arguments, **more)

    return run


def start_tool(environment: dict[str, str], name: str, *arguments: str) -> subprocess.Popen:
    """Starts `python -m tools.NAME` with pipes for what it writes."""
    return subprocess.Popen(
        [sys.executable, "-m", f"tools.{name}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def refusal(result: subprocess.CompletedProcess) -> str:
    """The one line of a run that was refused."""
    assert result.returncode == 1, result
    assert result.stdout == ""
    line = only_line(result.stderr)
    assert "Traceback" not in line
    return line
