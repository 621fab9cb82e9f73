"""Talks with a checkpoint in the terminal.

    python -m tools.chat --model=DIR

Answers stream; on a terminal, reasoning is dimmed, and --thinking_budget bounds it. The cache is
kept between turns, with --cache_dtype=int8 in less memory. An interrupt (Ctrl-C) stops an answer
and forgets the turn; an empty line is ignored; /reset starts anew; /exit or the end of the input
(Ctrl-D) leaves.
"""

import sys

from absl import flags

from qwen_jax.errors import UserError
from qwen_jax.inference.completion import ends_inside_reasoning
from qwen_jax.inference.conversation import Conversation
from qwen_jax.text import ReplyParser
from qwen_jax.text.parsing import Event, Problem, Reasoning
from tools import cache_flag, command_line, text_flags

_SYSTEM = flags.DEFINE_string("system", None, "The system message.")
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_STATS = flags.DEFINE_bool("stats", False, "Prints times after each answer, on stderr.")


def main() -> None:
    """Reads lines, answers each."""
    session = text_flags.open_session()
    conversation = _new_conversation(session)
    if sys.stdin is None:
        raise UserError("standard input is closed; give a terminal, or lines through a pipe")
    # A line that is not UTF-8 is answered all the same, with U+FFFD for what cannot be read.
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while (line := _read_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                conversation = _new_conversation(session)
                continue
        try:
            _answer(session, conversation, line)
        except KeyboardInterrupt:
            print("\n(interrupted; this turn is forgotten)", file=sys.stderr)
        except UserError as error:
            # The conversation stands as it was: the next line may be better.
            print(error, file=sys.stderr)


def _new_conversation(session: text_flags.Session) -> Conversation:
    return Conversation(
        session.model,
        session.params,
        session.tokenizer,
        _SYSTEM.value,
        text_flags.ALLOW_SPECIAL.value,
        session.max_window_size,
        cache_flag.CACHE_DTYPE.value,
        **text_flags.template_variables(),
    )


def _answer(session: text_flags.Session, conversation: Conversation, line: str) -> None:
    prompt = conversation.prompt_ids(line)
    session.check_length(prompt, "the conversation")
    screen = _Screen(ends_inside_reasoning(session.tokenizer, prompt))
    on_text = screen.write if sys.stdout.isatty() else _write
    _, timing = conversation.reply(
        line,
        session.max_new_tokens,
        session.options,
        session.stop_ids,
        text_flags.STOP.value,
        text_flags.SEED.value,
        on_text=on_text,
        thinking_budget=text_flags.THINKING_BUDGET.value,
    )
    if sys.stdout.isatty():
        screen.end()
    print(flush=True)
    if _STATS.value:
        print(
            f"first token after {timing.first_token_s:.2f} s, then "
            f"{timing.tokens_per_s:.1f} tokens/s",
            file=sys.stderr,
        )


class _Screen:
    """Shows a reply on a terminal: reasoning dimmed and without its tags, all else as written."""

    def __init__(self, thinking_open: bool):
        self._parser = ReplyParser(thinking_open)
        self._reasoned = False

    def write(self, text: str) -> None:
        self._show(self._parser.push(text))

    def end(self) -> None:
        self._show(self._parser.finish())

    def _show(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Reasoning):
                _write(f"{_DIM}{event.text}{_PLAIN}")
                self._reasoned = True
                continue
            if self._reasoned and event.text:
                _write("\n\n")
                self._reasoned = False
            _write(event.text)
            if isinstance(event, Problem):
                _write(f"\n({event.reason})")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_line() -> str | None:
    """The next line, None at the end of the input; prompts on a terminal only."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            return input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return None
        except KeyboardInterrupt:
            # It may have been meant for an answer that ended just before.
            print("\n(/exit leaves)", file=sys.stderr)


if __name__ == "__main__":
    command_line.run(main)
