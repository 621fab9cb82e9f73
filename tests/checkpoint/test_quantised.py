"""Quantised layouts as published, against an independent unpacking."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from qwen_jax.checkpoint import quantised
from qwen_jax.checkpoint.quantised import QuantizationSpec, read_quantization
from qwen_jax.checkpoint.reader import StoredTensor, open_checkpoint
from qwen_jax.nn.quantized import QuantizedWeight, dequantize
from tests.checkpoint.quantised_layouts import (
    e4m3,
    pack_awq,
    pack_fp8,
    pack_gptq,
    round_to_groups,
    unpack_awq,
    unpack_fp8,
    unpack_gptq,
    unpack_own,
)

N_IN, N_OUT, GROUP = 96, 40, 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm",
       "zero_point": True}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
       "weight_block_size": [128, 128]}  # fmt: skip


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def store(directory, pieces: dict[str, torch.Tensor], stem: str = "X.", suffix=".safetensors"):
    named = {stem + name: value.contiguous() for name, value in pieces.items()}
    if suffix == ".bin":
        torch.save(named, directory / "pytorch_model.bin")
    else:
        save_file(named, directory / "model.safetensors")
    return open_checkpoint(directory, quantised=True)


def check(stored: dict[str, StoredTensor], config: dict, expected: np.ndarray) -> QuantizedWeight:
    """Both ways of reading X.weight against `expected`, to the bit."""
    logical = quantised.logical_tensors(stored, read_quantization(config))
    assert list(logical) == ["X.weight"]
    tensor = logical["X.weight"]
    assert tensor.shape == expected.shape
    dense = quantised.dequantised(tensor)
    assert dense.shape == expected.shape and not dense.quantised
    values = dense.read()
    assert values.dtype == dense.dtype == np.float32
    np.testing.assert_array_equal(values, expected)
    packed = tensor.read()
    assert tensor.quantised and packed.shape == expected.shape
    np.testing.assert_array_equal(dequantize(packed, np.float32), expected)
    return packed


def random_codes(rng, bits: int, groups: int):
    codes = rng.integers(0, 1 << bits, (N_IN, N_OUT))
    zeros = rng.integers(0, 1 << bits, (groups, N_OUT))
    return codes, zeros, rng.uniform(0.001, 0.1, (groups, N_OUT)).astype(np.float16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_gptq(rng, tmp_path, bits, version, desc_act, suffix):
    g_idx = np.arange(N_IN) // GROUP
    if desc_act:
        rng.shuffle(g_idx)
    pieces = pack_gptq(*random_codes(rng, bits, 3), g_idx, bits, version)
    config = GPTQ | {"bits": bits, "desc_act": desc_act, "sym": False}
    config |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    packed = check(
        store(tmp_path, pieces, suffix=suffix), config, unpack_gptq(pieces, bits, version)
    )
    assert packed.values.nbytes == N_IN * N_OUT * bits // 8


@pytest.mark.parametrize(("bits", "word"), [(4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_gptq_zeros_are_the_middle_stored_minus_one(rng, tmp_path, bits, word):
    weight = rng.normal(size=(N_OUT, N_IN)).astype(np.float32)
    group_of = np.arange(N_IN) // GROUP
    codes, zeros, scales = round_to_groups(weight, bits, group_of, symmetric=True)
    pieces = pack_gptq(codes, zeros, scales, group_of, bits, version=1)
    assert (pieces["qzeros"] == word).all()
    packed = check(store(tmp_path, pieces), GPTQ | {"bits": bits}, unpack_gptq(pieces, bits, 1))
    assert (packed.zeros == 1 << (bits - 1)).all()
    step = 2 * np.abs(weight).max() / ((1 << bits) - 1)
    np.testing.assert_allclose(dequantize(packed, np.float32), weight, atol=0.51 * step + 1e-3)


def test_gptq_in_one_group_and_without_g_idx(rng, tmp_path):
    pieces = pack_gptq(*random_codes(rng, 4, 1), np.zeros(N_IN, int), 4, 1)
    expected = unpack_gptq(pieces, 4, 1)
    del pieces["g_idx"]
    check(store(tmp_path, pieces), GPTQ | {"group_size": -1}, expected)


def test_gptq_with_a_last_group_that_is_not_full(rng, tmp_path):
    group_of = np.arange(N_IN) // 40
    pieces = pack_gptq(*random_codes(rng, 4, 3), group_of, 4, 1)
    check(store(tmp_path, pieces), GPTQ | {"group_size": 40}, unpack_gptq(pieces, 4, 1))


def test_awq(rng, tmp_path):
    pieces = pack_awq(*random_codes(rng, 4, 3))
    check(store(tmp_path, pieces), AWQ, unpack_awq(pieces, GROUP))


def test_the_outputs_of_an_awq_word_are_in_its_own_order(tmp_path):
    # Columns 0 to 7 hold their own number: the word's hexadecimal digits, high to low.
    word = torch.tensor([[0x75316420]] * 2, dtype=torch.int32)
    pieces = {"qweight": word, "qzeros": torch.zeros(1, 1, dtype=torch.int32),
              "scales": torch.ones(1, 8, dtype=torch.float16)}  # fmt: skip
    expected = np.repeat(np.arange(8, dtype=np.float32)[:, None], 2, axis=1)
    check(store(tmp_path, pieces), AWQ | {"group_size": 2}, expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shape", [(200, 300), (128, 256), (24, 129)])
def test_fp8_in_blocks(rng, tmp_path, shape, suffix):
    pieces = pack_fp8(rng.normal(size=shape).astype(np.float32), (128, 128))
    blocks = -(-shape[0] // 128), -(-shape[1] // 128)
    assert pieces["weight_scale_inv"].shape == blocks
    stored = store(tmp_path, pieces, suffix=suffix)
    packed = check(stored, FP8, unpack_fp8(pieces, (128, 128)))
    assert packed.values.nbytes == shape[0] * shape[1]
    assert packed.float8 and packed.values.dtype == np.uint8


def test_every_fp8_value_and_a_block_that_is_not_square(rng, tmp_path):
    every = [byte for byte in range(256) if byte & 127 != 127]
    values = torch.tensor([every] * 5, dtype=torch.uint8).view(torch.float8_e4m3fn)
    pieces = {"weight": values, "weight_scale_inv": torch.ones(3, 4)}
    expected = np.array([[e4m3(byte) for byte in every]] * 5, np.float32)
    check(store(tmp_path, pieces), FP8 | {"weight_block_size": [2, 64]}, expected)


def test_fp8_stacks_of_experts(rng, tmp_path):
    weights = rng.normal(size=(3, 20, 40)).astype(np.float32)
    pieces = [pack_fp8(weight, (16, 16)) for weight in weights]
    stacked = {
        "gate_up_proj": torch.stack([piece["weight"] for piece in pieces]),
        "gate_up_proj_scale_inv": torch.stack([piece["weight_scale_inv"] for piece in pieces]),
    }
    spec = read_quantization(FP8 | {"weight_block_size": [16, 16]})
    logical = quantised.logical_tensors(store(tmp_path, stacked), spec)
    expected = np.stack([unpack_fp8(piece, (16, 16)) for piece in pieces])
    values = quantised.dequantised(logical["X.gate_up_proj"]).read()
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_our_own_pieces_hold_what_their_description_says(rng, bits):
    weight = rng.normal(size=(10, 200)).astype(np.float32)
    tensor = StoredTensor("X.weight", None, weight.shape, weight.dtype, lambda: weight)
    pieces = quantised.own_pieces("X.weight", tensor, bits)
    values = {name.removeprefix("X."): piece.read() for name, piece in pieces.items()}
    for name, piece in pieces.items():
        value = values[name.removeprefix("X.")]
        assert (value.shape, value.dtype) == (piece.shape, piece.dtype)
    config = quantised.own_config(bits)
    expected = unpack_own(values, bits, config["group_size"])
    check(pieces, config, expected)
    assert np.abs(expected - weight).max() < (0.05 if bits == 8 else 0.7)


def test_our_own_pieces_are_not_made_of_nan(refused):
    weight = np.full((2, 4), np.nan, np.float32)
    tensor = StoredTensor("X.weight", None, weight.shape, weight.dtype, lambda: weight)
    for piece in quantised.own_pieces("X.weight", tensor, 8).values():
        refused(piece.read, "X.weight", "NaN")


@pytest.mark.parametrize(
    ("piece", "change", "says"),
    [
        ("scales", None, "no .scales"),
        ("qzeros", None, "no .qzeros"),
        ("g_idx", None, "no .g_idx"),
        ("scales", lambda t: t[:-1], "[3, 40] is needed"),
        ("scales", lambda t: t.to(torch.int32), "int32"),
        ("qzeros", lambda t: t[:, :-1], "[3, 5] is needed"),
        ("qweight", lambda t: t.float(), "float32"),
        ("qweight", lambda t: t[0], "no matrix"),
        ("qweight", lambda t: t[None], "no matrix"),
        ("g_idx", lambda t: t[:-1], "[96]"),
        ("g_idx", lambda t: t - 1, "from -1 to 1"),
        ("g_idx", lambda t: t + 1, "from 1 to 3"),
    ],
)
def test_broken_gptq_pieces_are_refused_by_name(rng, tmp_path, refused, piece, change, says):
    pieces = pack_gptq(*random_codes(rng, 4, 3), np.arange(N_IN) // GROUP, 4, 1)
    value = pieces.pop(piece)
    if change is not None:
        pieces[piece] = change(value)
    spec = read_quantization(GPTQ | {"desc_act": True})

    def load():
        quantised.logical_tensors(store(tmp_path, pieces), spec)["X.weight"].read()

    refused(load, "X.", piece, says)


def test_groups_out_of_order_need_desc_act(rng, tmp_path, refused):
    g_idx = np.arange(N_IN)[::-1] // GROUP
    pieces = pack_gptq(*random_codes(rng, 4, 3), g_idx, 4, 1)
    tensors = quantised.logical_tensors(store(tmp_path, pieces), read_quantization(GPTQ))
    refused(tensors["X.weight"].read, "X.g_idx", "desc_act")


def test_pieces_that_do_not_make_a_weight_are_refused_by_name(rng, tmp_path, refused):
    def logical(pieces, config):
        return lambda: quantised.logical_tensors(store(tmp_path, pieces), read_quantization(config))

    fp8 = pack_fp8(rng.normal(size=(8, 8)).astype(np.float32), (4, 4))
    config = FP8 | {"weight_block_size": [4, 4]}
    refused(logical({"other_scale_inv": torch.ones(2, 2)}, FP8), "X.other_scale_inv", "no weight")
    refused(logical(fp8 | {"lone": fp8["weight"].clone()}, config), "X.lone", "float8_e4m3fn")
    stray = fp8 | {"bytes": torch.zeros(2, dtype=torch.int32)}
    refused(logical(stray, config), "X.bytes", "int32")
    refused(logical(fp8, FP8), "X.weight_scale_inv", "[1, 1] is needed")
    refused(logical({"weight": torch.ones(2, 2)}, GPTQ), "gptq", ".qweight")
    gptq = pack_gptq(*random_codes(rng, 4, 3), np.arange(N_IN) // GROUP, 4, 1)
    refused(logical(gptq | {"weight": torch.ones(40, 96)}, GPTQ), "X.weight", "X.qweight")
    awq = pack_awq(*random_codes(rng, 4, 3))
    refused(logical(awq | {"qweight": awq["qweight"][:95]}, AWQ), "X.qweight", "odd")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", ["gptq", "fp8"])
def test_quantised_weights_that_config_json_does_not_tell_of(
    rng, tmp_path, refused, layout, suffix
):
    pieces = {
        "gptq": pack_gptq(*random_codes(rng, 4, 3), np.arange(N_IN) // GROUP, 4, 1),
        "fp8": pack_fp8(rng.normal(size=(8, 8)).astype(np.float32), (4, 4)),
    }[layout]
    store(tmp_path, pieces, suffix=suffix)
    parts = ("X.", "config.json has no quantization_config", "quantize_config.json")
    message = refused(lambda: open_checkpoint(tmp_path), *parts)
    assert "save it as" not in message


def test_shapes_that_contradict_config_json(rng, tmp_path, refused):
    """The piece, that which it is beside, and the fields that both go by are all named."""

    def check(pieces, config, *parts):
        spec = read_quantization(config)
        parts = (*parts, "config.json and the weights disagree")
        refused(lambda: quantised.logical_tensors(store(tmp_path, pieces), spec), *parts)

    gptq = pack_gptq(*random_codes(rng, 4, 3), np.arange(N_IN) // GROUP, 4, 1)
    check(gptq, GPTQ | {"group_size": 16}, "X.scales has shape [3, 40]", "[6, 40] is needed",
          "X.qweight [12, 40]", "bits = 4 and group_size = 16")  # fmt: skip
    check(gptq, GPTQ | {"bits": 8}, "X.scales", "X.qweight [12, 40]", "bits = 8 and group_size")
    whole = pack_gptq(*random_codes(rng, 4, 1), np.zeros(N_IN, int), 4, 1)
    short = whole | {"qweight": whole["qweight"][:-1]}
    check(short, GPTQ | {"group_size": -1}, "X.g_idx", "X.qweight [11, 40]", "group_size = -1")
    fp8 = pack_fp8(rng.normal(size=(8, 8)).astype(np.float32), (4, 4))
    check(fp8, FP8, "X.weight_scale_inv", "X.weight [8, 8]", "weight_block_size = [128, 128]")


def test_zero_biases_of_layers_without_one_are_dropped(rng, tmp_path, refused):
    pieces = pack_gptq(*random_codes(rng, 4, 3), np.arange(N_IN) // GROUP, 4, 1)

    def names(value, wanted, pieces=pieces):
        stored = store(tmp_path, pieces | {"bias": torch.full([N_OUT], value)})
        tensors = quantised.logical_tensors(stored, read_quantization(GPTQ))
        return set(quantised.drop_zero_biases(tensors, wanted))

    assert names(0.0, ["X.weight"]) == {"X.weight"}
    assert names(0.0, ["X.weight", "X.bias"]) == {"X.weight", "X.bias"}
    assert names(1.0, ["X.weight", "X.bias"]) == {"X.weight", "X.bias"}
    refused(lambda: names(1.0, ["X.weight"]), "X.bias", "not zero")
    # A bias of a layer that is not quantised is for others to judge.
    elsewhere = {f"Y.{name}": value for name, value in pieces.items()}
    plain = {"weight": torch.ones(2, 2)}
    assert names(0.0, [], elsewhere | plain) == {"X.weight", "X.bias", "X.Y.weight"}


PUBLISHED = {
    "gptq of the first generation": (
        {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False,
         "static_groups": False, "sym": True, "true_sequential": True,
         "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq"},
        QuantizationSpec("gptq", 4, 128, zero_offset=1),
    ),
    "gptq": (
        {"batch_size": 1, "bits": 8, "block_name_to_quantize": None, "cache_block_outputs": True,
         "damp_percent": 0.01, "dataset": None, "desc_act": True,
         "exllama_config": {"version": 1}, "group_size": 128, "max_input_length": None,
         "model_seqlen": None, "module_name_preceding_first_block": None,
         "modules_in_block_to_quantize": None, "pad_token_id": None, "quant_method": "gptq",
         "sym": True, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False,
         "use_exllama": True, "checkpoint_format": "gptq_v2"},
        QuantizationSpec("gptq", 8, 128, desc_act=True),
    ),
    "gptq that leaves modules out": (
        {"bits": 4, "checkpoint_format": "gptq", "desc_act": False, "group_size": 128,
         "dynamic": {"lm_head": {}, "model.language_model.embed_tokens": {}, "-:.*attn.*": {},
                     "-:.*shared_expert.*": {}, "-:.*mtp.*": {}, "-:.*visual.*": {}},
         "lm_head": False, "pack_dtype": "int32", "quant_method": "gptq", "sym": True},
        QuantizationSpec("gptq", 4, 128, zero_offset=1),
    ),
    "gptq by GPTQModel 5.6": (
        {"bits": 4, "checkpoint_format": "gptq", "desc_act": False, "format": "gptq",
         "group_size": 128, "lm_head": False, "pack_dtype": "int32", "pack_impl": "cpu",
         "meta": {"act_group_aware": True, "damp_percent": 0.05, "gptaq": False, "mse": 0.0,
                  "quantizer": ["gptqmodel:5.6.12"]}, "quant_method": "gptq", "sym": True},
        QuantizationSpec("gptq", 4, 128, zero_offset=1),
    ),
    "gptq by GPTQModel after 5": (
        {"bits": 4, "checkpoint_format": "gptq_v2", "desc_act": False, "format": "gptq_v2",
         "group_size": 32, "lm_head": False, "method": "gptq", "pack_dtype": "int32",
         "meta": {"fallback": {"strategy": "rtn"}}, "quant_method": "gptq", "sym": True},
        QuantizationSpec("gptq", 4, 32),
    ),
    "awq by GPTQModel": (
        {"bits": 4, "checkpoint_format": "gemm", "desc_act": True, "format": "gemm",
         "group_size": 128, "lm_head": False, "method": "awq", "pack_dtype": "int32",
         "quant_method": "awq", "sym": False, "version": "gemm", "zero_point": True},
        QuantizationSpec("awq", 4, 128),
    ),
    "awq as its own writer spells it": (
        {"bits": 4, "group_size": 128, "modules_to_not_convert": [], "quant_method": "awq",
         "version": "GEMM", "zero_point": True},
        QuantizationSpec("awq", 4, 128),
    ),
    "fp8 that tells what it is not": (
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
         "modules_to_not_convert": ["lm_head"], "weight_block_size": [128, 128],
         "weight_per_tensor": False, "act_per_tensor": False},
        QuantizationSpec("fp8", 8, 128, block_rows=128),
    ),
    "awq": (
        {"bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq",
         "version": "gemm", "zero_point": True, "backend": "autoawq", "do_fuse": False},
        QuantizationSpec("awq", 4, 128),
    ),
    "fp8": (
        {"activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"],
         "quant_method": "fp8", "weight_block_size": [128, 64]},
        QuantizationSpec("fp8", 8, 64, block_rows=128),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        (transformers.GPTQConfig(bits=4), QuantizationSpec("gptq", 4, 128, zero_offset=1)),
        (transformers.GPTQConfig(bits=8, format="gptq_v2"), QuantizationSpec("gptq", 8, 128)),
        (transformers.AwqConfig(), QuantizationSpec("awq", 4, 128)),
        (transformers.FineGrainedFP8Config(), QuantizationSpec("fp8", 8, 128, block_rows=128)),
    ],
    ids=["gptq", "gptq_v2", "awq", "fp8"],
)
def test_what_transformers_writes_is_read(config, spec):
    assert read_quantization(json.loads(config.to_json_string(use_diff=False))) == spec


def test_gptq_formats_by_either_name(refused):
    old, new = GPTQ | {"checkpoint_format": "gptq_v2"}, GPTQ | {"format": "gptq_v2"}
    assert read_quantization(old) == read_quantization(new) == read_quantization(old | new)
    assert read_quantization(new).zero_offset == 0
    both = GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}
    refused(lambda: read_quantization(both), 'checkpoint_format = "gptq"', 'format = "gptq_v2"')


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name):
    raw, spec = PUBLISHED[name]
    assert read_quantization(raw) == spec
    assert dataclasses.is_dataclass(spec) and hash(spec)


def test_whatever_a_rule_that_leaves_modules_out_says_is_read():
    rules = {"-:.*a": {"bits": 8}, "-:.*b": None, "+:.*c": {}, ".*d": None}
    assert read_quantization(GPTQ | {"dynamic": rules}) == read_quantization(GPTQ)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["quant_method", "bitsandbytes"]),
        ({"quant_method": "compressed-tensors"}, ["quant_method", "compressed-tensors"]),
        ({"quant_method": "gguf"}, ["quant_method", "gguf"]),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, ["load_in_4bit", "bitsandbytes"]),
        ({"load_in_8bit": True, "load_in_4bit": False}, ["load_in_8bit", "bitsandbytes"]),
        ({"bits": 4}, ["quant_method", "missing"]),
        (GPTQ | {"bits": 3}, ["bits = 3"]),
        (GPTQ | {"bits": 2}, ["bits = 2"]),
        (GPTQ | {"group_size": 0}, ["group_size = 0"]),
        (GPTQ | {"group_size": "128"}, ["group_size", "integer"]),
        (GPTQ | {"desc_act": "no"}, ["desc_act", "boolean"]),
        (GPTQ | {"checkpoint_format": "marlin"}, ["checkpoint_format", "marlin"]),
        (GPTQ | {"format": "marlin"}, ["format", 'only "gptq" and "gptq_v2" are read']),
        (GPTQ | {"method": "gptaq"}, ["method", "gptaq"]),
        (GPTQ | {"is_marlin_format": True}, ["is_marlin_format"]),
        (GPTQ | {"lm_head": True}, ["lm_head"]),
        (GPTQ | {"pack_dtype": "int16"}, ["pack_dtype"]),
        (GPTQ | {"dynamic": {"-:a": {}, "+:b.*": {"bits": 8}}}, ["dynamic", "+:b.*", "bits"]),
        (GPTQ | {"dynamic": {"lm_head": {"group_size": 32}}}, ["dynamic", "lm_head"]),
        (GPTQ | {"dynamic": {"a\nb": {"bits": 8}}}, ["dynamic", "a\\nb"]),
        (GPTQ | {"dynamic": ["-:.*"]}, ["dynamic", "object"]),
        (AWQ | {"dynamic": {"-:.*": {}}}, ["dynamic"]),
        (AWQ | {"format": "gemv"}, ["format", "gemv"]),
        (AWQ | {"version": "gemv"}, ["version", "gemv", 'only "gemm" is read']),
        (AWQ | {"version": "GEMV"}, ["version", "GEMV"]),
        (AWQ | {"version": 1}, ["version = 1"]),
        (FP8 | {"fmt": "E4M3"}, ["fmt", "E4M3"]),
        (FP8 | {"weight_per_tensor": True}, ["weight_per_tensor", "true"]),
        (FP8 | {"act_per_tensor": True}, ["act_per_tensor", "true"]),
        (AWQ | {"bits": 8}, ["bits = 8"]),
        (AWQ | {"zero_point": False}, ["zero_point"]),
        (AWQ | {"group_size": -1}, ["group_size"]),
        (FP8 | {"activation_scheme": "static"}, ["activation_scheme", "static"]),
        (FP8 | {"fmt": "e5m2"}, ["fmt", "e5m2"]),
        (FP8 | {"scale_fmt": "ue8m0"}, ["scale_fmt"]),
        (FP8 | {"expert_dtype": "fp4"}, ["expert_dtype", "fp4"]),
        (FP8 | {"weight_block_size": None}, ["weight_block_size", "null"]),
        (FP8 | {"weight_block_size": [0, 128]}, ["weight_block_size"]),
        (FP8 | {"weight_block_size": [128]}, ["weight_block_size"]),
    ],
)
def test_other_formats_are_refused_by_name(config, parts, refused):
    refused(lambda: read_quantization(config, "config.json"), "config.json", *parts)
