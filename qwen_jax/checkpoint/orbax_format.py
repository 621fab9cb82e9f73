"""Parameters as an Orbax checkpoint in a model directory, beside config.json and the tokenizer.

Orbax writes them. They are read through TensorStore, on which Orbax stands, since that can be done
a tensor at a time: `params` holds an OCDBT database with one zarr array for each parameter, named
by its path in the tree with dots between.
"""

import contextlib
import gc
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from qwen_jax.checkpoint import names
from qwen_jax.checkpoint.reader import SAFETENSORS_DTYPES, StoredTensor
from qwen_jax.checkpoint.tree_check import check_tree
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

_FOLDER = "params"

# Any of them will do, so that a damaged checkpoint is called damaged rather than absent.
_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")

# The file that says what an array is -> TensorStore's driver for it.
_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}


_FLOATS = [np.dtype(dtype) for dtype in SAFETENSORS_DTYPES.values()]


def is_orbax(directory: Path) -> bool:
    """Whether a model directory holds its parameters in Orbax's format."""
    return any((directory / _FOLDER / file).exists() for file in _MARKS)


def save_orbax(directory: Path, params: Mapping[str, Any]) -> None:
    """Writes `params`, jax or numpy arrays, into `directory`.

    Raises:
      OSError: they cannot be written.
    """
    print_unraisable = sys.unraisablehook

    def skip_orphans(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            print_unraisable(unraisable)

    # Writes that outlive the first failure find their event loop closed, now or later.
    sys.unraisablehook = skip_orphans
    with _logs_silenced():
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((directory / _FOLDER).absolute(), params)
            sys.unraisablehook = print_unraisable
            return
        except Exception as error:  # Orbax and TensorStore raise many types for a full disk.
            reason = _one_line(error)
        # They also report themselves when they are collected, now or as late as at exit.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        logging.getLogger("asyncio").addFilter(_is_of_no_task)
        gc.collect()
        _wait_for_orphans(directory)
    raise OSError(reason)


def _is_of_no_task(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Task ")


def _wait_for_orphans(directory: Path) -> None:
    """Returns when nothing has changed below `directory` for a while.

    After a failure TensorStore's threads go on with what they have begun, folders included, and
    what they make after the caller has removed `directory` would stay behind.
    """
    before, quiet_since = None, time.monotonic()
    deadline = quiet_since + 30
    while time.monotonic() < min(quiet_since + 0.5, deadline):
        try:
            files = {(path, path.stat().st_size) for path in directory.rglob("*")}
        except OSError:  # Renamed or removed since it was listed.
            files = None
        if files is None or files != before:
            before, quiet_since = files, time.monotonic()
        time.sleep(0.02)


def open_orbax(
    config: ModelConfig, directory: Path
) -> tuple[ModelConfig, dict[names.Path, StoredTensor]]:
    """The model that is stored and the tensor of each parameter, by its path in the tree.

    Raises:
      UserError: a broken checkpoint, or one whose parameters are not those of `config`.
    """
    path = (directory / _FOLDER).absolute()
    if not (path / "manifest.ocdbt").is_file():
        raise _broken(path, "it has no manifest.ocdbt")
    database = {"driver": "ocdbt", "base": f"file://{path}/"}
    try:
        keys = tensorstore.KvStore.open(database).result().list().result()
        tensors = {}
        for key in keys:
            name, _, file = key.decode().rpartition("/")
            if file in _DRIVERS:
                tensors[tuple(name.split("."))] = _open_array(path, database, name, _DRIVERS[file])
    except (ValueError, OSError) as error:
        raise _broken(path, error) from None
    config = names.fit_config(config, map("/".join, tensors))
    check_tree(config, names.unflatten(tensors), directory)
    for tensor in tensors.values():
        if tensor.dtype not in _FLOATS:
            raise UserError(
                f"{path}: parameter {tensor.name} is stored as {tensor.dtype.name}, which is not "
                f"read; save it as one of {', '.join(dtype.name for dtype in _FLOATS)}"
            )
    return config, tensors


def _open_array(path: Path, database: dict[str, Any], name: str, driver: str) -> StoredTensor:
    spec = {"driver": driver, "kvstore": {**database, "path": f"{name}/"}}
    array = tensorstore.open(spec, open=True, read=True).result()

    def read() -> np.ndarray:
        try:
            return array.read().result()
        except (ValueError, OSError) as error:
            raise _broken(path, error) from None

    return StoredTensor(name, path, tuple(array.shape), array.dtype.numpy_dtype, read)


def _broken(path: Path, reason: str | Exception) -> UserError:
    reason = _one_line(reason)
    return UserError(f"{path}: broken or incomplete Orbax checkpoint ({reason}); convert it again")


@contextlib.contextmanager
def _logs_silenced() -> Iterator[None]:
    """Keeps from stderr what Orbax logs of a failure, since it raises it as well."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _one_line(reason: str | Exception) -> str:
    return " ".join(str(reason).split())[:200] or type(reason).__name__
