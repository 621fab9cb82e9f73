"""The published layouts of quantised weights, written and read bit by bit from their descriptions.

Weights are [out, in]; codes, zeros and scales [in or groups, out], as the formats think of them.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def pack_words(numbers, bits: int, order=None) -> list[int]:
    """Integers -> int32 words, low bits first; slot n of a word takes number order[n] of eight."""
    per_word = 32 // bits
    order = order or range(per_word)
    words = []
    for start in range(0, len(numbers), per_word):
        word = 0
        for slot, offset in enumerate(order):
            word |= int(numbers[start + offset]) << (bits * slot)
        words.append(signed(word))
    return words


def unpack_words(words, bits: int, order=None) -> list[int]:
    per_word = 32 // bits
    order = order or range(per_word)
    numbers = [0] * (len(words) * per_word)
    for i, word in enumerate(words):
        for slot, offset in enumerate(order):
            shifted = (int(word) & 0xFFFFFFFF) >> (bits * slot)
            numbers[i * per_word + offset] = shifted & ((1 << bits) - 1)
    return numbers


def round_to_groups(weight, bits, group_of, symmetric):
    """Codes, zeros and float16 scales of the nearest grid, the range of each group its own."""
    top = (1 << bits) - 1
    n_groups, n_out = group_of.max() + 1, len(weight)
    scales, zeros = np.zeros((n_groups, n_out), np.float16), np.zeros((n_groups, n_out), int)
    for g in range(n_groups):
        part = weight[:, group_of == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[g] = (high - low) / top
        zeros[g] = (top + 1) // 2 if symmetric else np.rint(-low / scales[g].astype(np.float32))
    steps = weight.T / scales[group_of].astype(np.float32)
    return np.clip(np.rint(steps) + zeros[group_of], 0, top).astype(int), zeros, scales


def pack_gptq(codes, zeros, scales, g_idx, bits: int, version: int) -> dict[str, torch.Tensor]:
    stored = (zeros - 1 if version == 1 else zeros) & ((1 << bits) - 1)
    qweight = [pack_words(column, bits) for column in codes.T]
    return {
        "qweight": torch.tensor(qweight, dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([pack_words(row, bits) for row in stored], dtype=torch.int32),
        "scales": torch.tensor(scales, dtype=torch.float16),
        "g_idx": torch.tensor(g_idx, dtype=torch.int32),
    }


def unpack_gptq(pieces: dict[str, torch.Tensor], bits: int, version: int) -> np.ndarray:
    qweight, qzeros = pieces["qweight"].tolist(), pieces["qzeros"].tolist()
    scales, g_idx = pieces["scales"].float().numpy(), pieces["g_idx"].tolist()
    zeros = [unpack_words(row, bits) for row in qzeros]
    if version == 1:
        zeros = [[(zero + 1) % (1 << bits) for zero in row] for row in zeros]
    weight = np.zeros((scales.shape[1], len(g_idx)), np.float32)
    for o in range(weight.shape[0]):
        codes = unpack_words([row[o] for row in qweight], bits)
        for i, g in enumerate(g_idx):
            weight[o, i] = scales[g, o] * (codes[i] - zeros[g][o])
    return weight


def pack_awq(codes, zeros, scales) -> dict[str, torch.Tensor]:
    def pack(rows):
        packed = [pack_words(row, 4, AWQ_COLUMNS) for row in rows]
        return torch.tensor(packed, dtype=torch.int32)

    return {
        "qweight": pack(codes),
        "qzeros": pack(zeros),
        "scales": torch.tensor(scales, dtype=torch.float16),
    }


def unpack_awq(pieces: dict[str, torch.Tensor], group_size: int) -> np.ndarray:
    codes = [unpack_words(row, 4, AWQ_COLUMNS) for row in pieces["qweight"].tolist()]
    zeros = [unpack_words(row, 4, AWQ_COLUMNS) for row in pieces["qzeros"].tolist()]
    scales = pieces["scales"].float().numpy()
    weight = np.zeros((scales.shape[1], len(codes)), np.float32)
    for i, row in enumerate(codes):
        for o, code in enumerate(row):
            g = i // group_size
            weight[o, i] = scales[g, o] * (code - zeros[g][o])
    return weight


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent (bias 7), three of mantissa; no infinities, NaN all ones."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def pack_fp8(weight: np.ndarray, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    rows, columns = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
    scales, values = np.zeros((rows, columns), np.float32), np.zeros_like(weight)
    for r in range(rows):
        for c in range(columns):
            place = np.s_[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            scales[r, c] = np.abs(weight[place]).max() / 448
            values[place] = weight[place] / scales[r, c]
    return {
        "weight": torch.tensor(values).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.tensor(scales),
    }


def unpack_fp8(pieces: dict[str, torch.Tensor], block: tuple[int, int]) -> np.ndarray:
    table = [e4m3(byte) for byte in range(256)]
    scales = pieces["weight_scale_inv"].numpy()
    weight = np.zeros(pieces["weight"].shape, np.float32)
    for o, row in enumerate(pieces["weight"].view(torch.uint8).tolist()):
        for i, byte in enumerate(row):
            weight[o, i] = np.float32(table[byte]) * scales[o // block[0], i // block[1]]
    return weight


def unpack_own(pieces: dict[str, np.ndarray], bits: int, group_size: int) -> np.ndarray:
    """One matrix of our own format, from its description in `checkpoint.quantised`."""
    packed, scales = pieces["weight_packed"], pieces["weight_scales"]
    weight = np.zeros((packed.shape[0], packed.shape[1] * 8 // bits), np.float32)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            g = i // group_size
            if bits == 8:
                code = int(packed[o, i])
            else:
                code = (int(packed[o, i // 2]) >> (4 * (i % 2))) % 16
                code -= int(pieces["weight_zeros"][o, g])
            weight[o, i] = scales[o, g] * np.float32(code)
    return weight


def quantise_directory(directory: Path, config: dict, pack, unpack, linear=None) -> dict:
    """Rewrites a saved model in a quantised layout; returns its state dict as dequantised.

    Args:
      directory: holds config.json and model.safetensors, and is changed.
      config: the `quantization_config`.
      pack: of a weight, float32 [out, in]: the pieces that take its place.
      unpack: of those pieces: the weight that they stand for.
      linear: whether a tensor, by its name, is the weight of a layer to quantise.
    """
    linear = linear or (lambda name: name.endswith("_proj.weight"))
    tensors = load_file(directory / "model.safetensors")
    stored, dense = {}, {}
    for name, tensor in tensors.items():
        dense[name] = tensor.float()
        if not linear(name):
            stored[name] = tensor
            continue
        pieces = pack(tensor.float().numpy())
        dense[name] = torch.tensor(unpack(pieces))
        stem = name.removesuffix("weight")
        stored |= {stem + piece: value.contiguous() for piece, value in pieces.items()}
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "quantization_config": config}))
    return dense
