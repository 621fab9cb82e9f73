"""A source that the user names -> a directory on this machine."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from qwen_jax.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Data only: code that a repository brings is not even downloaded.
_COMPANIONS = ["*.json", "*.txt", "*.jinja", "*.tiktoken", "*.model", "LICENSE*", "*.md"]
_IN_SUBFOLDERS = ["*/*.json", "*/*.txt", "*/*.safetensors", "*/*.bin", "*/*.model", "*/*.md"]


def resolve_source(source: str | Path, weights: bool = True) -> Path:
    """The directory of `source`: itself, or the local copy of a hub repository.

    Downloads go to huggingface_hub's cache, from `HF_ENDPOINT` where that is set, with a progress
    bar on a terminal. Safetensors are preferred to `.bin` files.

    Args:
      source: a directory, or a hub id such as `Qwen/Qwen3-0.6B`.
      weights: whether weights are needed, or the small files beside them are enough.

    Raises:
      UserError: no such directory, an empty one, or a repository that cannot be had.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise UserError(f"{path}: the directory is empty; give a checkpoint directory")
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; give the directory that holds config.json")
    if not _HUB_ID.fullmatch(str(source)):
        raise UserError(f"{source}: no such directory, and not a hub id such as Qwen/Qwen3-0.6B")
    directory = _download(str(source), [*_COMPANIONS, *(["*.safetensors"] if weights else [])])
    if weights and not any(directory.glob("*.safetensors")):
        directory = _download(str(source), [*_COMPANIONS, "*.bin"])
    return directory


def _download(hub_id: str, patterns: list[str]) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=patterns, ignore_patterns=_IN_SUBFOLDERS
            )
        )
    except errors.GatedRepoError:
        reason = "it is gated; accept its terms on the hub, then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "no such directory, and no such repository on the hub"
    except errors.LocalEntryNotFoundError:
        reason = "not a directory, and the hub cannot be reached for a copy"
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
    raise UserError(f"{hub_id}: {reason}")
