"""Quantised checkpoints: the pieces that a format stores -> one weight for each linear layer.

Read are GPTQ, AWQ ("gemm") and FP8 in blocks as published, and a format of our own, which
`own_pieces` writes. What each stores for a weight W [out, in]:

    gptq      X.qweight int32 [in * bits / 32, out]: the inputs of a word from its low bits up;
              X.scales [groups, out]; X.qzeros int32 [groups, out * bits / 32], minus one unless
              checkpoint_format, or format, is gptq_v2; X.g_idx int32 [in], the group of each input
    awq       X.qweight int32 [in, out / 8]; X.scales [groups, out]; X.qzeros int32
              [groups, out / 8]; the outputs of a word from its low bits up are 0 2 4 6 1 3 5 7
    fp8       W float8_e4m3fn; W_scale_inv [blocks of out, blocks of in], a factor despite its name
    qwen_jax  W_packed int8 [out, in], or uint8 [out, in / 2] with two inputs a byte, low half
              first; W_scales [out, groups]; with 4 bits W_zeros uint8 [out, groups]

In each, W = scale * (code - zero).
"""

import dataclasses
import functools
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwen_jax.checkpoint.names import printable
from qwen_jax.checkpoint.reader import SAFETENSORS_DTYPES, Index, StoredTensor, bounds
from qwen_jax.errors import UserError
from qwen_jax.json_fields import Fields, disagreement, read_json_object, shown
from qwen_jax.nn.quantized import QuantizedWeight, dequantize, pack_nibbles, quantize

FIELD = "quantization_config"

# What made the numbers, or which kernel is to multiply them: neither changes what they mean. Which
# modules are quantised is seen from the tensors.
_INERT = frozenset(
    """
    act_group_aware backend batch_size block_name_to_quantize cache_block_outputs
    damp_auto_increment damp_percent dataset disable_exllama do_fuse exllama_config
    fuse_max_seq_len hyb_act ignored_layers max_input_length meta model_file_base_name
    model_name_or_path model_seqlen module_name_preceding_first_block modules_in_block_to_quantize
    modules_to_convert modules_to_fuse modules_to_not_convert mse pack_impl pad_token_id quantizer
    static_groups sym tokenizer true_sequential use_cuda_fp16 use_exllama
""".split()
)

# Fields with one value that is read; any other changes what the numbers mean.
_ONLY = {
    "gptq": {"pack_dtype": "int32", "is_marlin_format": False, "lm_head": False, "bits": (4, 8),
             "checkpoint_format": ("gptq", "gptq_v2"), "format": ("gptq", "gptq_v2"),
             "method": "gptq"},
    # Its layout has no order of inputs but their own, so that desc_act says nothing.
    "awq": {"version": "gemm", "checkpoint_format": "gemm", "format": "gemm", "method": "awq",
            "zero_point": True, "bits": 4, "pack_dtype": "int32", "lm_head": False,
            "desc_act": (False, True)},
    "fp8": {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "float",
            "dequantize": False, "weight_per_tensor": False, "act_per_tensor": False,
            "expert_dtype": "fp8"},
    "qwen_jax": {"bits": (4, 8)},
}  # fmt: skip

_FLOATS = frozenset(np.dtype(dtype) for dtype in SAFETENSORS_DTYPES.values())

# Rows that are dequantised in one go, so that numpy's temporaries stay small beside the weight.
_ROWS = 256

# Takes the eight outputs of an AWQ word, low bits first, into their order.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclasses.dataclass(frozen=True)
class QuantizationSpec:
    """How the weights of a checkpoint are stored.

    Attributes:
      method: gptq, awq, fp8 or qwen_jax.
      bits: of a value.
      group_size: inputs that share a scale; -1 for all of a row.
      block_rows: outputs that share a scale.
      zero_offset: what is added to stored zeros.
      desc_act: whether groups are made of inputs in another order than they stand in.
    """

    method: str
    bits: int
    group_size: int
    block_rows: int = 1
    zero_offset: int = 0
    desc_act: bool = False

    @property
    def grouping(self) -> str:
        """The fields of config.json that the shapes of the pieces go by, for messages."""
        if self.method == "fp8":
            return f"weight_block_size = {[self.block_rows, self.group_size]}"
        return f"bits = {self.bits} and group_size = {self.group_size}"


