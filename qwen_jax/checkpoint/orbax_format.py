"""Parameters as an Orbax checkpoint in a model directory, beside config.json and the tokenizer.

Orbax writes arrays that are in memory. What is on disk is written, and all is read, through
TensorStore, on which Orbax stands, since that can be done a part of a tensor at a time: `params`
holds an OCDBT database with one zarr array for each parameter, named by its path in the tree with
dots between.
"""

import contextlib
import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import tqdm

from qwen_jax.checkpoint import names
from qwen_jax.checkpoint.reader import (
    BLOCK,
    SAFETENSORS_DTYPES,
    Index,
    StoredTensor,
    block_shape,
    blocks,
)
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

    Arrays may be sharded. Of several processes each calls this and writes the shards that it has;
    a directory that all of them see is needed.

    Raises:
      OSError: they cannot be written.
    """
    # Which takes longer to import than all that reading needs.
    import orbax.checkpoint as ocp

    print_unraisable = sys.unraisablehook

    def skip_orphans(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            print_unraisable(unraisable)

    # Writes that outlive the first failure find their event loop closed, now or later.
    sys.unraisablehook = skip_orphans
    with logs_silenced():
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


def write_orbax(directory: Path, tensors: Mapping[names.Path, StoredTensor]) -> None:
    """Writes tensors, by their path in the tree, into `directory` as they are read.

    A few blocks of a tensor are in memory at a time, and not the tensor. On disk too it is in those
    blocks, so that whoever reads it need not hold more.

    Raises:
      OSError: they cannot be written.
    """
    # Orbax writes the tree; then each array is put in the place of what stood for it.
    stand_ins = {path: np.zeros(1, tensor.dtype) for path, tensor in tensors.items()}
    save_orbax(directory, names.unflatten(stand_ins))
    database = _database(directory / _FOLDER)
    under_way: list[tensorstore.Future] = []
    waiting = 0
    try:
        for path, tensor in tqdm.tqdm(tensors.items(), "writing", unit="tensor", disable=None):
            array = _replace_array(database, ".".join(path), tensor)
            for block in blocks(tensor.shape, tensor.dtype):
                values = tensor.read(block)
                under_way.append(
                    array[block].write(values, can_reference_source_data_indefinitely=True)
                )
                waiting += values.nbytes
                if waiting >= BLOCK:
                    _wait_for(under_way)
                    under_way, waiting = [], 0
        _wait_for(under_way)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise OSError(_one_line(error)) from None
    finally:
        # What is still being written would come back after the caller has removed the folder.
        for future in under_way:
            future.exception()


def _wait_for(futures: list[tensorstore.Future]) -> None:
    for future in futures:
        future.result()


def _replace_array(
    database: dict[str, Any], name: str, tensor: StoredTensor
) -> tensorstore.TensorStore:
    """The array `name`, made anew for the values of `tensor`, in blocks and else as it was."""
    spec = {"driver": "zarr", "kvstore": {**database, "path": f"{name}/"}}
    old = tensorstore.open(spec, open=True).result().spec().to_json()["metadata"]
    shape = {"shape": tensor.shape, "chunks": block_shape(tensor.shape, tensor.dtype)}
    spec |= {"metadata": old | shape}
    return tensorstore.open(spec, create=True, delete_existing=True).result()


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
    database = _database(path)
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


def _database(path: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": f"file://{path.absolute()}/"}


def _open_array(path: Path, database: dict[str, Any], name: str, driver: str) -> StoredTensor:
    spec = {"driver": driver, "kvstore": {**database, "path": f"{name}/"}}
    array = tensorstore.open(spec, open=True, read=True).result()
    shape, dtype = tuple(array.shape), array.dtype.numpy_dtype
    # Its chunks can be read whole only; each should be in one block.
    in_blocks = array.chunk_layout.read_chunk.shape == block_shape(shape, dtype)

    def read(index: Index = ()) -> np.ndarray:
        # A part of an array would begin where it lies in the whole.
        part = array[index][tensorstore.d[:].translate_to[0]] if index else array
        try:
            if not in_blocks:
                return part.read().result()
            # TensorStore would hold many chunks as they are stored beside the array.
            out = np.empty(part.shape, dtype)
            for block in blocks(part.shape, dtype):
                out[block] = part[block].read().result()
            return out
        except (ValueError, OSError) as error:
            raise _broken(path, error) from None

    return StoredTensor(name, path, shape, dtype, read, in_blocks=in_blocks)


def _broken(path: Path, reason: str | Exception) -> UserError:
    reason = _one_line(reason)
    return UserError(f"{path}: broken or incomplete Orbax checkpoint ({reason}); convert it again")


def silence_logs() -> Callable[[], None]:
    """Keeps from stderr what Orbax logs of a failure, since it raises it as well.

    Returns:
      What ends that.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.disabled for logger in loggers]
    hook, show = sys.unraisablehook, warnings.showwarning
    for logger in loggers:
        logger.disabled = True

    def awaited(message: Warning | str, *more: Any) -> None:
        # Writes that had not begun when another failed; they are warned of when they are collected.
        if "was never awaited" not in str(message):
            show(message, *more)

    def of_python(unraisable: Any) -> None:
        # TensorStore's threads speak up where the event loop that waited for them is closed.
        if unraisable.object is not None:
            hook(unraisable)

    def restore() -> None:
        sys.unraisablehook, warnings.showwarning = hook, show
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled

    sys.unraisablehook, warnings.showwarning = of_python, awaited
    return restore


@contextlib.contextmanager
def logs_silenced() -> Iterator[None]:
    """`silence_logs` for a block."""
    restore = silence_logs()
    try:
        yield
    finally:
        restore()


def _one_line(reason: str | Exception) -> str:
    return " ".join(str(reason).split())[:200] or type(reason).__name__
