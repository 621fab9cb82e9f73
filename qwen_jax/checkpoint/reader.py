"""Tensor files of a checkpoint directory: what they hold is known before any byte is read.

Safetensors, single or sharded with an index, and PyTorch `.bin` files read by torch without
unpickling anything but tensors.
"""

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from qwen_jax.errors import UserError
from qwen_jax.json_fields import read_json

_SAFETENSORS_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16,
                       "BF16": ml_dtypes.bfloat16}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
      file: that holds it.
      shape: its axes.
      dtype: as stored.
      read: copies its values into memory.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def open_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint directory, by name, in file order.

    Safetensors are preferred to `.bin` where a directory has both, as transformers prefers them.

    Raises:
      UserError: no weights, a broken or truncated file, an index that contradicts its shards.
    """
    for single, open_file in (("model.safetensors", _open_safetensors),
                              ("pytorch_model.bin", _open_bin)):  # fmt: skip
        if (directory / single).is_file():
            return open_file(directory / single)
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _open_shards(index, open_file)
    raise UserError(
        f"{directory}: no weights; looked for model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin and pytorch_model.bin.index.json"
    )


def _open_shards(
    index: Path, open_file: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise UserError(f"{index}: weight_map should map tensor names to files")
    tensors: dict[str, StoredTensor] = {}
    for file in dict.fromkeys(weight_map.values()):
        if file in ("", ".", "..") or "/" in file or "\\" in file:
            raise UserError(f"{index}: shard {file!r} is not a file name in this directory")
        path = index.parent / file
        if not path.is_file():
            raise UserError(f"{index}: names shard {file}, which is missing; download it again")
        for name, tensor in open_file(path).items():
            if name in tensors:
                raise UserError(
                    f"{path}: tensor {name} is also in {tensors[name].file.name}; keep one"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{index}: tensor {name} is not in {file}, where the index has it")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise UserError(f"{tensor.file}: tensor {name} is not in {index.name}")
    return tensors


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        handle = safetensors.safe_open(path, framework="numpy")
        names = handle.keys()
        slices = {name: handle.get_slice(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: broken or truncated safetensors file ({error}); download it again"
        ) from None
    tensors = {}
    for name, piece in slices.items():
        if piece.get_dtype() not in _SAFETENSORS_DTYPES:
            raise UserError(
                f"{path}: tensor {name} is stored as {piece.get_dtype()}, which is not read; "
                f"known: {', '.join(_SAFETENSORS_DTYPES)}"
            )
        tensors[name] = StoredTensor(
            file=path,
            shape=tuple(piece.get_shape()),
            dtype=np.dtype(_SAFETENSORS_DTYPES[piece.get_dtype()]),
            read=lambda name=name: handle.get_tensor(name),
        )
    return tensors


def _open_bin(path: Path) -> dict[str, StoredTensor]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading .bin files needs PyTorch; pip install torch, or use safetensors"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors and is not unpickled, since that runs code; "
            "use a safetensors copy"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: broken, truncated or in the format before PyTorch 1.6 ({reason}); "
            "save it again with torch.save"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: should hold a dict of tensors, holds a {type(content).__name__}")
    return {name: _torch_tensor(path, name, value) for name, value in content.items()}


def _torch_tensor(path: Path, name: Any, value: Any) -> StoredTensor:
    import torch

    dtypes = {
        torch.float64: np.float64,
        torch.float32: np.float32,
        torch.float16: np.float16,
        torch.bfloat16: ml_dtypes.bfloat16,
    }
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise UserError(f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor")
    if value.dtype not in dtypes:
        raise UserError(f"{path}: tensor {name} is stored as {value.dtype}, which is not read")

    def read() -> np.ndarray:
        plain = value.detach().contiguous()
        # numpy has no bfloat16 of its own, so its bits travel as integers.
        if plain.dtype is torch.bfloat16:
            return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return plain.numpy()

    return StoredTensor(path, tuple(value.shape), np.dtype(dtypes[value.dtype]), read)