def load_quantization(directory: Path) -> QuantizationSpec | None:
    """What `directory/config.json` says of quantised weights; None if they are plain.

    Raises:
      UserError: as `read_quantization`, or the file is absent or broken.
    """
    path = Path(directory) / "config.json"
    raw = read_json_object(path)
    towers = (raw, raw.get("text_config"))
    found = [tower[FIELD] for tower in towers if isinstance(tower, dict) and tower.get(FIELD)]
    if not found:
        return None
    if not isinstance(found[0], dict):
        raise UserError(f"{path}: {FIELD} = {shown(found[0])} should be an object")
    return read_quantization(found[0], f"{path}: {FIELD}")


def read_quantization(raw: dict[str, Any], source: str = FIELD) -> QuantizationSpec:
    """Reads a `quantization_config`; `source` names it in errors.

    Raises:
      UserError: a method, or a variant of one, that is not read; a missing or unknown field.
    """
    fields = Fields(raw, source)
    known = f"read are {', '.join(_ONLY)}"
    for name in ("load_in_4bit", "load_in_8bit"):
        if raw.get(name) and raw.get("quant_method") is None:
            raise fields.refuse(name, raw[name], f"it is of bitsandbytes; {known}")
    method = fields.require("quant_method", "string")
    if method not in _ONLY:
        raise fields.refuse("quant_method", method, known)
    for name, only in _ONLY[method].items():
        value = fields.values.get(name)
        allowed = only if isinstance(only, tuple) else (only,)
        # AutoAWQ writes it in capitals, transformers in small letters.
        read = value.lower() if name == "version" and isinstance(value, str) else value
        # `in` takes 1 for True.
        if read is not None and not any(read == x and type(read) is type(x) for x in allowed):
            listed = " and ".join(map(shown, allowed))
            verb = "is" if len(allowed) == 1 else "are"
            raise fields.refuse(name, value, f"only {listed} {verb} read")
    bits = 8 if method == "fp8" else fields.require("bits", "integer")
    block_rows, zero_offset, desc_act = 1, 0, False
    if method == "fp8":
        block = fields.values.pop("weight_block_size", None)
        if not (
            isinstance(block, list) and [type(n) for n in block] == [int, int] and min(block) >= 1
        ):
            why = "only scales of blocks, [rows, columns], are read"
            raise fields.refuse("weight_block_size", block, why)
        block_rows, group_size = block
    else:
        group_size = fields.require("group_size", "integer")
    whole_rows = method == "gptq" and group_size == -1
    if group_size < 1 and not whole_rows:
        raise fields.refuse("group_size", group_size, "a group has at least 1 input")
    if method == "gptq":
        desc_act = fields.take("desc_act", "boolean", False)
        _check_dynamic(fields)
        zero_offset = 0 if _gptq_format(fields) == "gptq_v2" else 1
    for name, value in fields.values.items():
        if not (name in _INERT or name in _ONLY[method] or value in (None, [], {}, "")):
            why = "it may change the weights; remove the field if you know that it does not"
            raise fields.refuse(name, value, why)
    return QuantizationSpec(method, bits, group_size, block_rows, zero_offset, desc_act)


def _gptq_format(fields: Fields) -> str | None:
    """What later writers call format, beside the name that it had first or in place of it."""
    named = {name: fields.values.get(name) for name in ("checkpoint_format", "format")}
    named = {name: value for name, value in named.items() if value is not None}
    if len(set(named.values())) > 1:
        raise UserError(f"{fields.source}: {disagreement(named)}")
    return next(iter(named.values()), None)


def _check_dynamic(fields: Fields) -> None:
    """Takes the rules that GPTQ has for modules by their names, which may only leave modules out.

    A key is a pattern after `-:`, or after `+:` or nothing; those after `-:` are not quantised, the
    others with the fields of the value in place of the common ones.
    """
    for pattern, value in fields.take("dynamic", "object", {}).items():
        if not (pattern.startswith("-:") or value in (None, {})):
            why = "modules quantised in another way than the rest are not read"
            raise fields.refuse(f"dynamic: {printable(pattern)}", value, why)


