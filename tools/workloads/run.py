"""What the command line asks of every workload, and where its results go."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.provenance import provenance
from tools import command_line, jsonl_rows


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a workload.

    Attributes:
      workload: its name.
      model: as --model has it; None where the workload has its own.
      workdir: where results go; not there before what is asked for is found good.
      repeats: measurements of each figure.
      rows: texts at once; None for the workload's own number.
      prompt_tokens, decode_tokens: of a text.
    """

    workload: str
    model: str | None
    workdir: Path
    repeats: int
    rows: int | None
    prompt_tokens: int
    decode_tokens: int

    @property
    def results(self) -> Path:
        """The file of all measurements, to which each run adds."""
        return self.workdir / "results.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """What this run and earlier ones have written to it."""
        has_lines = self.results.stat().st_size > 0
        return [fields for _, fields in jsonl_rows.read_rows(self.results)] if has_lines else []

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds records, with the workload, the model and what they were made with."""
        names = {"model": self.model, "workload": self.workload}
        origin = provenance("float32", command_line.settings())
        with self.results.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps({**names, **record, **origin}) + "\n")

    def report(self, text: str, name: str | None = None) -> None:
        """Prints a text, and writes it to a file of a name, else the workload's."""
        (self.workdir / f"{name or self.workload}.md").write_text(text + "\n", encoding="utf-8")
        print(text)
