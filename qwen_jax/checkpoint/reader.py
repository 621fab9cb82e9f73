"""Tensor files of a checkpoint directory: what they hold is known before any byte is read.

Safetensors, single or sharded with an index, and PyTorch `.bin` files read by torch without
unpickling anything but tensors.
"""

import dataclasses
import functools
import itertools
import json
import math
import mmap
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from qwen_jax.checkpoint.names import printable
from qwen_jax.errors import UserError
from qwen_jax.json_fields import read_json, shown

SAFETENSORS_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16,
                       "BF16": ml_dtypes.bfloat16}  # fmt: skip

# What quantised weights consist of besides.
QUANTISED_DTYPES = {"I32": np.int32, "I8": np.int8, "U8": np.uint8,
                    "F8_E4M3": ml_dtypes.float8_e4m3fn}  # fmt: skip


# A slice of step 1 for each of the first axes of a tensor; the axes after them are whole.
Index = tuple[slice, ...]

# Bytes that are read, cast or stored in one go, so that what that takes is small beside a tensor.
BLOCK = 1 << 23


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
      name: as its file has it.
      file: that holds it, None for a tensor in memory.
      shape: its axes.
      dtype: as stored.
      read: its values, or those at an `Index`; where possible a read-only view of the mapped file,
        so that they cost no memory of their own, and what is not asked for is not read.
      parts: the tensors that this one is a stack of; empty if it is none.
      quantised: whether `read` gives a `QuantizedWeight` of numpy arrays. The inputs of one are
        packed: an index ends before the last axis.
      in_blocks: whether reading it in `blocks` is no more work than reading all of it.
    """

    name: str
    file: Path | None
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[..., np.ndarray]
    parts: tuple["StoredTensor", ...] = ()
    quantised: bool = False
    in_blocks: bool = True

    def __getitem__(self, index: Index) -> "StoredTensor":
        """The tensor of the values at `index`, none of which is read yet."""
        index = bounds(index, self.shape)
        shape = tuple(part.stop - part.start for part in index)

        def read(inner: Index = ()) -> np.ndarray:
            both = zip(index, bounds(inner, shape), strict=True)
            found = tuple(slice(o.start + i.start, o.start + i.stop) for o, i in both)
            return self.read(found[:-1] if self.quantised else found)

        parts = tuple(part[index[1:]] for part in self.parts[index[0]]) if self.parts else ()
        return dataclasses.replace(self, shape=shape, read=read, parts=parts)

    def read_into(self, out: np.ndarray) -> None:
        """Casts the values into `out`; a stack's parts one after another."""
        for place, part in zip(out, self.parts, strict=True) if self.parts else ():
            part.read_into(place)
        if not self.parts:
            for block in blocks(self.shape, self.dtype) if self.in_blocks else [()]:
                with np.errstate(over="ignore", invalid="ignore"):
                    np.copyto(out[*block, ...], self.read(block), casting="unsafe")


def in_memory(values: np.ndarray, name: str = "") -> StoredTensor:
    """An array as a tensor of no file."""
    return StoredTensor(name, None, values.shape, values.dtype, lambda index=(): values[index])


def bounds(index: Index, shape: tuple[int, ...]) -> Index:
    """`index` with a slice for every axis of `shape`, and numbers for all ends."""
    parts = [*index, *(slice(None),) * (len(shape) - len(index))]
    return tuple(slice(*p.indices(size)[:2]) for p, size in zip(parts, shape, strict=True))


def block_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The shape of the parts of at most `BLOCK` bytes that a tensor is cut into, in its order.

    That is (1, ..., 1, n, ...): what follows the cut axis is whole.
    """
    room, cut = max(BLOCK // np.dtype(dtype).itemsize, 1), list(shape)
    for axis, size in enumerate(shape):
        within = math.prod(shape[axis + 1 :])
        cut[axis] = max(1, min(size, room // max(within, 1)))
        if within <= room:
            break
    return tuple(cut)


def blocks(shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Index]:
    """The indices of the `block_shape` parts of a tensor, in its order."""
    cut = block_shape(shape, dtype)
    starts = [range(0, size, step) for size, step in zip(shape, cut, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(
            slice(at, min(at + step, size))
            for at, step, size in zip(corner, cut, shape, strict=True)
        )


def open_checkpoint(directory: Path, quantised: bool = False) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint directory, by name, in file order.

    Safetensors are preferred to `.bin` where a directory has both, as transformers prefers them.

    Args:
      directory: holds the tensor files.
      quantised: whether the dtypes that quantised weights consist of are read too.

    Raises:
      UserError: no weights, a broken or truncated file, an index that contradicts its shards, a
        dtype that is not read.
    """
    for single, open_file in (("model.safetensors", open_safetensors),
                              ("pytorch_model.bin", _open_bin)):  # fmt: skip
        open_file = functools.partial(open_file, quantised=quantised)
        if (directory / single).is_file():
            return open_file(directory / single)
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _open_shards(index, open_file)
    raise UserError(
        f"{directory}: no weights; looked for model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin, pytorch_model.bin.index.json and Orbax's params; download it again"
    )


