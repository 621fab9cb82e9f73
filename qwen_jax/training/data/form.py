"""How records become rows of their own, where none are packed: pairs of answers, prompts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from qwen_jax.errors import UserError
from qwen_jax.text import Tokenizer
from qwen_jax.training.data.indexed import is_prepared
from qwen_jax.training.data.options import DataOptions, SourceOptions
from qwen_jax.training.data.packing import Arrays
from qwen_jax.training.data.tokenise import shown_value


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


def check_not_prepared(source: SourceOptions, records: str) -> None:
    """Checks that a source is not a prepared directory, which holds tokens of texts and chats.

    Args:
      source: to check.
      records: what is wanted instead, in words.

    Raises:
      UserError: it is one.
    """
    if is_prepared(Path(source.path).expanduser()):
        raise UserError(f"{source.path}: {records} are not prepared ahead; name the files")


def check_messages(name: str, value: Any) -> None:
    """Checks that a field holds messages, one at least.

    Raises:
      UserError: it does not, or a message has no role; names the field.
    """
    is_list = isinstance(value, list) and value
    if not is_list or not all(isinstance(item, dict) and "role" in item for item in value):
        found = "is missing" if value is None else f"= {shown_value(value)}"
        raise UserError(f'{name} {found}; give messages, [{{"role": ..., "content": ...}}]')
