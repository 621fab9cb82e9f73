"""Parquet files as records: a row at a time, with the row groups that were read last in memory."""

import threading
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_jax.errors import UserError

# Rows in random order come from all groups: a data set that fits is read once, a larger one is
# read again and again, and should be prepared ahead.
CACHED_BYTES = 2 << 30


class RowGroups:
    """The row groups that the files of a source read last, up to so many bytes.

    Attributes:
      limit: bytes; the group that is read now is kept even if it is larger.
    """

    def __init__(self, limit: int = CACHED_BYTES):
        self.limit = limit
        self._lock = threading.Lock()
        self._tables: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self._bytes = 0

    def get(self, path: Path, file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        """A group's table, read if it is not held; by one thread at a time."""
        with self._lock:
            key = (path, group)
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
            table = file.read_row_group(group, columns=columns)
            self._tables[key] = table
            self._bytes += table.nbytes
            while self._bytes > self.limit and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
            return table


class ParquetRows:
    """The rows of a parquet file as dicts of those of the wanted columns that it has.

    Without `optional` all of its columns are wanted.

    A null counts as absent at every depth: Arrow gives each struct the fields of all of them, so
    that the tool calls of one row would else have the others' arguments.

    Raises:
      UserError: the file cannot be read, has no row, or none of the needed columns.
    """

    def __init__(
        self,
        path: Path,
        needed: Collection[str],
        optional: Collection[str] | None,
        groups: RowGroups,
        hint: str = "name the one to read as text_field or messages_field",
    ):
        self.path = path
        self._groups = groups
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: cannot be read as parquet ({reason})") from None
        names = self._file.schema_arrow.names
        if not set(needed) & set(names):
            raise UserError(
                f"{path}: has none of the columns {', '.join(needed)}, it has {', '.join(names)}; "
                f"{hint}"
            )
        wanted = names if optional is None else {*needed, *optional}
        self._columns = [name for name in names if name in wanted]
        meta = self._file.metadata
        rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self._ends = np.cumsum(np.array(rows, np.int64))
        if not meta.num_rows:
            raise UserError(f"{path}: holds no rows")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        """FILE: row ROW, counted from 1."""
        return f"{self.path}: row {index + 1}"

    def read(self, index: int) -> dict[str, Any]:
        """A row.

        Raises:
          UserError: its row group is broken.
        """
        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        try:
            table = self._groups.get(self.path, self._file, group, self._columns)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.name(index)}: cannot be read ({reason})") from None
        (row,) = table.slice(index - start, 1).to_pylist()
        return _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
