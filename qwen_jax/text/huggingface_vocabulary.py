"""Vocabularies that the `tokenizers` library runs: tokenizer.json, and vocab.json + merges.txt."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from qwen_jax.errors import UserError
from qwen_jax.json_fields import read_json_object
from qwen_jax.text.spelling import BYTE_LEVEL, SPACE, Spelling, byte_fallback
from qwen_jax.text.tokenizer_config import (
    AddedToken,
    TokenizerConfig,
    read_text,
)

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3.5 keeps combining marks with the letters they stand on.
QWEN3_5_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class HuggingFaceVocabulary:
    """A BPE pipeline in the `tokenizers` library, of bytes or with byte fallback.

    Attributes:
      pipeline: the whole pipeline, which finds added tokens in text.
      added_tokens: the tokens it finds, by id.
      spelling: of its pieces.
    """

    pipeline: tokenizers.Tokenizer = dataclasses.field(repr=False)
    added_tokens: tuple[AddedToken, ...]
    spelling: Spelling = BYTE_LEVEL

    @functools.cached_property
    def _at_the_start(self) -> tokenizers.Tokenizer:
        return self._without_added_tokens()

    @functools.cached_property
    def _behind_a_token(self) -> tokenizers.Tokenizer:
        plain = self._without_added_tokens()
        split = plain.pre_tokenizer
        if isinstance(split, pre_tokenizers.Metaspace) and split.prepend_scheme == "first":
            plain.pre_tokenizer = pre_tokenizers.Metaspace(
                replacement=split.replacement, prepend_scheme="never", split=split.split
            )
        return plain

    def _without_added_tokens(self) -> tokenizers.Tokenizer:
        # `encode_special_tokens` of the library would still find added tokens with special=false.
        plain = tokenizers.Tokenizer(self.pipeline.model)
        if self.pipeline.normalizer is not None:
            plain.normalizer = self.pipeline.normalizer
        if self.pipeline.pre_tokenizer is not None:
            plain.pre_tokenizer = self.pipeline.pre_tokenizer
        return plain

    @functools.cached_property
    def _pieces(self) -> dict[str, int]:
        return self.pipeline.get_vocab(with_added_tokens=True)

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return self.pipeline.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def max_id(self) -> int:
        """The highest id."""
        return max(self._pieces.values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, added tokens in it found."""
        return self.pipeline.encode(text, add_special_tokens=False).ids

    def encode_with_post_processor(self, text: str) -> list[int]:
        """Ids of `text` with what the checkpoint puts around every text."""
        return self.pipeline.encode(text, add_special_tokens=True).ids

    def encode_plain(self, text: str, continues: bool = False) -> list[int]:
        """Ids of `text`, added tokens in it taken as plain text.

        With `continues` it is encoded as it would be behind an added token.
        """
        plain = self._behind_a_token if continues else self._at_the_start
        ids = plain.encode(text, add_special_tokens=False).ids
        if self._merged_ids.isdisjoint(ids):
            return ids
        # Such a token is spelled, so that nobody can type it.
        return [
            part
            for token_id in ids
            for part in (self._spelled(token_id) if token_id in self._merged_ids else [token_id])
        ]

    @functools.cached_property
    def _merged_ids(self) -> frozenset[int]:
        """Added tokens of several characters that are in the BPE vocabulary too."""
        pieces = self.pipeline.get_vocab(with_added_tokens=False)
        added = (token.content for token in self.added_tokens)
        return frozenset(pieces[piece] for piece in added if len(piece) > 1 and piece in pieces)

    def _spelled(self, token_id: int) -> list[int]:
        piece = self.pipeline.id_to_token(token_id)
        return [
            token.id for character in piece for token in self.pipeline.model.tokenize(character)
        ]

    def id_of(self, piece: str) -> int | None:
        """The id of an added token or a byte-level piece, else None."""
        return self.pipeline.token_to_id(piece)

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of a token, None for an id that is not in the vocabulary."""
        piece = self.pipeline.id_to_token(token_id)
        return None if piece is None else self.spelling.bytes_of(piece)


def load_tokenizer_json(path: Path, config: TokenizerConfig) -> HuggingFaceVocabulary:
    """The pipeline of a tokenizer.json, with the tokens that only tokenizer_config.json adds.

    Raises:
      UserError: the file is broken or isn't BPE of bytes or with byte fallback, the two kinds that
        Qwen has.
    """
    text = read_text(path)
    try:
        pipeline = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        raise UserError(
            f"{path}: not a tokenizer ({_one_line(error)}); download the file again"
        ) from None
    if not isinstance(pipeline.model, models.BPE):
        found = type(pipeline.model).__name__
        raise UserError(f"{path}: model.type is {found}, expected BPE as every Qwen has")
    spelling = _spelling(pipeline)
    if spelling is None:
        found = "missing" if pipeline.decoder is None else type(pipeline.decoder).__name__
        raise UserError(
            f"{path}: decoder is {found}, expected ByteLevel, or Replace, ByteFallback and Fuse"
        )
    if spelling is not BYTE_LEVEL and not _is_plain_metaspace(pipeline):
        found = type(pipeline.pre_tokenizer).__name__
        raise UserError(f"{path}: pre_tokenizer is {found}, expected Metaspace or none")
    pipeline.no_truncation()
    pipeline.no_padding()
    return with_added_tokens(pipeline, config.added_tokens, path)


def _is_plain_metaspace(pipeline: tokenizers.Tokenizer) -> bool:
    return isinstance(pipeline.pre_tokenizer, pre_tokenizers.Metaspace | None)


def _spelling(pipeline: tokenizers.Tokenizer) -> Spelling | None:
    """What the decoder undoes; None for another kind of decoder."""
    if isinstance(pipeline.decoder, decoders.ByteLevel):
        return BYTE_LEVEL
    if not isinstance(pipeline.decoder, decoders.Sequence):
        return None
    steps = json.loads(pipeline.decoder.__getstate__())["decoders"]
    for drops_first_space in (False, True):
        if steps == _fallback_steps(drops_first_space):
            return byte_fallback(drops_first_space)
    return None


def _fallback_steps(drops_first_space: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if drops_first_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def load_vocab_and_merges(
    vocab_path: Path, merges_path: Path, config: TokenizerConfig
) -> HuggingFaceVocabulary:
    """Qwen2's pipeline (NFC, split by regex, bytes, BPE) over vocab.json and merges.txt.

    Raises:
      UserError: a file is broken, or the two don't belong together.
    """
    vocab = read_json_object(vocab_path)
    for piece, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < 2**32:
            raise UserError(f"{vocab_path}: {piece!r} must map to a token id, found {token_id!r}")
    merges = []
    for number, line in enumerate(read_text(merges_path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not all(pair):
            raise UserError(
                f"{merges_path}: line {number} must hold two pieces with one space between them"
            )
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                raise UserError(
                    f"{merges_path}: line {number} needs {piece!r}, which {vocab_path.name} lacks;"
                    " take both files from one checkpoint"
                )
        merges.append(pair)
    pipeline = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    pipeline.normalizer = normalizers.NFC()
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_split_pattern(config.fields)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pipeline.decoder = decoders.ByteLevel()
    return with_added_tokens(pipeline, config.added_tokens, vocab_path)


def _split_pattern(fields: dict[str, Any]) -> str:
    name = fields.get("tokenizer_class")
    return QWEN3_5_SPLIT if str(name).startswith("Qwen3_5") else QWEN2_SPLIT


def with_added_tokens(
    pipeline: tokenizers.Tokenizer, added_tokens: Sequence[AddedToken], path: Path
) -> HuggingFaceVocabulary:
    """The vocabulary of a pipeline from `path` to which the tokens are added that it lacks.

    Raises:
      UserError: a token has another id than it should have.
    """
    present = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    missing = [token for token in added_tokens if token.content not in present]
    # One call: the library rebuilds its search automaton for each.
    pipeline.add_tokens(
        [
            tokenizers.AddedToken(
                token.content,
                special=token.special,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=token.normalized,
            )
            for token in missing
        ]
    )
    for token in added_tokens:
        given = pipeline.token_to_id(token.content)
        if token.id is not None and given != token.id:
            raise UserError(
                f"{path.parent}: added token {token.content!r} has id {token.id} in"
                f" tokenizer_config.json or added_tokens.json, but {path.name} leads to id {given};"
                " take all files from one checkpoint"
            )
    added = tuple(
        AddedToken(
            token.content,
            special=token.special,
            id=token_id,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
            normalized=token.normalized,
        )
        for token_id, token in sorted(pipeline.get_added_tokens_decoder().items())
    )
    return HuggingFaceVocabulary(pipeline, added, _spelling(pipeline) or BYTE_LEVEL)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
