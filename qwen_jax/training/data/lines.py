"""JSONL and plain-text files, mapped into memory: where each record lies, and its bytes."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.json_fields import parse_json_line

END_OF_TEXT = "<|endoftext|>"

_BLOCK = 1 << 24
_BOM = b"\xef\xbb\xbf"
_WHITE = np.frombuffer(b" \t\r\n", np.uint8)


class JsonLines:
    """The objects of a JSONL file, one a line; empty lines are skipped.

    Raises:
      UserError: the file cannot be read or holds no line.
    """

    def __init__(self, path: Path):
        self.path = path
        self._data = _map(path)
        starts, ends = _lines(self._data)
        blank = _blank(self._data, starts, ends)
        self._starts, self._ends = starts[~blank], ends[~blank]
        # In almost every file line numbers need no memory.
        self._numbers = np.flatnonzero(~blank) + 1 if blank.any() else None
        if not len(self._starts):
            raise UserError(f"{path}: holds no lines; write one object a line")

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, index: int) -> str:
        """FILE:LINE of a record."""
        number = index + 1 if self._numbers is None else self._numbers[index]
        return f"{self.path}:{number}"

    def read(self, index: int) -> dict[str, Any]:
        """The object of a line.

        Raises:
          UserError: it is no JSON object.
        """
        data = self._data[self._starts[index] : self._ends[index]]
        return parse_json_line(self.name(index), _text(self.name(index), data))


class PlainText:
    """The documents of a text file: between lines that hold `<|endoftext|>` and nothing else.

    A file without such lines is one document. The line end that a document ends with is not part of
    it, and documents of white space alone are skipped.

    Raises:
      UserError: the file cannot be read or holds no document.
    """

    def __init__(self, path: Path):
        self.path = path
        self._data = _map(path)
        starts, ends = [_after_bom(self._data)], []
        for start, end in _separators(self._data):
            ends.append(start)
            starts.append(end)
        ends.append(len(self._data))
        spans = [(start, end) for start, end in zip(starts, ends, strict=True)]
        spans = [(start, end) for start, end in spans if self._data[start:end].strip()]
        if not spans:
            raise UserError(f"{path}: holds no text")
        self._spans = np.array(spans, np.int64)
        line_ends = _line_ends(self._data)
        self._numbers = np.searchsorted(line_ends, self._spans[:, 0]) + 1

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        """FILE:LINE of a document's first line."""
        return f"{self.path}:{self._numbers[index]}"

    def read(self, index: int) -> str:
        """The document.

        Raises:
          UserError: it is not UTF-8.
        """
        start, end = self._spans[index]
        data = self._data[start:end].removesuffix(b"\n").removesuffix(b"\r")
        return _text(self.name(index), data)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # An empty file cannot be mapped.
        raise UserError(f"{path}: is empty") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text (byte {error.start})") from None


def _after_bom(data: mmap.mmap) -> int:
    return len(_BOM) if data[: len(_BOM)] == _BOM else 0


def _line_ends(data: mmap.mmap) -> np.ndarray:
    values = np.frombuffer(data, np.uint8)
    blocks = range(0, len(values), _BLOCK)
    return np.concatenate([np.flatnonzero(values[i : i + _BLOCK] == 10) + i for i in blocks])


def _lines(data: mmap.mmap) -> tuple[np.ndarray, np.ndarray]:
    """Where lines begin and where their line ends stand, the last with one or without."""
    ends = _line_ends(data)
    if data[-1:] != b"\n":
        ends = np.append(ends, len(data))
    starts = np.concatenate([[_after_bom(data)], ends[:-1] + 1])
    return starts, ends


def _blank(data: mmap.mmap, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    values = np.frombuffer(data, np.uint8)
    blank = starts >= ends
    first = values[np.minimum(starts, len(values) - 1)]
    for i in np.flatnonzero(~blank & np.isin(first, _WHITE)):
        blank[i] = not data[starts[i] : ends[i]].strip()
    return blank


def _separators(data: mmap.mmap):
    """Start and end of each line that holds the separator alone."""
    mark, position = END_OF_TEXT.encode(), 0
    while (start := data.find(mark, position)) >= 0:
        position = start + len(mark)
        begins = start == _after_bom(data) or data[start - 1 : start] == b"\n"
        rest = data[position : position + 2]
        width = len(rest) if rest == b"\r\n" else 1 if rest[:1] == b"\n" else 0
        if begins and (width or position == len(data)):
            yield start, position + width
            position += width
