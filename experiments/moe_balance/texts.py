"""Texts by domain for a checkpoint: read from files, as rows of tokens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.moe_balance.domains import real_text
from qwen_jax.errors import UserError
from qwen_jax.text import Tokenizer

# Of a domain, characters that are read for each token that is wanted: more than any text needs.
_CHARACTERS = 16


def read_domains(places: Sequence[str]) -> dict[str, str]:
    """Texts by the name of their domain.

    Args:
      places: of domains. A directory has one in each entry, by its name: a text file, or a
        directory of such, whose files follow each other by name. "NAME=PATH" is one by itself, a
        file or a directory. None at all for two texts that come with Python.

    Raises:
      UserError: a place that is not there, has no text, or a name that comes twice; fewer than two
        domains.
    """
    if not places:
        return {name: _as_text(real_text(name)) for name in ("python", "english")}
    found: dict[str, str] = {}
    for place in places:
        name, sign, path = place.partition("=")
        entries = [(name, Path(path).expanduser())] if sign else _entries(Path(place).expanduser())
        for name, path in entries:
            if name in found:
                raise UserError(f"--domains: there are two domains called {name}; rename one")
            found[name] = _read(path)
    if len(found) < 2:
        raise UserError(
            f"--domains={','.join(places)}: is one domain, {next(iter(found))}; what experts have "
            "to do with domains needs two or more"
        )
    return found


def _entries(directory: Path) -> list[tuple[str, Path]]:
    if not directory.is_dir():
        raise UserError(
            f"--domains: {directory} is no directory; give one with a file or directory for each "
            "domain, or NAME=PATH"
        )
    found = [
        (path.stem if path.is_file() else path.name, path)
        for path in sorted(directory.iterdir())
        if not path.name.startswith(".")
    ]
    if not found:
        raise UserError(f"--domains: {directory} is empty; put a file or directory of each there")
    return found


def _read(path: Path) -> str:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{file}: is not UTF-8 text; remove it from its domain") from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    text = "\n\n".join(text for text in texts if text.strip())
    if not text:
        raise UserError(f"{path}: has no text")
    return text


def rows_of(
    texts: dict[str, str], tokenizer: Tokenizer, tokens: int, length: int
) -> dict[str, np.ndarray]:
    """Rows of tokens, as many of each domain.

    Args:
      texts: by domain.
      tokenizer: of the model.
      tokens: that are read of each domain; rounded down to whole rows.
      length: of a row.

    Returns:
      `input_ids`, int32 [rows, length], and `domains`, int32 [rows], domain after domain.

    Raises:
      UserError: less than a row is asked for, or a text has fewer tokens.
    """
    count = tokens // length
    if not count:
        raise UserError(f"--tokens={tokens}: less than a row of --length={length}")
    ids, domains = [], []
    for number, (name, text) in enumerate(texts.items()):
        found = tokenizer.encode(text[: _CHARACTERS * tokens])
        if len(found) < count * length:
            raise UserError(
                f"domain {name} has {len(found):,} tokens, and {count * length:,} are asked for; "
                f"give more text or --tokens={len(found) // length * length or length}"
            )
        ids.append(np.array(found[: count * length], np.int32).reshape(count, length))
        domains += [number] * count
    return {"input_ids": np.concatenate(ids), "domains": np.array(domains, np.int32)}


def _as_text(ids: np.ndarray) -> str:
    return ids.astype(np.uint8).tobytes().decode("ascii")
