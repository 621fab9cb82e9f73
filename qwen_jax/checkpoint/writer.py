"""Tensors -> a Hugging Face checkpoint directory that transformers loads as its own."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import tqdm

from qwen_jax.checkpoint import names
from qwen_jax.checkpoint.reader import StoredTensor
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_config import write_hf_config

# transformers' own limit, in bytes.
MAX_SHARD_SIZE = 5 * 10**9

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory that appears as `target` when the block ends well, and not before.

    Until then it stands beside `target` under a name that says it is incomplete; a failure removes
    it, a kill leaves it under that name.

    Raises:
      UserError: `target` exists and is not an empty directory, or cannot be written.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists already; remove it or give another target")
    partial = target.parent / f".{target.name}.incomplete-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_pretrained(target: str | Path, config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Writes `params` and the config.json of `config` as a new Hugging Face directory.

    Raises:
      UserError: `target` exists, or cannot be written.
    """
    with new_directory(Path(target)) as directory:
        write_json(directory / "config.json", write_hf_config(config))
        write_tensors(directory, tensors_of(config, params))


def tensors_of(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The checkpoint tensors that a parameter tree holds, by name."""

    def tensor(leaf: jax.Array) -> StoredTensor:
        return StoredTensor(None, leaf.shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf))

    return {
        name: tensor(names.leaf_at(params, path))
        for name, path in names.tensor_names(config).items()
    }


def write_tensors(
    directory: Path, tensors: Mapping[str, StoredTensor], max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes with their index.

    A shard is in memory while it is written.
    """
    shards: list[list[str]] = [[]]
    sizes = {name: _size(tensor) for name, tensor in tensors.items()}
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    with tqdm.tqdm(desc="writing", total=len(tensors), unit="tensor", disable=None) as bar:
        for i, shard in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            content = {name: np.ascontiguousarray(tensors[name].read()) for name in shard}
            # transformers refuses a file without this note of its layout.
            safetensors.numpy.save_file(content, directory / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, file))
            bar.update(len(shard))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def write_json(path: Path, content: Any) -> None:
    """Writes indented UTF-8 JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copies what a checkpoint directory holds besides weights, config.json and code.

    That is its tokenizer, chat template, generation defaults, licence and card.
    """
    for path in sorted(source.iterdir()):
        if path.is_dir():
            if path.name == "additional_chat_templates":
                shutil.copytree(path, target / path.name)
        elif not (
            path.name == "config.json"
            or path.name.endswith((*_WEIGHT_SUFFIXES, ".index.json", ".py"))
            or path.name.startswith(".")
        ):
            shutil.copyfile(path, target / path.name)


def _size(tensor: StoredTensor) -> int:
    return int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
