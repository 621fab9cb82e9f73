"""Byte-level pieces: how vocab.json, merges.txt and tokenizer.json spell bytes as characters."""

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = [byte for byte in range(256) if byte not in set(_PRINTABLE)]

# GPT-2's bijection: printable Latin-1 stands for itself, the other bytes for U+0100 upwards.
BYTE_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + index) for index, byte in enumerate(_HIDDEN)
}
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def piece_of_bytes(data: bytes) -> str:
    """The byte-level spelling of `data` (b" a" is "Ġa")."""
    return "".join(BYTE_TO_CHARACTER[byte] for byte in data)


def bytes_of_piece(piece: str) -> bytes:
    """The bytes that a byte-level piece stands for.

    A piece with any character outside the alphabet (an added token with a space, say) stands for
    its own UTF-8 bytes, as the ByteLevel decoder of `tokenizers` has it.
    """
    try:
        return bytes(CHARACTER_TO_BYTE[character] for character in piece)
    except KeyError:
        return piece.encode("utf-8")
