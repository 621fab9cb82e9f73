"""Results of many requests, kept as they come, so that a run that was cut goes on with the rest."""

import json
from pathlib import Path
from typing import Any

import jax

from qwen_jax.checkpoint.writer import write_json
from qwen_jax.errors import UserError
from qwen_jax.json_fields import read_json_object
from qwen_jax.provenance import provenance
from tools.jsonl_rows import as_json

_SETTINGS, _RESULTS, _PARTS = "generate.json", "completions.jsonl", "completions.partial.jsonl"


class KeptResults:
    """DIR/completions.jsonl, a record a request in their order, once all have one.

    Until then the records are in completions.partial.jsonl, in the order in which they came.

    Attributes:
      path: of the whole.
      done: request's place -> its record.
    """

    def __init__(self, workdir: Path, requests: list[dict[str, Any]], settings: dict[str, Any]):
        """Reads what an earlier run has kept.

        Args:
          workdir: made if it is not there.
          requests: in their order.
          settings: what a record depends on besides.

        Raises:
          UserError: the workdir has records of other requests or settings, or cannot be written.
        """
        if jax.process_count() > 1:
            raise UserError("--workdir is for one process; several print what they write")
        self.path, self._parts = workdir / _RESULTS, workdir / _PARTS
        self._count = len(requests)
        own = json.loads(json.dumps({"settings": settings, "requests": requests}))
        workdir.mkdir(parents=True, exist_ok=True)
        known = workdir / _SETTINGS
        if known.is_file():
            before = read_json_object(known)
            for name in own:
                if before.get(name) != own[name]:
                    raise UserError(
                        f"{known}: an earlier run had other {name}; give another --workdir, or "
                        "those"
                    )
        else:
            write_json(known, {**own, **provenance(str(settings.get("dtype")), settings)})
        if self.path.is_file():
            self.done = dict(enumerate(_read(self.path)))
        else:
            self.done = {row["place"]: row["record"] for row in _read(self._parts)}
        self._file = None if self.path.is_file() else self._open()

    def add(self, place: int, record: dict[str, Any]) -> None:
        """Keeps the record of a request, at once."""
        self.done[place] = record
        self._file.write(as_json({"place": place, "record": record}) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Puts all records into one file, in the order of the requests."""
        if self._file is None:
            return
        self._file.close()
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        rows = (self.done[i] for i in range(self._count))
        temporary.write_text("".join(f"{as_json(row)}\n" for row in rows), encoding="utf-8")
        temporary.replace(self.path)
        self._parts.unlink()

    def _open(self) -> Any:
        """The file that records are added to, without what a kill cut."""
        lines = [as_json({"place": i, "record": record}) for i, record in self.done.items()]
        temporary = self._parts.with_name(f"{self._parts.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        temporary.replace(self._parts)
        return self._parts.open("a", encoding="utf-8")


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none where it is not there; what a kill cut is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # Empty behind the last line, or cut.
            break
    return rows
