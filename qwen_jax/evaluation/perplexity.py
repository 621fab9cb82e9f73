"""How well a model predicts a text that is longer than what it reads at once."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.inference.checks import check_integer
from qwen_jax.inference.likelihood import token_likelihoods
from qwen_jax.models.decoder import Decoder
from qwen_jax.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a text that is read at once.

    Attributes:
      begin, end: of its tokens in the text.
      start: the first of them that is scored, in the text; those before it are context.
    """

    begin: int
    end: int
    start: int


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted.

    Attributes:
      nats: the negative logarithm of the probability of all tokens that were scored.
      num_scored: of these tokens.
      num_bytes: of these tokens, as UTF-8; None where the text was given as ids alone.
      num_tokens: of the whole text.
    """

    nats: float
    num_scored: int
    num_bytes: int | None
    num_tokens: int

    @property
    def nats_per_token(self) -> float:
        """The mean cross entropy."""
        return self.nats / self.num_scored

    @property
    def perplexity(self) -> float:
        """Its exponential; infinite where float64 cannot hold it."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Cross entropy per byte, which models with other vocabularies can be compared by."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None


def measure_perplexity(
    model: Decoder,
    params: Any,
    ids: Sequence[int],
    length: int,
    stride: int,
    batch_size: int = 8,
    tokenizer: Tokenizer | None = None,
) -> Perplexity:
    """Reads a text in windows of `length` tokens, each `stride` further on, up to its end.

    This is the recipe of transformers' documentation ("Perplexity of fixed-length models"): a
    window scores those of its tokens that the one before has not, each given all that the window
    has before it, which is at least `length - stride` tokens in all windows but the first. What has
    nothing before it is not scored: the text's first token, and where `stride` is `length`, that of
    every window.

    Args:
      model, params: as `load_pretrained` returns them, with a vocabulary head.
      ids: of the text, at least 2.
      length: tokens of a window.
      stride: tokens from one window's begin to the next, at most `length`.
      batch_size: windows that run together; all but the last are of one shape.
      tokenizer: that made the ids, to count bytes.

    Raises:
      UserError: a text of fewer than two tokens, a stride that leaves tokens out, or as
        `token_likelihoods`.
    """
    windows = cut_windows(len(ids), length, stride)
    ids = np.asarray(ids)
    found = token_likelihoods(
        model,
        params,
        [ids[window.begin : window.end] for window in windows],
        [window.start - window.begin for window in windows],
        batch_size,
    )
    nats = -sum(float(row.log_probs.sum(dtype=np.float64)) for row in found)
    scored = np.concatenate([ids[window.start : window.end] for window in windows])
    num_bytes = None if tokenizer is None else count_bytes(tokenizer, scored)
    return Perplexity(nats, len(scored), num_bytes, len(ids))


def cut_windows(num_tokens: int, length: int, stride: int) -> list[Window]:
    """The windows of a text, those left out in which nothing is scored.

    Raises:
      UserError: fewer than two tokens, or a length or stride that no window can have.
    """
    check_integer("length", length, 2)
    check_integer("stride", stride, 1)
    if stride > length:
        raise UserError(
            f"stride = {stride} is more than length = {length}, which leaves tokens out; give a "
            "stride of at most the length"
        )
    if num_tokens < 2:
        raise UserError(
            f"the text has {num_tokens} token{'' if num_tokens == 1 else 's'}; nothing is "
            "predicted in fewer than 2"
        )
    windows, done = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + length, num_tokens)
        window = Window(begin, end, max(done, begin + 1))
        if window.start < end:
            windows.append(window)
        done = end
        if end == num_tokens:
            break
    return windows


def count_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Of the text that ids stand for, each by itself, so that half a character counts too."""
    return sum(len(tokenizer.vocabulary.bytes_of(int(i)) or b"") for i in ids)


def read_text_ids(path: Path, tokenizer: Tokenizer, allow_special: bool = False) -> list[int]:
    """The token ids of a text file, line ends as they are.

    Args:
      path: of UTF-8 text.
      tokenizer: of the model.
      allow_special: whether the names of control tokens in the text stand for them.

    Raises:
      UserError: the file cannot be read, is not UTF-8, or has fewer than two tokens.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    ids = tokenizer.encode(text, allow_special=allow_special)
    if len(ids) < 2:
        raise UserError(f"{path}: holds {len(ids)} tokens; give a text of at least 2")
    return ids
