"""What stands beside a vocabulary: tokenizer_config.json and the older files that it replaced."""

import dataclasses
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.json_fields import read_json_object

# The order in which transformers adds named tokens that no other file gives an id.
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """One token beside the BPE vocabulary.

    Attributes:
      content: its surface form, such as "<|im_end|>".
      special: whether decoding with skip_special_tokens drops it.
      id: the id the checkpoint gives it, None where the next free one is meant.
      lstrip, rstrip: whether it swallows white space on its left or right when it is found in text.
      single_word: whether it's found only where no word character touches it.
      normalized: whether it is searched for after the normaliser has run rather than before.
    """

    content: str
    special: bool
    id: int | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The settings of one checkpoint that concern text.

    Attributes:
      named_tokens: e.g. {"eos_token": "<|im_end|>"}, only those that the checkpoint names.
      added_tokens: tokens beside the vocabulary, by id, those without an id last.
      fields: tokenizer_config.json as it stands, {} where there is none.
    """

    named_tokens: dict[str, str]
    added_tokens: tuple[AddedToken, ...]
    fields: dict[str, Any]


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises UserError naming the file when it can't be read as one."""
    try:
        # Newlines are kept as they are: a merges file or template may hold a carriage return.
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8 text; download the file again"
        ) from None


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """Settings from tokenizer_config.json, or from the two files that older checkpoints have.

    As in transformers, special_tokens_map.json and added_tokens.json are looked at only where
    tokenizer_config.json has no `added_tokens_decoder`.

    Raises:
      UserError: a file is broken, or a field isn't of the form that checkpoints use.
    """
    path = directory / "tokenizer_config.json"
    fields = read_json_object(path) if path.is_file() else {}
    naming = [(path, fields)]
    map_path = directory / "special_tokens_map.json"
    if "added_tokens_decoder" not in fields and map_path.is_file():
        naming.append((map_path, read_json_object(map_path)))

    named: dict[str, str] = {}
    extra: list[str] = []
    for source, values in naming:
        for name in NAMED_TOKENS:
            if values.get(name) is not None:
                named[name] = _content(source, name, values[name])
        # The first name is transformers 5's for what every older checkpoint calls by the second.
        for name in ("extra_special_tokens", "additional_special_tokens"):
            listed = values.get(name)
            if isinstance(listed, dict):
                listed = list(listed.values())
            if listed is None:
                continue
            if not isinstance(listed, list):
                raise UserError(f"{source}: {name} must be a list of tokens")
            extra += [_content(source, name, token) for token in listed]

    special = dict.fromkeys([*named.values(), *extra])
    if "added_tokens_decoder" in fields:
        added = _from_decoder(path, fields["added_tokens_decoder"])
    else:
        added = _from_added_tokens_json(directory / "added_tokens.json", special)
    known = {token.content for token in added}
    added += [AddedToken(content, special=True) for content in special if content not in known]
    return TokenizerConfig(named, tuple(added), fields)


def _content(path: Path, field: str, value: Any) -> str:
    """A token's surface form, which is a string or an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise UserError(f'{path}: {field} must be a token, as a string or as {{"content": ...}}')
    return content


def _from_decoder(path: Path, decoder: Any) -> list[AddedToken]:
    if not isinstance(decoder, dict):
        raise UserError(f"{path}: added_tokens_decoder must map ids to tokens")
    tokens = []
    for key, value in decoder.items():
        field = f"added_tokens_decoder[{key!r}]"
        if not key.isascii() or not key.isdigit():
            raise UserError(f"{path}: {field} must have a whole number as its key")
        content = _content(path, field, value)
        flags = value if isinstance(value, dict) else {}
        switches = ("lstrip", "rstrip", "single_word", "normalized", "special")
        for switch in switches:
            if not isinstance(flags.get(switch, False), bool):
                raise UserError(f"{path}: {field}.{switch} must be true or false")
        special = flags.get("special", False)
        tokens.append(
            AddedToken(
                content,
                special=special,
                id=int(key),
                lstrip=flags.get("lstrip", False),
                rstrip=flags.get("rstrip", False),
                single_word=flags.get("single_word", False),
                normalized=flags.get("normalized", not special),
            )
        )
    return sorted(tokens, key=lambda token: token.id)


def _from_added_tokens_json(path: Path, special: dict[str, None]) -> list[AddedToken]:
    if not path.is_file():
        return []
    tokens = []
    for content, token_id in read_json_object(path).items():
        if type(token_id) is not int or token_id < 0 or not content:
            raise UserError(f"{path}: {content!r} must map to a token id, found {token_id!r}")
        is_special = content in special
        tokens.append(
            AddedToken(content, special=is_special, id=token_id, normalized=not is_special)
        )
    return sorted(tokens, key=lambda token: token.id)