def logical_tensors(
    stored: Mapping[str, StoredTensor], spec: QuantizationSpec, source: str = FIELD
) -> dict[str, StoredTensor]:
    """The tensors that the pieces stand for, under the names that they would have unquantised.

    Those of quantised weights have the weight's own shape, and `read` gives a `QuantizedWeight` of
    numpy arrays.

    Args:
      stored: by name, in file order.
      spec: how weights are stored.
      source: of `spec`, named in errors.

    Raises:
      UserError: a missing, misshapen or surplus piece, by name; no quantised weight at all. What
        their values have wrong is found when they are read.
    """
    first, others, parse = _FORMATS[spec.method]
    pieces_of = {
        _weight_name(name, first): {first: name}
        | {piece: _sibling(name, first, piece) for piece in others}
        for name in stored
        if name.endswith(first)
    }
    if not pieces_of:
        raise UserError(
            f"{source} says {spec.method}, yet no tensor is named *{first}; remove it if the "
            "weights are not quantised"
        )
    pieces = {piece for names in pieces_of.values() for piece in names.values()}
    logical = {}
    for name, tensor in stored.items():
        if name.endswith(first):
            weight = _weight_name(name, first)
            if weight in stored and weight not in pieces:
                raise UserError(
                    f"{tensor.file}: holds both {printable(weight)} and {printable(name)}; keep one"
                )
            found = {piece: stored.get(at) for piece, at in pieces_of[weight].items()}
            shape, read = parse(_Pieces(tensor, found, spec), spec)
            logical[weight] = StoredTensor(
                weight,
                tensor.file,
                shape,
                np.dtype(np.float32),
                read,
                quantised=True,
                # Pieces that all rows share would be unpacked again for each block of them.
                in_blocks=False,
            )
        elif name in pieces:
            continue
        elif tensor.dtype not in _FLOATS:
            raise UserError(
                f"{tensor.file}: tensor {printable(name)} is stored as {tensor.dtype.name} and "
                f"there is no *{first} that it would belong to; download the checkpoint again"
            )
        else:
            logical[name] = tensor
    return logical


def _weight_name(name: str, first: str) -> str:
    """`X.weight` for `X.qweight`; `W` for `W_scale_inv` and `W_packed`."""
    return name.removesuffix(first) + (".weight" if first.startswith(".") else "")


def _sibling(name: str, first: str, piece: str) -> str:
    return name.removesuffix(first) + piece


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """The stored pieces of one weight by suffix, checked as they are taken."""

    first: StoredTensor
    found: Mapping[str, StoredTensor | None]
    spec: QuantizationSpec

    def take(self, suffix: str, dtypes: Container[np.dtype]) -> StoredTensor:
        """The piece, which must have one of `dtypes`."""
        tensor = self.found[suffix]
        if tensor is None:
            raise UserError(
                f"{self.first.file}: tensor {printable(self.first.name)} has no "
                f"{suffix or 'weight'} beside it; a file is incomplete"
            )
        if tensor.dtype not in dtypes:
            raise self.wrong(suffix, f"is stored as {tensor.dtype.name}, which its format has not")
        return tensor

    def take_beside(
        self, values: StoredTensor, suffix: str, dtypes: Container[np.dtype], shape: tuple[int, ...]
    ) -> StoredTensor:
        """The piece, which must have one of `dtypes` and the shape that `values` make it."""
        tensor = self.take(suffix, dtypes)
        if tensor.shape != shape:
            raise self.wrong(
                suffix,
                f"has shape {list(tensor.shape)}, where {list(shape)} is needed for "
                f"{printable(values.name)} {list(values.shape)} with {self.spec.grouping}; "
                "config.json and the weights disagree, or a file is broken",
            )
        return tensor

    def take_matrix(self, suffix: str, dtypes: Container[np.dtype], stacked: bool) -> StoredTensor:
        """The piece, a matrix of one of `dtypes`, or where allowed a stack of them."""
        tensor = self.take(suffix, dtypes)
        if len(tensor.shape) < 2 or (len(tensor.shape) > 2 and not stacked):
            raise self.wrong(suffix, f"has shape {list(tensor.shape)}, which is no matrix")
        return tensor

    def wrong(self, suffix: str, what: str) -> UserError:
        """The error for a piece that is not what its format makes it."""
        tensor = self.found[suffix]
        return UserError(f"{tensor.file}: tensor {printable(tensor.name)} {what}")


# The weight's shape, and what reads it, or what is at an index of its axes [..., out].
_Parsed = tuple[tuple[int, ...], Callable[..., QuantizedWeight]]


def drop_zero_biases(
    tensors: Mapping[str, StoredTensor], wanted: Container[str]
) -> dict[str, StoredTensor]:
    """`tensors` without the biases that writers of GPTQ give to layers that have none.

    Args:
      tensors: as `logical_tensors` makes them.
      wanted: the names that the model has.

    Raises:
      UserError: such a bias is not zero.
    """
    kept = {}
    for name, tensor in tensors.items():
        weight = tensors.get(f"{name.removesuffix('.bias')}.weight")
        if name in wanted or not (name.endswith(".bias") and weight and weight.quantised):
            kept[name] = tensor
        elif np.any(tensor.read()):
            raise UserError(
                f"{tensor.file}: tensor {printable(name)} is a bias of a layer that has none in "
                "this model, and it is not zero; config.json and the weights disagree"
            )
    return kept


