"""What a measurement was made with, so that it can be made again."""

import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

_ROOT = Path(__file__).parents[1]
_DISTRIBUTIONS = ("jax", "jaxlib", "flax", "torch", "transformers")


def provenance(dtype: str, settings: dict[str, Any], also: Sequence[str] = ()) -> dict[str, Any]:
    """One JSON object: source, versions, device, and what was asked for.

    Args:
      dtype: of parameters and activations.
      settings: flag -> its value.
      also: further distributions that took part, whose versions are told too.
    """
    return {
        "git": git_hash(_ROOT),
        "versions": {name: _version(name) for name in (*_DISTRIBUTIONS, *also)},
        "device": jax.devices()[0].device_kind,
        "dtype": dtype,
        "flags": settings,
    }


def git_hash(root: Path) -> str | None:
    """The commit that `root` has checked out, `-dirty` behind it where files differ from it.

    None where `root` is not itself a checkout: an installed package may lie in someone else's.
    """
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # No git here, or not our repository.
        return None
    return done.stdout.strip() or None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
