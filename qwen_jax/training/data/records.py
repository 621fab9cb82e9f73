"""Sources of records: files, directories, patterns and data sets of the hub, read at random."""

import bisect
import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from qwen_jax.checkpoint.hub import download_dataset
from qwen_jax.errors import UserError
from qwen_jax.training.data.lines import JsonLines, PlainText
from qwen_jax.training.data.options import SourceOptions

# What a chat's template gets beside messages and tools, by the names that others use too.
TEMPLATE_FIELDS = ("enable_thinking", "chat_template_kwargs")

# Of a pair of answers.
PAIR_FIELDS = ("prompt", "chosen", "rejected")

_ENDINGS = (".jsonl", ".txt", ".parquet")
_SPLITS = {"train", "test", "validation", "valid", "val", "dev"}


@dataclasses.dataclass(frozen=True)
class Record:
    """What a source holds at one place.

    Attributes:
      name: what errors call it, FILE:LINE.
      fields: by name, as they were written.
    """

    name: str
    fields: dict[str, Any]


class _File(Protocol):
    path: Path

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Any: ...


class Records:
    """The records of several files, one after another; threads may read at once.

    Attributes:
      files: paths in order.
    """

    def __init__(self, files: Sequence[_File], options: SourceOptions):
        self.files = [file.path for file in files]
        self._files = files
        self._options = options
        self._ends = list(itertools.accumulate(len(file) for file in files))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """A record.

        Raises:
          UserError: it is broken; names file and line.
        """
        which = bisect.bisect_right(self._ends, index)
        file = self._files[which]
        place = index - (self._ends[which] - len(file))
        fields = file.read(place)
        if isinstance(fields, str):
            fields = {self._options.text_field: fields}
        return Record(file.name(place), fields)


def open_records(options: SourceOptions, pairs: bool = False, whole: bool = False) -> Records:
    """The records of a source; data sets of the hub are downloaded to its cache first.

    Args:
      options: of the source.
      pairs: whether they are pairs of answers, else texts or conversations.
      whole: whether all fields are read; else tables, which keep each column apart, are read only
        where tokens come from.

    Raises:
      UserError: there is no such thing, it holds no files that are read, or one that is broken.
    """
    # Not where this module is imported: pyarrow starts threads, and a command that wants malloc
    # otherwise (`training.host_memory`) has to say so before any.
    from qwen_jax.training.data.columns import ParquetRows, RowGroups

    groups = RowGroups()
    needed = PAIR_FIELDS if pairs else (options.text_field, options.messages_field)
    hint = ("rename those of the pairs",) if pairs else ()
    optional = None if whole else (options.tools_field, *TEMPLATE_FIELDS)

    def open_file(path: Path) -> _File:
        match path.suffix:
            case ".jsonl":
                return JsonLines(path)
            case ".txt":
                return PlainText(path)
            case ".parquet":
                return ParquetRows(path, needed, optional, groups, *hint)
        raise UserError(f"{path}: is not read; give a file that ends in {', '.join(_ENDINGS)}")

    return Records([open_file(path) for path in find_files(options)], options)


def find_files(options: SourceOptions) -> list[Path]:
    """The files of a source, in order of their names.

    Raises:
      UserError: there are none, or several splits or folders of which none is chosen.
    """
    path = Path(options.path).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _chosen(path, options)
    if re.search(r"[*?\[]", options.path):
        anchor = Path(path.anchor)
        found = sorted(anchor.glob(str(path.relative_to(anchor))))
        if not found:
            raise UserError(f"{options.path}: no file has such a name")
        return found
    return _chosen(download_dataset(options.path, options.revision), options)


def _chosen(folder: Path, options: SourceOptions) -> list[Path]:
    """The files of the wanted split, which must lie together unless a pattern says otherwise."""
    names = [
        PurePosixPath(path.relative_to(folder).as_posix())
        for path in sorted(folder.rglob("*"))
        if path.suffix in _ENDINGS and path.is_file()
    ]
    if options.files is not None:
        names = [name for name in names if fnmatch.fnmatch(str(name), options.files)]
    if not names:
        wanted = options.files or f"*{', *'.join(_ENDINGS)}"
        hint = "; of other formats the hub keeps a copy: give revision refs/convert/parquet"
        raise UserError(f"{options.path}: holds no files {wanted}{hint}")
    endings = sorted({name.suffix for name in names})
    if len(endings) > 1:
        raise UserError(
            f"{options.path}: holds {', '.join(endings)}; choose by files, such as *{endings[0]}"
        )
    splits = {name: _split(name) for name in names}
    if any(splits.values()):
        if None in splits.values():
            bare = next(name for name in names if splits[name] is None)
            raise UserError(
                f"{options.path}: some files are named by splits, {bare} is not; choose by files"
            )
        names = [name for name in names if splits[name] == options.split]
        if not names:
            found = ", ".join(sorted(set(splits.values())))
            raise UserError(f"{options.path}: has no split {options.split}, it has {found}")
    # A folder may be a split's or a subset's.
    folders = sorted({str(name.parent) for name in names})
    if options.files is None and len(folders) > 1:
        raise UserError(
            f"{options.path}: has files in {', '.join(folders)}; choose by files, "
            f"such as {folders[0]}/*, or * for all"
        )
    return [folder / name for name in names]


def _split(name: PurePosixPath) -> str | None:
    """The split that a file's name or its folders name: `train-00000-of-00002`, `test/0000`."""
    words = [re.split(r"[-_.]", part)[0] for part in (name.name, *reversed(name.parts[:-1]))]
    return next((word for word in words if word in _SPLITS), None)
