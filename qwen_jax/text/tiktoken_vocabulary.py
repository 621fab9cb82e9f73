"""The vocabulary of Qwen1: `qwen.tiktoken`, run by the tiktoken library.

The id layout is QWenTokenizer's: the ranks of the file, then <|endoftext|>, <|im_start|>,
<|im_end|>, <|extra_0|> to <|extra_204|>, and for Qwen-VL its nine picture tokens.
"""

import base64
import binascii
import dataclasses
import functools
import unicodedata
from pathlib import Path

import tiktoken

from qwen_jax.errors import UserError
from qwen_jax.json_fields import read_json_object
from qwen_jax.text.byte_level import CHARACTER_TO_BYTE, bytes_of_piece
from qwen_jax.text.huggingface_vocabulary import QWEN2_SPLIT
from qwen_jax.text.spelling import BYTE_LEVEL
from qwen_jax.text.tokenizer_config import AddedToken, read_text

_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_EXTRAS = tuple(f"<|extra_{index}|>" for index in range(205))
_PICTURE = (
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "<img>",
    "</img>",
    "<imgpad>",
)


@dataclasses.dataclass(frozen=True)
class TiktokenVocabulary:
    """Byte-level BPE by rank.

    Attributes:
      encoding: tiktoken's encoder with the special tokens.
      ranks: bytes to rank, without the special tokens.
      added_tokens: the special tokens by id.
    """

    encoding: tiktoken.Encoding
    ranks: dict[bytes, int] = dataclasses.field(repr=False)
    added_tokens: tuple[AddedToken, ...]
    spelling = BYTE_LEVEL

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self.ranks) + len(self.added_tokens)

    @property
    def max_id(self) -> int:
        """The highest id."""
        return self.size - 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, added tokens in it found."""
        # QWenTokenizer normalises before it looks for special tokens, tokenizers after.
        return self.encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")

    def encode_with_post_processor(self, text: str) -> list[int]:
        """Ids of `text` with what the checkpoint puts around every text."""
        return self.encode(text)

    def encode_plain(self, text: str, continues: bool = False) -> list[int]:
        """Ids of `text`, added tokens in it taken as plain text; the same wherever it stands."""
        del continues
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    @functools.cached_property
    def _surfaces(self) -> dict[str, int]:
        return {token.content: token.id for token in self.added_tokens}

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        table = {rank: data for data, rank in self.ranks.items()}
        return table | {token.id: token.content.encode() for token in self.added_tokens}

    def id_of(self, piece: str) -> int | None:
        """The id of an added token or a byte-level piece, else None."""
        if piece in self._surfaces:
            return self._surfaces[piece]
        if not all(character in CHARACTER_TO_BYTE for character in piece):
            return None
        return self.ranks.get(bytes_of_piece(piece))

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of a token, None for an id that is not in the vocabulary."""
        return self._bytes.get(token_id)


def load_tiktoken(path: Path) -> TiktokenVocabulary:
    """Reads lines of "base64 rank".

    Raises:
      UserError: a line isn't of that form, a rank is missing or twice there, or one of the 256
        single bytes has no rank, so that some text could not be encoded.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line:
            continue
        data, _, rank = line.partition(" ")
        try:
            token = base64.b64decode(data, validate=True)
            if not token or not rank.isascii() or not rank.isdigit():
                raise ValueError
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}: line {number} is not a base64 token and its rank; download the file again"
            ) from None
        if token in ranks:
            raise UserError(f"{path}: line {number} repeats a token; download the file again")
        ranks[token] = int(rank)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{path}: the ranks are not 0 to {len(ranks) - 1}, each once; download the file again"
        )
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise UserError(f"{path}: no rank for the single byte {byte}; download the file again")

    surfaces = _CONTROL + _EXTRAS + (_PICTURE if _is_qwen_vl(path.parent) else ())
    special = {surface: len(ranks) + index for index, surface in enumerate(surfaces)}
    encoding = tiktoken.Encoding(
        "qwen", pat_str=QWEN2_SPLIT, mergeable_ranks=ranks, special_tokens=special
    )
    added = tuple(AddedToken(surface, special=True, id=i) for surface, i in special.items())
    return TiktokenVocabulary(encoding, ranks, added)


def _is_qwen_vl(directory: Path) -> bool:
    """Qwen-VL ships Qwen1's vocabulary file; only config.json's `visual` tells them apart."""
    path = directory / "config.json"
    return path.is_file() and "visual" in read_json_object(path)
