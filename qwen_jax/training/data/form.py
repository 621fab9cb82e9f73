"""How records become rows of their own, where none are packed: pairs of answers, prompts."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from qwen_jax.text import Tokenizer
from qwen_jax.training.data.options import DataOptions, SourceOptions
from qwen_jax.training.data.packing import Arrays


class RowSource(Protocol):
    """The rows of a source, with the fields of `packing.finish` that they have, `marks` among them.

    Attributes:
      source: that they are of.
    """

    source: SourceOptions

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Arrays: ...


@dataclasses.dataclass(frozen=True)
class Form:
    """A kind of record.

    Attributes:
      open: a source's rows, of (source, tokenizer, options).
      rows: of a batch that a record takes.
      unpacked: why there is nothing to pack, as errors say it.
      takes: how many rows one takes, in words.
    """

    open: Callable[[SourceOptions, Tokenizer, DataOptions], RowSource]
    rows: int
    unpacked: str
    takes: str