def dequantised(tensor: StoredTensor) -> StoredTensor:
    """The tensor that reads as a float32 array where `tensor` reads as a `QuantizedWeight`.

    Of the rows that are asked for, all inputs are held packed while they are dequantised.
    """
    if not tensor.quantised:
        return tensor

    def read(index: Index = ()) -> np.ndarray:
        *rows, inputs = bounds(index, tensor.shape)
        weight = tensor.read(tuple(rows))
        out = np.empty((*weight.shape[:-1], inputs.stop - inputs.start), np.float32)
        for start in range(0, weight.shape[-2], _ROWS):
            some = (*(slice(None),) * (weight.ndim - 2), slice(start, start + _ROWS))
            out[some] = dequantize(weight[some], np.float32)[..., inputs]
        return out

    parts = tuple(map(dequantised, tensor.parts))
    return dataclasses.replace(tensor, read=read, parts=parts, quantised=False)


_INT32 = (np.dtype(np.int32),)
_UINT8 = (np.dtype(np.uint8),)
_INT8 = (np.dtype(np.int8),)
_FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn),)


def _parse_gptq(pieces: _Pieces, spec: QuantizationSpec) -> _Parsed:
    per_word = 32 // spec.bits
    qweight = pieces.take_matrix(".qweight", _INT32, stacked=False)
    n_in, n_out = qweight.shape[0] * per_word, qweight.shape[1]
    group_size = n_in if spec.group_size == -1 else spec.group_size
    n_groups = -(-n_in // group_size)
    if n_out % per_word:
        raise pieces.wrong(".qweight", f"has {n_out} columns, not a multiple of {per_word}")
    scales = pieces.take_beside(qweight, ".scales", _FLOATS, (n_groups, n_out))
    qzeros = pieces.take_beside(qweight, ".qzeros", _INT32, (n_groups, n_out // per_word))
    g_idx = None
    if spec.desc_act or pieces.found[".g_idx"] is not None:
        g_idx = pieces.take_beside(qweight, ".g_idx", _INT32, (n_in,))

    def read(index: Index = ()) -> QuantizedWeight:
        rows = (slice(None), *index)
        zeros = _unpack(qzeros.read(), spec.bits)[rows] + np.uint8(spec.zero_offset)
        return QuantizedWeight(
            # A transposed word's bytes are the inputs in order, two or one a byte.
            values=np.ascontiguousarray(qweight.read(rows).T).view(np.uint8),
            scales=np.ascontiguousarray(scales.read(rows).T),
            zeros=np.ascontiguousarray(zeros.T) & np.uint8((1 << spec.bits) - 1),
            group_of=_read_groups(pieces, spec, g_idx, group_size, n_groups),
            bits=spec.bits,
            group_size=group_size,
        )

    return (n_out, n_in), read


def _read_groups(
    pieces: _Pieces,
    spec: QuantizationSpec,
    g_idx: StoredTensor | None,
    group_size: int,
    n_groups: int,
) -> np.ndarray | None:
    if g_idx is None:
        return None
    groups = g_idx.read()
    if groups.min() < 0 or groups.max() >= n_groups:
        raise pieces.wrong(".g_idx", f"names groups from {groups.min()} to {groups.max()}, "
                           f"where there are {n_groups}")  # fmt: skip
    if spec.desc_act:
        return groups
    if not np.array_equal(groups, np.arange(groups.size) // group_size):
        raise pieces.wrong(".g_idx", f"has inputs out of order, while {FIELD} has no desc_act")
    return None


def _parse_awq(pieces: _Pieces, spec: QuantizationSpec) -> _Parsed:
    qweight = pieces.take_matrix(".qweight", _INT32, stacked=False)
    n_in, n_out = qweight.shape[0], qweight.shape[1] * 8
    n_groups = -(-n_in // spec.group_size)
    if n_in % 2:
        raise pieces.wrong(".qweight", f"has {n_in} rows, an odd number of inputs")
    scales = pieces.take_beside(qweight, ".scales", _FLOATS, (n_groups, n_out))
    qzeros = pieces.take_beside(qweight, ".qzeros", _INT32, (n_groups, n_out // 8))

    def unpack(words: StoredTensor, rows: slice) -> np.ndarray:
        first = rows.start // 8
        octets = _unpack(words.read((slice(None), slice(first, -(-rows.stop // 8)))), 4)
        codes = octets.reshape(len(octets), -1, 8)[..., _AWQ_ORDER].reshape(len(octets), -1)
        return np.ascontiguousarray(codes[:, rows.start - first * 8 : rows.stop - first * 8].T)

    def read(index: Index = ()) -> QuantizedWeight:
        (rows,) = bounds(index, (n_out,))
        return QuantizedWeight(
            values=pack_nibbles(unpack(qweight, rows)),
            scales=np.ascontiguousarray(scales.read((slice(None), rows)).T),
            zeros=unpack(qzeros, rows),
            group_of=None,
            bits=4,
            group_size=spec.group_size,
        )

    return (n_out, n_in), read


def _unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n, m] -> uint8 [n, m * 32 / bits], from the low bits of each word up."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(words), -1)


def _parse_fp8(pieces: _Pieces, spec: QuantizationSpec) -> _Parsed:
    weight = pieces.take_matrix("", _FLOAT8, stacked=True)
    *stack, n_out, n_in = weight.shape
    blocks = (-(-n_out // spec.block_rows), -(-n_in // spec.group_size))
    scales = pieces.take_beside(weight, "_scale_inv", _FLOATS, (*stack, *blocks))

    def read(index: Index = ()) -> QuantizedWeight:
        *some, rows = bounds(index, (*stack, n_out))
        per_row = np.repeat(scales.read(tuple(some)).astype(np.float32), spec.block_rows, axis=-2)
        return QuantizedWeight(
            values=weight.read((*some, rows)).view(np.uint8),
            scales=np.ascontiguousarray(per_row[..., rows, :]),
            zeros=None,
            group_of=None,
            bits=8,
            group_size=spec.group_size,
            float8=True,
        )

    return weight.shape, read


def _parse_own(pieces: _Pieces, spec: QuantizationSpec) -> _Parsed:
    integers = _INT8 if spec.bits == 8 else _UINT8
    packed = pieces.take_matrix("_packed", integers, stacked=True)
    *rows, stored = packed.shape
    n_in = stored * 8 // spec.bits
    per_group = (*rows, -(-n_in // spec.group_size))
    scales = pieces.take_beside(packed, "_scales", _FLOATS, per_group)
    zeros = pieces.take_beside(packed, "_zeros", _UINT8, per_group) if spec.bits == 4 else None

    def read(index: Index = ()) -> QuantizedWeight:
        return QuantizedWeight(
            values=packed.read(index),
            scales=scales.read(index),
            zeros=None if zeros is None else zeros.read(index),
            group_of=None,
            bits=spec.bits,
            group_size=spec.group_size,
        )

    return (*rows, n_in), read


# Method -> the suffix that tells a quantised weight, those of its other pieces, and their reader.
_FORMATS = {
    "gptq": (".qweight", (".scales", ".qzeros", ".g_idx"), _parse_gptq),
    "awq": (".qweight", (".scales", ".qzeros"), _parse_awq),
    "fp8": ("_scale_inv", ("",), _parse_fp8),
    "qwen_jax": ("_packed", ("_scales", "_zeros"), _parse_own),
}

# Inputs that share a scale in what we write.
_OWN_GROUP = 128


def own_config(bits: int) -> dict[str, Any]:
    """The `quantization_config` of our own format."""
    return {"quant_method": "qwen_jax", "bits": bits, "group_size": _OWN_GROUP}


def own_pieces(name: str, tensor: StoredTensor, bits: int) -> dict[str, StoredTensor]:
    """The pieces that our own format stores for the weight `name`, quantised as they are read.

    Raises:
      UserError: when read, if the weight has NaN or infinite values.
    """

    *rows, n_in = tensor.shape
    per_group = (*rows, -(-n_in // _OWN_GROUP))
    pieces = {
        "_packed": ((*rows, n_in * bits // 8), np.int8 if bits == 8 else np.uint8, "values"),
        "_scales": (per_group, np.float32, "scales"),
    }
    if bits == 4:
        pieces["_zeros"] = (per_group, np.uint8, "zeros")
    return {
        name + suffix: StoredTensor(
            name + suffix,
            tensor.file,
            shape,
            np.dtype(dtype),
            lambda index=(), field=field: getattr(_quantized(tensor, bits), field)[index],
        )
        for suffix, (shape, dtype, field) in pieces.items()
    }


# A weight's pieces are written one after the other.
@functools.lru_cache(maxsize=1)
def _quantized(tensor: StoredTensor, bits: int) -> QuantizedWeight:
    values = tensor.read().astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(
            f"{tensor.file}: tensor {printable(tensor.name)} has NaN or infinite values, "
            "which no few bits can hold"
        )
    return quantize(values, bits, _OWN_GROUP)
