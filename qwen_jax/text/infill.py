"""Fill-in-the-middle prompts, as the Coder models were trained with them (arXiv 2409.12186).

Of a file: <|fim_prefix|>before<|fim_suffix|>after<|fim_middle|>, and the model writes the middle.
In a repository the other files come first: <|repo_name|>name, then <|file_sep|>path and content.
CodeQwen1.5 spells the same tokens <fim_prefix>, <reponame> and so on.

The tokens are put in as ids, and all that is given is plain text: nothing in a file can forge one.
"""

import dataclasses
from collections.abc import Iterable

from qwen_jax.errors import UserError
from qwen_jax.text.tokenizers import Tokenizer, join_parts


@dataclasses.dataclass(frozen=True)
class _Names:
    prefix: str
    suffix: str
    middle: str
    pad: str
    repository: str
    file: str


_SPELLINGS = (
    _Names(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
    ),
    _Names("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>", "<reponame>", "<file_sep>"),
)
_ENDS_OF_TEXT = ("<|endoftext|>", "<|im_end|>")


def file_infill(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Ids of a prompt after which the model writes what stands between prefix and suffix.

    Raises:
      UserError: the tokenizer has no tokens for it, or a text is none.
    """
    names = _names(tokenizer)
    return _assemble(tokenizer, _hole(names, prefix, suffix))


def repository_infill(
    tokenizer: Tokenizer,
    name: str,
    files: Iterable[tuple[str, str]],
    path: str,
    prefix: str,
    suffix: str,
) -> list[int]:
    """As `file_infill`, with other files of the repository before.

    Args:
      tokenizer: of the model.
      name: of the repository.
      files: path and content of other files, those that matter most last.
      path: of the file with the hole.
      prefix, suffix: of that file.

    Raises:
      UserError: as `file_infill`, or the name or a path has more than one line.
    """
    names = _names(tokenizer, repository=True)
    parts = [(names.repository, _line("repository", name))]
    parts += [(names.file, _line("path", other) + _text("content", body) + "\n")
              for other, body in files]  # fmt: skip
    parts.append((names.file, _line("path", path)))
    return _assemble(tokenizer, [*parts, *_hole(names, prefix, suffix)])


def infill_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end what is filled in: the end of a text, and every token of these prompts."""
    names = _names(tokenizer)
    ends = (*_ENDS_OF_TEXT, *dataclasses.astuple(names))
    ids = [tokenizer.added_tokens.get(token) for token in ends]
    return tuple(token_id for token_id in ids if token_id is not None)


def _names(tokenizer: Tokenizer, repository: bool = False) -> _Names:
    for names in _SPELLINGS:
        if tokenizer.added_tokens.keys() >= set(_needed(names, repository)):
            return names
    wanted = ", ".join(_needed(_SPELLINGS[0], repository))
    raise UserError(
        f"infill: the tokenizer has no tokens such as {wanted}; take a model that fills in, such as"
        " Qwen2.5-Coder"
    )


def _needed(names: _Names, repository: bool) -> list[str]:
    hole = [names.prefix, names.suffix, names.middle]
    return [*hole, names.repository, names.file] if repository else hole


def _hole(names: _Names, prefix: str, suffix: str) -> list[tuple[str, str]]:
    return [
        (names.prefix, _text("prefix", prefix)),
        (names.suffix, _text("suffix", suffix)),
        (names.middle, ""),
    ]


def _text(field: str, value: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"infill: {field} should be a string, is {str(value)[:40]!r}")
    return value


def _line(field: str, value: str) -> str:
    if "\n" in _text(field, value) or not value:
        raise UserError(f"infill: {field} should be one line of text, is {value[:40]!r}")
    return value + "\n"


def _assemble(tokenizer: Tokenizer, parts: list[tuple[str, str]]) -> list[int]:
    """Each control token and the plain text behind it."""
    added = tokenizer.added_tokens
    return join_parts(tokenizer, [part for token, text in parts for part in (added[token], text)])
