"""Tokens on disk by record: the format, and how it is read.

A directory with meta.json and parts `00000`, `00001`, ..., each a directory of

* tokens.bin: the ids of its records one after another, little-endian, uint16 where the vocabulary
  fits, else uint32;
* ends.npy: uint64 [records], where each record's tokens end;
* learned.bin: of chats, one bit a token, the first in the highest bit, whether it is learned. Of
  texts all are.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.json_fields import Fields, read_json_object, shown
from qwen_jax.text import Tokenizer
from qwen_jax.training.data.options import TokenOptions
from qwen_jax.training.data.tokenise import Example, Kind

META = "meta.json"
PLAN = "plan.json"
FORMAT = 1
TOKENS, ENDS, LEARNED = "tokens.bin", "ends.npy", "learned.bin"


@dataclasses.dataclass(frozen=True)
class IndexMeta:
    """What meta.json says.

    Attributes:
      kind: of the records.
      dtype: of tokens.bin.
      tokenizer: fingerprint of the tokenizer.
      records: of each part.
      tokens: of each part.
      plan: what the directory was made from: sources and options.
    """

    kind: Kind
    dtype: str
    tokenizer: str
    records: tuple[int, ...]
    tokens: tuple[int, ...]
    plan: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The content of meta.json."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def is_prepared(directory: Path) -> bool:
    """Whether tools.prepare_data has begun a directory, or finished it."""
    return (directory / META).is_file() or (directory / PLAN).is_file()


def read_meta(directory: Path) -> IndexMeta:
    """What a prepared directory holds.

    Raises:
      UserError: it is unfinished, or its meta.json has another form.
    """
    path = directory / META
    if not path.exists() and (directory / PLAN).exists():
        raise UserError(f"{directory}: is not finished; run tools.prepare_data again to go on")
    fields = Fields(read_json_object(path), str(path))
    version = fields.require("format", "integer")
    if version != FORMAT:
        raise fields.refuse("format", version, f"this is {FORMAT}; prepare the data anew")
    kind, dtype = fields.require("kind", "string"), fields.require("dtype", "string")
    if kind not in ("text", "chat"):
        raise fields.refuse("kind", kind, "known are text and chat")
    if dtype not in ("uint16", "uint32"):
        raise fields.refuse("dtype", dtype, "known are uint16 and uint32")
    meta = IndexMeta(
        kind,
        dtype,
        fields.require("tokenizer", "string"),
        tuple(fields.require("records", "list of integers")),
        tuple(fields.require("tokens", "list of integers")),
        fields.require("plan", "object"),
    )
    if fields.values:
        raise UserError(f"{path}: unknown field {next(iter(fields.values))}; prepare the data anew")
    if len(meta.records) != len(meta.tokens) or not meta.records:
        raise UserError(f"{path}: records and tokens are not of the same parts; prepare it anew")
    return meta


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of what encoding depends on: each token's bytes, the added tokens, a text's ids."""
    digest = hashlib.sha256()
    for token in range(tokenizer.max_id + 1):
        digest.update((tokenizer.vocabulary.bytes_of(token) or b"") + b"\xff")
    added = sorted((i, name) for name, i in tokenizer.added_tokens.items())
    digest.update(repr((added, tokenizer.encode(_PROBE, allow_special=False))).encode())
    return digest.hexdigest()