def _open_shards(
    index: Path, open_file: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise UserError(f"{index}: weight_map should map tensor names to files; download it again")
    tensors: dict[str, StoredTensor] = {}
    for file in dict.fromkeys(weight_map.values()):
        if file in ("", ".", "..") or "/" in file or "\\" in file:
            raise UserError(
                f"{index}: shard {shown(file)} is not a file name in this directory; "
                "download the index again"
            )
        path = index.parent / file
        if not path.is_file():
            raise UserError(
                f"{index}: names shard {printable(file)}, which is missing; download it again"
            )
        for name, tensor in open_file(path).items():
            if name in tensors:
                raise UserError(
                    f"{path}: tensor {printable(name)} is also in {tensors[name].file.name}; "
                    "keep one"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(
                f"{index}: tensor {printable(name)} is not in {file}, where the index has it; "
                "download both again"
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise UserError(
                f"{tensor.file}: tensor {printable(name)} is not in {index.name}; "
                "download both again"
            )
    return tensors


def open_safetensors(path: Path, quantised: bool = False) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name, as `open_checkpoint` gives those of several."""
    known = SAFETENSORS_DTYPES | (QUANTISED_DTYPES if quantised else {})
    try:
        # Checks header, offsets and length, so that what follows may trust them.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
            content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: broken or truncated safetensors file ({error}); download it again"
        ) from None
    content = content[8 + header_size :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in known:
            raise _unread_dtype(
                path, name, entry["dtype"], SAFETENSORS_DTYPES, entry["dtype"] in QUANTISED_DTYPES
            )
        tensors[name] = _mapped_tensor(path, content, name, entry, known[entry["dtype"]])
    # The header need not be in the order of the data.
    return dict(sorted(tensors.items(), key=lambda item: header[item[0]]["data_offsets"]))


def _unread_dtype(
    path: Path, name: str, dtype: Any, floats: Iterable[Any], of_quantised: bool
) -> UserError:
    """The error for a dtype that is not read; `of_quantised` if it would be of a quantised one."""
    stored = f"{path}: tensor {printable(name)} is stored as {dtype}"
    if of_quantised:
        return UserError(
            f"{stored}, as quantised weights are, while config.json has no quantization_config; "
            "put theirs there (for GPTQ it may be in quantize_config.json, and needs "
            'quant_method = "gptq" besides)'
        )
    return UserError(
        f"{stored}, which is not read; save it as one of {', '.join(map(str, floats))}"
    )


def _mapped_tensor(
    path: Path, content: np.ndarray, name: str, entry: dict[str, Any], dtype: type
) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), np.dtype(dtype)

    def read(index: Index = ()) -> np.ndarray:
        return content[begin:end].view(dtype).reshape(shape)[index]

    return StoredTensor(name, path, shape, dtype, read)


def _open_bin(path: Path, quantised: bool) -> dict[str, StoredTensor]:
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
    except Exception as error:  # A broken pickle can raise anything; none of its code has run.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: broken, truncated or in the format before PyTorch 1.6 ({reason}); "
            "save it again with torch.save"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: should hold a dict of tensors, holds a {type(content).__name__}; "
            "save the model's state_dict"
        )
    return {name: _torch_tensor(path, name, value, quantised) for name, value in content.items()}


def _torch_tensor(path: Path, name: Any, value: Any, quantised: bool) -> StoredTensor:
    import torch

    dtypes = {
        torch.float64: np.float64,
        torch.float32: np.float32,
        torch.float16: np.float16,
        torch.bfloat16: ml_dtypes.bfloat16,
    }
    floats = tuple(dtypes)
    of_quantised = {
        torch.int32: np.int32,
        torch.int8: np.int8,
        torch.uint8: np.uint8,
        torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    }
    if quantised:
        dtypes |= of_quantised
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise UserError(
            f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor; "
            "save the model's state_dict"
        )
    if value.dtype not in dtypes:
        raise _unread_dtype(path, name, value.dtype, floats, value.dtype in of_quantised)

    def read(index: Index = ()) -> np.ndarray:
        plain = value.detach()[index].contiguous()
        # numpy has no bfloat16 and no float8 of its own, so their bits travel as integers.
        if plain.dtype is torch.bfloat16:
            return plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if plain.dtype is torch.float8_e4m3fn:
            return plain.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        return plain.numpy()

    return StoredTensor(name, path, tuple(value.shape), np.dtype(dtypes[value.dtype]), read)
