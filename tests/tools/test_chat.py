"""`python -m tools.chat`, through a pipe and at a terminal."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

import qwen_jax
from qwen_jax.inference.conversation import Conversation
from tests.commands import ROOT
from tests.tools.conftest import refusal


@pytest.fixture(scope="module")
def endless(checkpoint, tmp_path_factory):
    """A checkpoint that no token ends."""
    directory = tmp_path_factory.mktemp("endless") / "model"
    directory.mkdir()
    for path in checkpoint.iterdir():
        (directory / path.name).symlink_to(path)
    (directory / "generation_config.json").unlink()
    (directory / "generation_config.json").write_text('{"eos_token_id": []}')
    return directory


@pytest.mark.parametrize("flags", [(), ("--cache_dtype=int8",)])
def test_turns_through_a_pipe_are_those_of_a_conversation(run_tool, endless, flags):
    lines = ["the sky", "", "and the sea", "/reset", "the sky", "b" * 300, "a\udcff", "/exit", "no"]
    result = run_tool(
        "chat", f"--model={endless}", "--max_new_tokens=6", "--temperature=0", "--stats",
        *flags,
        stdin="\n".join(lines).encode("utf-8", "surrogateescape"),
    )  # fmt: skip
    model, params = qwen_jax.load_pretrained(endless)
    tokenizer = qwen_jax.load_tokenizer(endless)
    expected = []
    for said in (["the sky", "and the sea"], ["the sky", "a\ufffd"]):
        conversation = Conversation(model, params, tokenizer, cache_dtype="int8" if flags else None)
        expected += [conversation.reply(line, 6, stop_ids=[])[0].text for line in said]
    assert result.returncode == 0
    assert result.stdout.decode() == "".join(f"{text}\n" for text in expected)
    stats, too_long = [], []
    for line in result.stderr.decode().splitlines():
        (stats if re.fullmatch(r"first token after .* s, then .* tokens/s", line) else too_long
         ).append(line)  # fmt: skip
    assert len(stats) == 4
    (line,) = too_long
    assert line.startswith("the conversation: ")
    assert "tokens are longer than max_position_embeddings = 300" in line


def test_the_end_of_the_input_leaves(run_tool, checkpoint):
    result = run_tool("chat", f"--model={checkpoint}", "--max_new_tokens=3", stdin="Hi")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--prompt=x"], "Unknown command line flag 'prompt'"), (["--min_p=3"], "min_p = 3.0 should")],
    ids=["flag", "value"],
)
def test_bad_flags_are_refused_in_one_line(run_tool, checkpoint, arguments, message):
    result = run_tool("chat", f"--model={checkpoint}", *arguments)
    assert refusal(result).startswith(message)


# Makes the terminal on standard input the controlling one, as a shell has done before it starts
# a program: only then does a key become an interrupt.
AT_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "tools.chat", *sys.argv[1:]])
"""


class Terminal:
    """The screen and the keyboard of a process."""

    def __init__(self, master):
        self.master, self.seen = master, b""

    def wait_for(self, wanted: bytes, limit_s: float = 60):
        """Reads until the pattern is on the screen, and forgets all up to its end."""
        deadline = time.monotonic() + limit_s
        while not (found := re.search(wanted, self.seen, re.DOTALL)):
            ready, _, _ = select.select([self.master], [], [], 0.2)
            if ready:
                # Linux reports the end of the other side as an error.
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.master, 65536)
                # What is waited for is new; an endless answer fills the screen meanwhile.
                self.seen = self.seen[-65536:]
            assert time.monotonic() < deadline, self.seen[-2000:]
        self.seen = self.seen[found.end() :]

    def type(self, keys: bytes):
        os.write(self.master, keys)


def test_an_interrupt_at_a_terminal_ends_the_answer_and_not_the_chat(endless, environment):
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", AT_TERMINAL, f"--model={endless}", "--temperature=1",
         "--max_new_tokens=1000000"],
        cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    terminal = Terminal(master)
    try:
        terminal.wait_for(b"> ")
        for said in (b"the sky\n", b"the sea\n"):
            terminal.type(said)
            # The line is echoed; what follows is the answer.
            terminal.wait_for(said.strip() + rb"\r\n.{20}")
            terminal.type(b"\x03")
            terminal.wait_for(rb"\(interrupted; this turn is forgotten\)\r\n> ")
        # A key in the instant between prompt and read is only noticed with the next one.
        time.sleep(0.3)
        terminal.type(b"\x03")
        terminal.wait_for(rb"\(/exit leaves\)\r\n> ")
        terminal.type(b"\x04")
        assert child.wait(20) == 0
    finally:
        child.kill()
        os.close(master)
