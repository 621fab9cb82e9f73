"""Tensors -> a Hugging Face checkpoint directory that transformers loads as its own."""

import contextlib
import dataclasses
import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from qwen_jax.checkpoint import names
from qwen_jax.checkpoint.reader import QUANTISED_DTYPES, SAFETENSORS_DTYPES, Index, StoredTensor
from qwen_jax.checkpoint.regions import to_stored
from qwen_jax.checkpoint.tree_check import check_tree
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_config import write_hf_config

# transformers' own limit, in bytes.
MAX_SHARD_SIZE = 5 * 10**9

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")

# What writers of GPTQ and AWQ say of their weights, besides what config.json says.
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")

# The second is what modules.json, of sentence-transformers, refers to.
_COMPANION_FOLDERS = ("additional_chat_templates", "1_Pooling")

_DTYPE_CODES = {
    np.dtype(dtype): code for code, dtype in (SAFETENSORS_DTYPES | QUANTISED_DTYPES).items()
}


def check_vacant(target: Path) -> None:
    """Refuses a target that exists, but for an empty directory.

    Raises:
      UserError: it exists, or cannot be looked at.
    """
    try:
        empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
        taken = target.is_symlink() or (target.exists() and not empty)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    if taken:
        raise UserError(f"{target}: exists already; remove it or give another target")


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory that appears as `target` when the block ends well, and not before.

    Until then it stands beside `target` under a name that says it is incomplete; a failure removes
    it, a kill leaves it under that name.

    Raises:
      UserError: `target` exists and is not an empty directory, or cannot be written.
    """
    check_vacant(target)
    target = target.absolute()
    partial = target.parent / f".{target.name}.incomplete-{secrets.token_hex(4)}"
    made: list[Path] = []
    try:
        made = [folder for folder in target.parents if not folder.exists()]
        partial.mkdir(parents=True)
        yield partial
        partial.replace(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise UserError(
                f"{target}: cannot be written ({reason}); give another target, or make room"
            ) from error
        raise


def save_pretrained(
    target: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Writes `params` and the config.json of `config` as a new Hugging Face directory.

    The dtype in config.json is that of `params`, the widest one where they have several, those
    aside that `names.stays_float32`. They may be sharded: a tensor is gathered at a time. Of
    several processes all call this, the first writes, and all return when it has; each then holds
    a whole tensor on each of its devices.

    Raises:
      UserError: `target` exists, or cannot be written; `params` are not those of `config`.
    """
    target = Path(target).expanduser()
    is_first = jax.process_index() == 0
    if is_first:
        check_vacant(target)
    check_tree(config, params, "params")
    tensors = tensors_of(config, params)
    paths = {region.path for region in names.regions(config)}
    dtypes = {names.leaf_at(params, p).dtype for p in paths if not names.stays_float32(p)}
    config = dataclasses.replace(config, dtype=jnp.result_type(*dtypes).name)
    content = write_hf_config(config)
    if is_first:
        with new_directory(target) as directory:
            write_json(directory / "config.json", content)
            write_tensors(directory, tensors, max_shard_size)
    else:
        # Takes part in gathering them, in the order of the one that writes.
        for names_of_file in _files(tensors, max_shard_size).values():
            for name in names_of_file:
                tensors[name].read()
    multihost_utils.sync_global_devices(f"saved {target}")


def tensors_of(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The checkpoint tensors that a parameter tree holds, by name."""

    def tensor(path: names.Path) -> StoredTensor:
        leaf = names.leaf_at(params, path)

        def read(index: Index = ()) -> np.ndarray:
            return gathered(leaf)[index]

        return StoredTensor("/".join(path), None, leaf.shape, np.dtype(leaf.dtype), read)

    regions = names.regions(config)
    return to_stored(regions, {region.path: tensor(region.path) for region in regions})


def gathered(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """All values, on this host; of several processes all call this."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    out = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            # JAX keeps an array's values once they are on the host: those of a copy go with it.
            out[shard.index] = np.asarray(jax.device_put(shard.data, may_alias=False))
    return out


def write_tensors(
    directory: Path, tensors: Mapping[str, StoredTensor], max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes with their index.

    One tensor is in memory at a time.
    """
    files = _files(tensors, max_shard_size)
    with tqdm.tqdm(desc="writing", total=len(tensors), unit="tensor", disable=None) as bar:
        for file, order in files.items():
            part = {name: tensors[name] for name in order}
            write_safetensors(directory / file, part, on_tensor=bar.update)
    if len(files) > 1:
        total = sum(map(num_bytes, tensors.values()))
        weight_map = {name: file for file, order in files.items() for name in order}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _files(tensors: Mapping[str, StoredTensor], max_shard_size: int) -> dict[str, list[str]]:
    """The names of the tensors of each file, in the order of both."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + num_bytes(tensor) > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes(tensor)
    for shard in shards:
        # Wider values first, so that each tensor starts at a multiple of its item size.
        shard.sort(key=lambda name: -tensors[name].dtype.itemsize)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    total = len(shards)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    on_tensor: Callable[[], Any] = lambda: None,
) -> None:
    """The file format of safetensors, a tensor at a time; its library wants all of them at once.

    `on_tensor` is called after each. Give wider values first, so that all are aligned.
    """
    # Older transformers refuse a file without this note of its layout.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + num_bytes(tensor)
        header[name] = {
            "dtype": _DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            values = np.ascontiguousarray(tensor.read())
            file.write(memoryview(values.reshape(-1).view(np.uint8)))
            on_tensor()


def num_bytes(tensor: StoredTensor) -> int:
    """What the values of `tensor` take, on disk and in memory."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def write_json(path: Path, content: Any) -> None:
    """Writes indented UTF-8 JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copies the files of a checkpoint directory besides weights, what describes them, and code.

    That is its tokenizer, chat templates, generation defaults, pooling, licence and card, but not
    config.json, indices of shards or descriptions of quantised weights. Of folders, those with
    chat templates and with the pooling of an embedder are copied.
    """
    left_out = shutil.ignore_patterns("*.py", *(f"*{suffix}" for suffix in _WEIGHT_SUFFIXES))
    for path in sorted(source.iterdir()):
        if path.is_dir():
            if path.name in _COMPANION_FOLDERS:
                shutil.copytree(path, target / path.name, ignore=left_out)
        elif path.is_file() and not (
            path.name in ("config.json", *_QUANTIZATION_FILES)
            or path.name.endswith((*_WEIGHT_SUFFIXES, ".index.json", ".py"))
            or path.name.startswith(".")
        ):
            shutil.copyfile(path, target / path.name)