def templates_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the chat templates."""
    templates = {name: t.source for name, t in tokenizer.chat_templates.by_name.items()}
    return hashlib.sha256(json.dumps(templates, sort_keys=True).encode()).hexdigest()


def check_made_as(directory: Path, meta: IndexMeta, tokenizer: Tokenizer, options: TokenOptions):
    """Checks that records were tokenised as they would be now.

    Raises:
      UserError: another tokenizer, template or option made them; names it.
    """
    if meta.tokenizer != fingerprint(tokenizer):
        raise UserError(
            f"{directory}: was made with another tokenizer than the checkpoint's; prepare the data "
            "anew"
        )
    made, asked = meta.plan.get("options", {}), dataclasses.asdict(options)
    of_texts = ("end_of_text", "allow_special")
    for name, value in asked.items():
        value = list(value) if isinstance(value, tuple) else value
        if (name in of_texts) == (meta.kind == "text") and made.get(name) != value:
            raise UserError(
                f"{directory}: was made with {name} = {shown(made.get(name))}, now it is "
                f"{shown(value)}; prepare the data anew, or change {name}"
            )
    if meta.kind == "chat" and meta.plan.get("chat_templates") != templates_fingerprint(tokenizer):
        raise UserError(
            f"{directory}: was made with another chat template than the checkpoint's; prepare the "
            "data anew"
        )


# What vocabularies split differently: case, digits, white space, scripts, combining marks.
_PROBE = (
    "The year 2024's  3.14\n\n\tx=[0x1F];  don't  Ünïcode 通义千问 مرحبا e\u0301 \U0001f600 ..."
)


class IndexedRecords:
    """The records of a prepared directory, mapped into memory; threads may read at once.

    Attributes:
      meta: what meta.json says.

    Raises:
      UserError: the directory is unfinished or damaged, or made otherwise than asked for.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, options: TokenOptions):
        self._directory = directory
        self.meta = read_meta(directory)
        check_made_as(directory, self.meta, tokenizer, options)
        self._ends = list(itertools.accumulate(self.meta.records))
        self._parts: dict[int, _Part] = {}
        self._lock = threading.Lock()
        for number in range(len(self._ends)):
            self._check_sizes(number)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        """A record's tokens."""
        number = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[number] - self.meta.records[number])
        part = self._part(number)
        start, end = int(part.ends[place - 1]) if place else 0, int(part.ends[place])
        ids = part.tokens[start:end].astype(np.int32)
        learned = np.ones(len(ids), bool)
        if part.learned is not None:
            bits = np.unpackbits(part.learned[start // 8 : -(-end // 8)])
            learned = bits[start % 8 :][: end - start].astype(bool)
        return Example(f"{self._directory}: record {index + 1}", ids, learned)

    def _check_sizes(self, number: int) -> None:
        tokens = self.meta.tokens[number]
        sizes = {TOKENS: tokens * np.dtype(self.meta.dtype).itemsize}
        if self.meta.kind == "chat":
            sizes[LEARNED] = -(-tokens // 8)
        for name, size in sizes.items():
            path = part_directory(self._directory, number) / name
            if not path.is_file():
                raise UserError(f"{path}: no such file; prepare the data anew")
            if path.stat().st_size != size:
                raise UserError(
                    f"{path}: has {path.stat().st_size} bytes, should have {size}; prepare the "
                    "data anew"
                )

    def _part(self, number: int) -> "_Part":
        with self._lock:
            if number not in self._parts:
                self._parts[number] = self._open(number)
            return self._parts[number]

    def _open(self, number: int) -> "_Part":
        folder = part_directory(self._directory, number)
        try:
            ends = np.load(folder / ENDS, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / ENDS}: cannot be read ({error})") from None
        if ends.shape != (self.meta.records[number],) or ends[-1] != self.meta.tokens[number]:
            raise UserError(f"{folder / ENDS}: is not what {META} says; prepare the data anew")
        tokens = np.memmap(folder / TOKENS, np.dtype(self.meta.dtype).newbyteorder("<"), "r")
        learned = np.memmap(folder / LEARNED, np.uint8, "r") if self.meta.kind == "chat" else None
        return _Part(tokens, ends, learned)


@dataclasses.dataclass(frozen=True)
class _Part:
    tokens: np.ndarray
    ends: np.ndarray
    learned: np.ndarray | None


def part_directory(directory: Path, number: int) -> Path:
    """Where a part lies."""
    return directory / f"{number:05d}"
