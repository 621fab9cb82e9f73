"""Prompts of token ids -> finished texts, streamed while they grow."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from qwen_jax.errors import UserError
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.slots import SlotStream
from qwen_jax.inference.speculation import SpeculativeStream
from qwen_jax.text import StopStrings, Tokenizer
from qwen_jax.text.parsing import THINK_CLOSE, THINK_OPEN, thinking_is_open

Stream = TokenStream | SlotStream | SpeculativeStream

# Tokens that <think> and the line's end take at most, where the tag is spelled.
_TAIL = 16


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished text.

    Attributes:
      text: without special tokens, cut before the stop string that ended it.
      ids: all new token ids, the stop id included.
      finish_reason: "stop" for a stop id or string, "length" for the limit.
    """

    text: str
    ids: list[int]
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long a batch took.

    Attributes:
      first_token_s: seconds from the start to the first token, compiling included.
      tokens_per_s: new tokens a second over all rows at the median later step, so that a step that
        compiles does not count; 0 where there was none.
    """

    first_token_s: float
    tokens_per_s: float


def ends_inside_reasoning(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the ids of a prompt leave reasoning open, see `thinking_is_open`."""
    return thinking_is_open(tokenizer.decode(prompt[-_TAIL:]))


class ThinkingBudget:
    """Ends the reasoning of each row after a number of tokens.

    At that number the closing tag and the empty line that templates write behind it are forced, and
    the answer follows. A row that closes its reasoning earlier, or does not reason, is left alone.
    Reasoning is open where the prompt ends with <think>, or where the reply begins with it.
    """

    def __init__(self, limit: int, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]):
        """Looks for the tags.

        Args:
          limit: reasoning tokens of each row, the tags not counted; 0 closes reasoning at once.
          tokenizer: of the model.
          prompts: of the rows, as the stream runs them.

        Raises:
          UserError: the limit is negative, or the tokenizer has no token for one of the tags.
        """
        if limit < 0:
            raise UserError(f"thinking_budget = {limit} should be at least 0")
        ids = [tokenizer.added_tokens.get(tag) for tag in (THINK_OPEN, THINK_CLOSE)]
        for tag, tag_id in zip((THINK_OPEN, THINK_CLOSE), ids, strict=True):
            if tag_id is None:
                raise UserError(
                    f"thinking_budget: the tokenizer has no token {tag}; leave it out for a model "
                    "that does not think"
                )
        self._open_id, self._close_id = ids
        self._closing = [self._close_id, *tokenizer.encode("\n\n", allow_special=False)]
        self._limit, self._tokenizer = limit, tokenizer
        # Reasoning tokens left; None where reasoning is not open.
        self._left: list[int | None] = [None] * len(prompts)
        self._may_open = [True] * len(prompts)
        for row, prompt in enumerate(prompts):
            if ends_inside_reasoning(tokenizer, prompt):
                self._left[row] = limit

    def start(self, stream: Stream) -> None:
        """Forces what a limit of 0 asks for before the first token."""
        for row in range(len(self._left)):
            self._close_if_spent(stream, row)

    def take(self, stream: Stream, row: int, token: int) -> None:
        """Counts a row's new token and forces the end of its reasoning when it is due."""
        if self._left[row] is not None:
            self._left[row] = None if token == self._close_id else self._left[row] - 1
        elif self._may_open[row] and token == self._open_id:
            self._left[row] = self._limit
        self._may_open[row] &= self._is_newlines(token)
        self._close_if_spent(stream, row)

    def _close_if_spent(self, stream: Stream, row: int) -> None:
        if self._left[row] == 0:
            stream.force(row, self._closing)
            self._left[row], self._may_open[row] = None, False

    def _is_newlines(self, token: int) -> bool:
        return not self._tokenizer.decode(token).strip("\n")


def finished_texts(
    stream: Stream,
    rows: int,
    tokenizer: Tokenizer,
    stop_strings: Sequence[str] = (),
    on_text: Callable[[int, str], None] = lambda row, text: None,
    thinking_budget: ThinkingBudget | None = None,
    on_step: Callable[[list[int | None]], None] = lambda step: None,
) -> Iterator[tuple[int, Completion]]:
    """Runs `stream` to its end, and gives each row and its completion once it is finished.

    Args:
      stream: a fresh one.
      rows: how many prompts it has.
      tokenizer: of the model.
      stop_strings: text that ends a row; it is not part of the completion.
      on_text: gets (row, new text) as soon as text is final: whole characters, never any part of a
        stop string.
      thinking_budget: ends reasoning that takes too long; None leaves it to the model.
      on_step: gets each step of the stream, before it is read.
    """
    decoders = [tokenizer.stream(continues=True) for _ in range(rows)]
    stops = [StopStrings(stop_strings) for _ in range(rows)]
    texts = [""] * rows
    ids: list[list[int]] = [[] for _ in range(rows)]
    if thinking_budget is not None:
        thinking_budget.start(stream)

    def emit(row: int, text: str) -> None:
        if text:
            texts[row] += text
            on_text(row, text)

    for step in stream:
        on_step(step)
        for row, token in enumerate(step):
            if token is None:
                continue
            ids[row].append(token)
            if thinking_budget is not None:
                thinking_budget.take(stream, row, token)
            emit(row, stops[row].push(decoders[row].push(token)))
            if stops[row].matched is not None:
                stream.stop(row)
            if stream.finished(row):
                stopped = not stream.active(row)
                emit(row, stops[row].push(decoders[row].finish()))
                emit(row, stops[row].finish())
                stopped |= stops[row].matched is not None
                yield row, Completion(texts[row], ids[row], "stop" if stopped else "length")


def complete(
    stream: TokenStream,
    rows: int,
    tokenizer: Tokenizer,
    stop_strings: Sequence[str] = (),
    on_text: Callable[[int, str], None] = lambda row, text: None,
    thinking_budget: ThinkingBudget | None = None,
) -> tuple[list[Completion], Timing]:
    """Runs `stream` to its end; arguments as for `finished_texts`.

    Returns:
      A completion for each row, and how long it took.
    """
    rates: list[float] = []
    before, first_token_s = time.perf_counter(), 0.0

    def count(step: list[int | None]) -> None:
        nonlocal before, first_token_s
        now = time.perf_counter()
        if first_token_s:
            rates.append(sum(token is not None for token in step) / (now - before))
        else:
            first_token_s = now - before
        before = now

    found = dict(
        finished_texts(stream, rows, tokenizer, stop_strings, on_text, thinking_budget, count)
    )
    timing = Timing(first_token_s, statistics.median(rates) if rates else 0.0)
    return [found[row] for row in range(rows)], timing
