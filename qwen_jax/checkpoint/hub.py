"""A source that the user names -> a directory on this machine."""

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import tqdm as hub_bar

from qwen_jax.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Data only, and only what lies beside config.json: a "*" matches slashes too.
_COMPANIONS = ["*.json", "*.txt", "*.jinja", "*.tiktoken", "*.model", "LICENSE*", "*.md"]
_NEVER = ["*.py", *(f"*/*.{end}" for end in ("json", "txt", "safetensors", "bin", "model", "md"))]


class _TerminalBar(hub_bar):
    """The hub's progress bar, silent where stderr is not a terminal."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "disable": kwargs.get("disable") or None})


# The small chat model that the package brings along, which `qwen_jax.embedded` makes.
EMBEDDED = "embedded"
_EMBEDDED_MODEL = Path(__file__).parents[1] / "embedded" / "model"


def resolve_source(source: str | Path, weights: bool = True) -> Path:
    """The directory of `source`: itself, the local copy of a hub repository, or the package's own.

    Downloads go to huggingface_hub's cache, from `HF_ENDPOINT` where that is set, with a progress
    bar on a terminal. Safetensors are preferred to `.bin` files. Code that a repository brings is
    not even downloaded.

    Args:
      source: a directory, a hub id such as `Qwen/Qwen3-0.6B`, or "embedded" where no directory
        is called so.
      weights: whether weights are needed, or the small files beside them are enough.

    Raises:
      UserError: no such directory, an empty one, one without config.json where weights are needed,
        or a repository that cannot be had.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"the source is a {type(source).__name__}; give a checkpoint directory or a hub id"
        )
    if not str(source):
        raise UserError("the source is empty; give a checkpoint directory or a hub id")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            if not any(path.iterdir()):
                raise UserError(f"{path}: the directory is empty; give a checkpoint directory")
            if weights and not (path / "config.json").exists():
                raise UserError(
                    f"{path}: holds no config.json; give the directory of a checkpoint, "
                    "where it lies beside the weights"
                )
            return path
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source}: cannot be read ({reason}); give another source") from None
    if exists:
        raise UserError(f"{path}: is a file; give the directory that holds config.json")
    if str(source) == EMBEDDED:
        return _EMBEDDED_MODEL
    if not _HUB_ID.fullmatch(str(source)):
        raise UserError(
            f"{source}: no such directory, and not a hub id; give one of the two, "
            "such as Qwen/Qwen3-0.6B"
        )
    directory = _download(str(source), [*_COMPANIONS, *(["*.safetensors"] if weights else [])])
    if weights and not any(directory.glob("*.safetensors")):
        directory = _download(str(source), [*_COMPANIONS, "*.bin"])
    return directory


def download_dataset(hub_id: str, revision: str | None = None) -> Path:
    """The local copy of a data set's parquet, JSONL and text files.

    Raises:
      UserError: it is no hub id, or cannot be had.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise UserError(
            f"{hub_id}: no such file or directory, and not the id of a data set on the hub; give "
            "one of these"
        )
    patterns = ["*.parquet", "*.jsonl", "*.txt"]
    return _download(hub_id, patterns, ignore=None, repo_type="dataset", revision=revision)


def _download(
    hub_id: str,
    patterns: list[str],
    ignore: list[str] | None = _NEVER,
    repo_type: str = "model",
    revision: str | None = None,
) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=ignore,
                tqdm_class=_TerminalBar,
            )
        )
    except errors.GatedRepoError:
        reason = "it is gated; accept its terms on the hub, then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = (
            "no such directory, and no such repository on the hub; check the spelling, "
            "and set HF_TOKEN if it is private"
        )
    except errors.LocalEntryNotFoundError:
        reason = (
            "no such directory, no complete copy in the hub's cache, and the hub cannot be "
            "reached; check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
        )
    except Exception as error:  # The hub's HTTP client, and with it what it raises, has changed.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        reason = f"cannot be downloaded ({reason}); try again"
    raise UserError(f"{hub_id}: {reason}")
