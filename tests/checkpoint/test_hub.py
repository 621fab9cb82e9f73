"""Hub ids, against a hub on loopback, in processes that may reach nothing else."""

import json
import os
import pty
import subprocess
import sys
import termios

import numpy as np
import pytest
import torch

from tests.checkpoint.hub_server import serve
from tests.reference import reference_logits, save_reference

# Prints one line of JSON per command: the error, or what was loaded.
CHILD = """
import json, sys
import numpy as np
import qwen_jax
for command, source in json.loads(sys.argv[1]):
    try:
        if command == "tokenizer":
            print(json.dumps(qwen_jax.load_tokenizer(source).encode("hehe")))
        else:
            model, params = qwen_jax.load_pretrained(source, dtype="float32")
            logits = model.apply({"params": params}, np.arange(8)[None]).logits
            print(json.dumps(np.asarray(logits).tolist()))
    except qwen_jax.UserError as error:
        print(json.dumps(str(error)))
"""

COMMANDS = [
    ("tokenizer", "org/tokenizer"),
    ("model", "org/sharded"),
    ("model", "org/bin"),
    ("model", "org/absent"),
    ("model", "org/tokenizer"),
]


def run_child(commands, endpoint, home, stderr=subprocess.PIPE):
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "5"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return dict(zip(map(tuple, commands), lines, strict=True)), done.stderr


@pytest.fixture(scope="module")
def visit(reference, companions, tmp_path_factory):
    """All downloads in one process, then the same again in another one without the hub."""
    root = tmp_path_factory.mktemp("hub")
    save_reference(reference, root / "sharded", max_shard_size="60KB")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2
    (root / "bin").mkdir()
    (root / "bin" / "config.json").write_bytes((root / "sharded" / "config.json").read_bytes())
    torch.save(reference.state_dict(), root / "bin" / "pytorch_model.bin")
    # Beside safetensors, a second copy of the weights is not fetched, nor is code, ever.
    torch.save({}, root / "sharded" / "pytorch_model.bin")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "config.json").write_text("{}")
    for name in ("sharded", "bin", "tokenizer"):
        for file, content in companions.items():
            (root / name / file).write_bytes(content)
        for file in ("modeling_qwen.py", "LICENSE.py", "original/code.py", "original/weights.bin"):
            (root / name / file).parent.mkdir(exist_ok=True)
            (root / name / file).write_bytes(b"raise SystemExit")
    (root / "tokenizer" / "model.safetensors").write_bytes(b"garbage")
    home = root / "home"
    with serve({f"org/{name}": root / name for name in ("sharded", "bin", "tokenizer")}) as hub:
        found, stderr = run_child(COMMANDS[:1], hub.endpoint, home)
        hub.after_tokenizer = hub.files_served("org/tokenizer")
        rest, more = run_child(COMMANDS[1:], hub.endpoint, home)
    offline, even_more = run_child([*COMMANDS[:3], ("model", "org/never")], hub.endpoint, home)
    return hub, found | rest, offline, stderr + more + even_more


@pytest.fixture(scope="module")
def expected(reference):
    return reference_logits(reference, np.arange(8)[None])


@pytest.mark.parametrize("name", ["org/sharded", "org/bin"])
def test_a_hub_id_loads_and_its_logits_equal_the_reference(visit, expected, name):
    _, found, _, _ = visit
    np.testing.assert_allclose(found["model", name], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["org/sharded", "org/bin"])
def test_a_second_load_works_from_the_cache_with_the_hub_gone(visit, expected, name):
    _, _, offline, _ = visit
    np.testing.assert_allclose(offline["model", name], expected, rtol=0, atol=1e-4)


def test_bin_files_are_fetched_only_where_there_are_no_safetensors(visit):
    hub, *_ = visit
    assert "pytorch_model.bin" in hub.files_served("org/bin")
    sharded = hub.files_served("org/sharded")
    assert not any(file.endswith(".bin") for file in sharded)
    assert any(file.startswith("model-00001-of-") for file in sharded)


def test_code_and_subfolders_are_never_requested(visit):
    hub, *_ = visit
    files = {file for _, _, file in hub.served}
    assert {"config.json", "LICENSE", "chat_template.jinja"} <= files
    assert not any(file.endswith(".py") or "/" in file for file in files)


def test_load_tokenizer_fetches_no_weights(visit):
    hub, found, _, _ = visit
    assert found["tokenizer", "org/tokenizer"] == [256, 256]
    assert "vocab.json" in hub.after_tokenizer
    assert "model.safetensors" not in hub.after_tokenizer


def test_an_unknown_repository_is_refused_in_one_line(visit):
    _, found, _, _ = visit
    message = found["model", "org/absent"]
    assert message.startswith("org/absent: no such directory, and no such repository on the hub")
    assert message.isprintable()


def test_an_unreachable_hub_is_reported_in_one_line(visit):
    _, _, offline, _ = visit
    message = offline["model", "org/never"]
    assert "the hub cannot be reached" in message
    assert message.isprintable()


def test_a_download_shows_its_progress_on_a_terminal(companions, tmp_path):
    (tmp_path / "repository").mkdir()
    for file, content in companions.items():
        (tmp_path / "repository" / file).write_bytes(content)
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    with serve({"org/tokenizer": tmp_path / "repository"}) as hub:
        run_child(COMMANDS[:1], hub.endpoint, tmp_path / "home", stderr)
    os.close(stderr)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "Fetching 7 files" in shown


def test_nothing_is_printed_where_stderr_is_not_a_terminal(visit):
    assert visit[-1] == ""


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("", "the source is empty"),
        ("nothing", "no such directory, and not a hub id"),
        ("a/b/c", "no such directory, and not a hub id"),
        ("../a/b", "no such directory, and not a hub id"),
        ("a--b/c", "a--b/c: "),
        ("x" * 5000, "cannot be read"),
        ("~nobody-of-this-name/x", "cannot be read"),
        ("org/offline", "the hub cannot be reached"),
    ],
)
def test_a_source_that_is_nothing_is_refused(refused, source, part, tmp_path, monkeypatch):
    from qwen_jax.checkpoint.hub import resolve_source

    monkeypatch.chdir(tmp_path)
    refused(lambda: resolve_source(source), part)
