"""A checkpoint directory in one format -> one in another, with what else belongs to the model."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen_jax.checkpoint import names, orbax_format
from qwen_jax.checkpoint.adapter_merge import merge_into
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.checkpoint.loading import open_model
from qwen_jax.checkpoint.nonfinite import all_finite, report_nonfinite
from qwen_jax.checkpoint.peft_reader import load_adapter
from qwen_jax.checkpoint.quantised import (
    FIELD,
    load_quantization,
    own_config,
    own_pieces,
)
from qwen_jax.checkpoint.reader import Index, StoredTensor, blocks
from qwen_jax.checkpoint.regions import stack, to_stored
from qwen_jax.checkpoint.writer import (
    MAX_SHARD_SIZE,
    check_vacant,
    copy_companions,
    new_directory,
    num_bytes,
    write_json,
    write_tensors,
)
from qwen_jax.config import HeadKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_config import DTYPES, head_fields, load_config, write_hf_config
from qwen_jax.json_fields import read_json_object

Format = Literal["hf", "orbax"]

# What weights can be rounded to -> its bits.
QUANTIZATIONS = {"int8": 8, "int4": 4}


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` wrote.

    Attributes:
      num_tensors: how many.
      num_bytes: that they take.
      num_left_out: tensors of the source's other towers, which are not text.
      num_bytes_dense: that they would take if none were quantised.
      dequantised: whether the source was quantised; what the target is then was dequantised first.
    """

    num_tensors: int
    num_bytes: int
    num_left_out: int
    num_bytes_dense: int
    dequantised: bool


def convert(
    source: str | Path,
    target: str | Path,
    target_format: Format,
    dtype: str | None = None,
    quantize: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    adapter: str | Path | None = None,
) -> Converted:
    """Writes the checkpoint `source` as the new directory `target`.

    Memory goes by the largest tensor and not by the model: one is read and written at a time, in
    orbax format a block of one. Where a tensor can be read whole only, as Orbax itself and the
    formats of quantised weights may have it, it is held as it is stored besides.

    Tensors keep their bits; config.json is copied, but for what it says of tensors that change, and
    so are the files that `writer.copy_companions` names. A quantised source is dequantised, to the
    dtype that its config.json declares unless one is given, and what describes its quantisation is
    left out. The target appears when it is complete, and not before.

    Args:
      source: a directory in Hugging Face or Orbax format, or a hub id.
      target: a directory that does not exist yet.
      target_format: "hf" for safetensors as transformers writes them, "orbax".
      dtype: that tensors are cast to and config.json then declares, but for those that
        `names.stays_float32`; None keeps each as it is.
      quantize: int8 or int4, for the linear layers and experts, with `target_format` hf;
        embeddings, heads, routers and what else is small stay as they are. None for none.
      max_shard_size: of a safetensors file, in bytes.
      adapter: the directory of one in PEFT's format, that is added to the weights in float32, each
        rounded once; None for none. It is held in memory.

    Raises:
      UserError: whatever is wrong with the source, the adapter or the target.
    """
    target = Path(target).expanduser()
    check_vacant(target)
    directory = resolve_source(source)
    config = load_config(directory)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype = {dtype} is not supported; known: {', '.join(DTYPES)}")
    if quantize is not None and (quantize not in QUANTIZATIONS or target_format != "hf"):
        raise UserError(
            f"quantize = {quantize} is not supported in {target_format} format; "
            f"known: {', '.join(QUANTIZATIONS)}, in hf format"
        )
    was_quantised = load_quantization(directory) is not None
    model = open_model(config, directory)
    tensors = model.tensors
    if was_quantised and dtype is None:
        dtype = config.dtype
    if adapter is not None:
        update = load_adapter(adapter, model.config)
        tensors = merge_into(tensors, update, None if dtype is None else np.dtype(dtype))
    bad: set[str] = set()
    if dtype is not None:
        kinds = {path: "float32" if names.stays_float32(path) else dtype for path in tensors}
        tensors = {path: _cast(directory, tensors[path], to, bad) for path, to in kinds.items()}
    dense = sum(map(num_bytes, tensors.values()))
    with new_directory(target) as partial:
        _write_config(directory, partial, model.config, dtype, quantize)
        copy_companions(directory, partial)
        if target_format == "orbax":
            orbax_format.write_orbax(partial, tensors)
        else:
            # Under the names that transformers gives, whatever the source calls them.
            regions = names.regions(model.config)
            tensors = to_stored(regions, tensors)
            if quantize is not None:
                others = {region.name for region in regions if not names.is_projection(region.path)}
                tensors = _quantise(tensors, others, QUANTIZATIONS[quantize])
            write_tensors(partial, tensors, max_shard_size)
    if bad:
        report_nonfinite(directory, list(bad), np.dtype(dtype), allowed=True)
    return Converted(
        num_tensors=len(tensors),
        num_bytes=sum(map(num_bytes, tensors.values())),
        num_left_out=len(model.left_out),
        num_bytes_dense=dense,
        dequantised=was_quantised,
    )


def _quantise(
    tensors: dict[str, StoredTensor], others: set[str], bits: int
) -> dict[str, StoredTensor]:
    """`tensors` with those but the `others` in pieces."""
    pieces = {}
    for name, tensor in tensors.items():
        # Two codes share a byte.
        plain = name in others or (bits == 4 and tensor.shape[-1] % 2)
        pieces |= {name: tensor} if plain else own_pieces(name, tensor, bits)
    return pieces


def _cast(directory: Path, tensor: StoredTensor, dtype: str, bad: set[str]) -> StoredTensor:
    """`tensor` as `dtype`; read, it adds its name to `bad` where its values were not finite."""
    to = np.dtype(dtype)
    if tensor.parts:
        return stack([_cast(directory, part, dtype, bad) for part in tensor.parts])

    def cast(values: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            found = values.astype(to, copy=False)
        if not all_finite(found):
            if all_finite(values):
                raise UserError(
                    f"{directory}: tensor {tensor.name} overflows as {dtype}; give a wider dtype"
                )
            bad.add(tensor.name)
        return found

    def read(index: Index = ()) -> np.ndarray:
        part = tensor[index]
        if tensor.dtype == to or not tensor.in_blocks:
            return cast(part.read())
        out = np.empty(part.shape, to)
        for block in blocks(part.shape, part.dtype):
            out[block] = cast(part.read(block))
        return out

    return dataclasses.replace(tensor, dtype=to, read=read)


def _write_config(
    source: Path, target: Path, config: ModelConfig, dtype: str | None, quantize: str | None
) -> None:
    """config.json as it is, apart from what is written of the tensors and of the model."""
    raw = read_json_object(source / "config.json")
    changes: dict[str, Any] = {}
    is_tower = raw["model_type"] != config.family
    if is_tower:
        names_of_labels = {n: raw[n] for n in ("id2label", "label2id") if n in raw}
        raw = write_hf_config(config) | (names_of_labels if config.num_labels else {})
    elif config.head is HeadKind.NONE:
        changes |= head_fields(config)
    if dtype is not None:
        spellings = [name for name in ("dtype", "torch_dtype") if name in raw] or ["torch_dtype"]
        changes |= dict.fromkeys(spellings, dtype)
    # Of a quantised source, which always comes with a dtype to write.
    raw.pop(FIELD, None)
    if quantize is not None:
        changes[FIELD] = own_config(QUANTIZATIONS[quantize])
    if changes or is_tower:
        write_json(target / "config.json", {**raw, **changes})
    else:
        shutil.copyfile(source / "config.json", target / "config.json")
