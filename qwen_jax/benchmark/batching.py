"""Many texts of different lengths through few rows, by this package in two ways and by another.

Each text ends after exactly its own number of tokens: what ends texts costs nothing, and all
engines write as many. Random weights stand for trained ones, so that no stop id is looked for.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

import qwen_jax
from qwen_jax.benchmark.compiling import watch_compiling
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.slots import SlotStream
from qwen_jax.reference import import_reference, load_reference


@dataclasses.dataclass(frozen=True)
class ManyTexts:
    """Attributes:
    directory: of the checkpoint.
    vocab_size: random tokens are below it.
    count: of the texts.
    prompt_range, answer_range: the fewest and the most tokens, drawn evenly.
    """

    directory: str
    vocab_size: int
    count: int
    prompt_range: tuple[int, int]
    answer_range: tuple[int, int]

    def draw(self) -> tuple[list[list[int]], list[int]]:
        """Prompts, and how many tokens to write after each; the same for every engine."""
        rng = np.random.default_rng(0)
        lengths, answers = (
            rng.integers(least, most, self.count, endpoint=True)
            for least, most in (self.prompt_range, self.answer_range)
        )
        prompts = [rng.integers(0, self.vocab_size, n).tolist() for n in lengths]
        return prompts, answers.tolist()

    def describe(self) -> str:
        """Their number and lengths."""
        (a, b), (c, d) = self.prompt_range, self.answer_range
        return f"{self.count} prompts of {a} to {b}, answers of {c} to {d}"


@dataclasses.dataclass(frozen=True)
class Written:
    """Attributes:
    texts: new tokens of each prompt, in the order of the prompts.
    seconds: that it took, compiling left out.
    compiling: seconds of that.
    shares: of the rows, by the name of `SlotStream`'s property.
    """

    texts: list[list[int]]
    seconds: float
    compiling: float
    shares: dict[str, float]


class Writer(Protocol):
    """A loaded model in float32 that writes the likeliest tokens."""

    def write(
        self, prompts: Sequence[list[int]], answers: Sequence[int], size: int
    ) -> tuple[list[list[int]], dict[str, float]]:
        """As many tokens as asked for behind each prompt, and shares of rows.

        Args:
          prompts: token ids.
          answers: how many tokens to write after each.
          size: rows at once.
        """


class InSlots:
    """Rows take one prompt after another, in the order in which they are given."""

    def __init__(self, directory: Path):
        self._model, self._params = qwen_jax.load_pretrained(directory, "float32")

    def write(self, prompts, answers, size):
        stream = SlotStream(self._model, self._params, prompts, answers, stop_ids=(), slots=size)
        texts = [[] for _ in prompts]
        for step in stream:
            for text, token in zip(texts, step, strict=True):
                if token is not None:
                    text.append(token)
        return texts, {"occupancy": stream.occupancy, "writing": stream.writing}


class InBatches:
    """Batches of prompts of similar length, each until the longest of its answers."""

    def __init__(self, directory: Path):
        self._model, self._params = qwen_jax.load_pretrained(directory, "float32")

    def write(self, prompts, answers, size):
        texts = [[] for _ in prompts]
        for own in batches(prompts, size):
            asked, most = [prompts[i] for i in own], max(answers[i] for i in own)
            steps = list(TokenStream(self._model, self._params, asked, most, stop_ids=()))
            for i, text in zip(own, zip(*steps, strict=True), strict=True):
                texts[i] = list(text[: answers[i]])
        return texts, {}


class InTransformersBatches:
    """The same batches by the reference's `generate`, which pads prompts on the left."""

    def __init__(self, directory: Path):
        self._torch, transformers = import_reference()
        self._model = load_reference(directory)
        # No stop id of the checkpoint's ends a batch before its longest answer.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0
        )

    def write(self, prompts, answers, size):
        texts = [[] for _ in prompts]
        for own in batches(prompts, size):
            most = max(answers[i] for i in own)
            longest = max(len(prompts[i]) for i in own)
            ids, mask = np.zeros((2, len(own), longest), np.int64)
            for row, i in enumerate(own):
                ids[row, longest - len(prompts[i]) :] = prompts[i]
                mask[row, longest - len(prompts[i]) :] = 1
            ids, mask = map(self._torch.as_tensor, (ids, mask))
            out = self._model.generate(ids, attention_mask=mask, max_new_tokens=most)
            for i, text in zip(own, out[:, longest:].tolist(), strict=True):
                texts[i] = text[: answers[i]]
        return texts, {}


WRITERS: dict[str, Callable[[Path], Writer]] = {
    "slots": InSlots,
    "static": InBatches,
    "transformers": InTransformersBatches,
}


def batches(prompts: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """The numbers of the prompts that run together, those of similar length."""
    numbers = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def write_all(
    writer: Writer,
    prompts: Sequence[list[int]],
    answers: Sequence[int],
    size: int,
) -> Written:
    """Has a writer write all texts, and times it. Arguments as for `Writer.write`."""
    start = time.perf_counter()
    with watch_compiling() as compiling:
        texts, shares = writer.write(prompts, answers, size)
    seconds = time.perf_counter() - start
    return Written(texts, seconds - compiling.seconds, compiling.seconds, shares)
