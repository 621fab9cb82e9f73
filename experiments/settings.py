"""What decides the results of a workdir, so that they are all made with the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.files import replace
from qwen_jax.errors import UserError
from qwen_jax.json_fields import read_json_object

_SETTINGS = "settings.json"


def read_settings(workdir: Path) -> dict[str, Any]:
    """What decides the results of a workdir; nothing where there are none.

    Raises:
      UserError: the file is no JSON object.
    """
    path = workdir / _SETTINGS
    return dict(read_json_object(path)) if path.is_file() else {}


def settle(workdir: Path, wanted: Mapping[str, Any]) -> None:
    """Writes what decides the results, or checks that what is there was made with the same.

    Raises:
      UserError: it was made with something else.
    """
    path = workdir / _SETTINGS
    before = read_settings(workdir)
    for name, value in wanted.items():
        if name in before and before[name] != value:
            raise UserError(
                f"{path}: the results there have {name} = {before[name]}, not {value}; set "
                "it back or give another --workdir"
            )
    replace(path, json.dumps({**before, **wanted}, indent=1) + "\n")
