"""Prompts of token ids -> finished texts, streamed while they grow."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

from qwen_jax.inference.decoding import TokenStream
from qwen_jax.text import StopStrings, Tokenizer


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


def complete(
    stream: TokenStream,
    rows: int,
    tokenizer: Tokenizer,
    stop_strings: Sequence[str] = (),
    on_text: Callable[[int, str], None] = lambda row, text: None,
) -> tuple[list[Completion], Timing]:
    """Runs `stream` to its end.

    Args:
      stream: a fresh one.
      rows: how many prompts it has.
      tokenizer: of the model.
      stop_strings: text that ends a row; it is not part of the completion.
      on_text: gets (row, new text) as soon as text is final: whole characters, never any part of a
        stop string.

    Returns:
      A completion for each row, and how long it took.
    """
    decoders = [tokenizer.stream() for _ in range(rows)]
    stops = [StopStrings(stop_strings) for _ in range(rows)]
    texts = [""] * rows
    ids: list[list[int]] = [[] for _ in range(rows)]
    ended = [False] * rows
    rates: list[float] = []
    first_token_s = 0.0
    before = time.perf_counter()

    def emit(row: int, text: str) -> None:
        if text:
            texts[row] += text
            on_text(row, text)

    for step in stream:
        now = time.perf_counter()
        if first_token_s:
            rates.append(sum(token is not None for token in step) / (now - before))
        else:
            first_token_s = now - before
        before = now
        for row, token in enumerate(step):
            if token is None:
                continue
            ids[row].append(token)
            emit(row, stops[row].push(decoders[row].push(token)))
            if stops[row].matched is not None:
                stream.stop(row)
            ended[row] = not stream.active(row)
    for row in range(rows):
        emit(row, stops[row].push(decoders[row].finish()))
        emit(row, stops[row].finish())
        ended[row] |= stops[row].matched is not None
    completions = [
        Completion(text, row_ids, "stop" if stopped else "length")
        for text, row_ids, stopped in zip(texts, ids, ended, strict=True)
    ]
    return completions, Timing(first_token_s, statistics.median(rates) if rates else 0.0)
