"""How the pieces of a vocabulary spell text."""

import codecs
import dataclasses
import re
from collections.abc import Callable

from qwen_jax.text.byte_level import bytes_of_piece

# SentencePiece's mark for a space.
SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclasses.dataclass(frozen=True)
class Spelling:
    """From pieces to text.

    Attributes:
      bytes_of: the UTF-8 bytes that a piece stands for.
      errors: what becomes of bytes that are not UTF-8, for `bytes.decode`.
      drops_first_space: whether a text begins with a space that is none of its own.
    """

    bytes_of: Callable[[str], bytes]
    errors: str = "replace"
    drops_first_space: bool = False


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    return "\ufffd" * (error.end - error.start), error.end


# SentencePiece shows each byte that it can't read, where others show each broken character.
codecs.register_error("replace_each", _replace_each)

BYTE_LEVEL = Spelling(bytes_of_piece)


def byte_fallback(drops_first_space: bool) -> Spelling:
    """SentencePiece's spelling, in which <0x0A> is a byte."""
    return Spelling(_bytes_of_sentencepiece, "replace_each", drops_first_space)


def _bytes_of_sentencepiece(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    if byte is not None:
        return bytes.fromhex(byte[1])
    return piece.replace(SPACE, " ").encode()
