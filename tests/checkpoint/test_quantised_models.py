"""Whole models in quantised layouts: loaded both ways, and quantised by ourselves."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import qwen_jax
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.errors import UserError
from qwen_jax.evaluation.quantisation import measure_divergence
from qwen_jax.nn.quantized import QuantizedWeight
from qwen_jax.pretrained import parameter_bytes
from tests.checkpoint.quantised_layouts import (
    pack_awq,
    pack_fp8,
    pack_gptq,
    quantise_directory,
    round_to_groups,
    unpack_awq,
    unpack_fp8,
    unpack_gptq,
    unpack_own,
)
from tests.reference import random_reference, reference_logits, save_reference
from tests.reward_models import RewardModel, random_reward_model, save_reward_model

IDS = np.random.default_rng(1).integers(0, 320, (2, 12))


def gptq_layout(bits: int, desc_act: bool, version: int = 1, symmetric: bool = True):
    config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": desc_act,
              "sym": symmetric}  # fmt: skip
    config["checkpoint_format"] = "gptq_v2" if version == 2 else "gptq"

    def pack(weight):
        group_of = np.arange(weight.shape[1]) // 16
        if desc_act:
            np.random.default_rng(weight.shape[1]).shuffle(group_of)
        grid = round_to_groups(weight, bits, group_of, symmetric)
        return pack_gptq(*grid, group_of, bits, version)

    return config, pack, lambda pieces: unpack_gptq(pieces, bits, version)


def awq_layout():
    def pack(weight):
        return pack_awq(*round_to_groups(weight, 4, np.arange(weight.shape[1]) // 16, False))

    config = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm",
              "zero_point": True}  # fmt: skip
    return config, pack, lambda pieces: unpack_awq(pieces, 16)


def fp8_layout(block=(40, 28)):
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
              "weight_block_size": list(block)}  # fmt: skip
    return config, lambda weight: pack_fp8(weight, block), lambda pieces: unpack_fp8(pieces, block)


LAYOUTS = {
    "gptq 4 bits": gptq_layout(4, desc_act=False),
    "gptq 8 bits out of order": gptq_layout(8, desc_act=True, version=2, symmetric=False),
    "awq": awq_layout(),
    "fp8": fp8_layout(),
}


def is_linear(name: str) -> bool:
    return name.endswith(("_proj.weight", "in_proj_qkvz.weight", "in_proj_qkv.weight",
                          "in_proj_z.weight", "c_attn.weight", "c_proj.weight", "w1.weight",
                          "w2.weight"))  # fmt: skip


def logits_of(directory, weights):
    model, params = qwen_jax.load_pretrained(directory, "float32", weights=weights)
    out = jax.jit(model.apply)({"params": params}, IDS)
    return np.asarray(out.hidden_states[-1] if out.logits is None else out.logits), params


def packed_leaves(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))
    return [leaf for leaf in leaves if isinstance(leaf, QuantizedWeight)]


def check_both_ways(directory, expected, most):
    dense_logits, dense = logits_of(directory, "dense")
    packed_logits, packed = logits_of(directory, "packed")
    np.testing.assert_allclose(dense_logits, expected, atol=1e-4)
    np.testing.assert_allclose(packed_logits, expected, atol=1e-4)
    assert packed_leaves(dense) == []
    weights = sum(leaf.nbytes for leaf in packed_leaves(packed))
    numbers = sum(np.prod(leaf.shape) for leaf in packed_leaves(packed))
    assert weights < most * numbers
    others = parameter_bytes(dense) - 4 * numbers
    assert parameter_bytes(packed) == weights + others < parameter_bytes(dense)
    return packed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_dequantised_reference(layout, tmp_path):
    family = "qwen2" if layout == "awq" else "qwen3"
    reference = random_reference(family, num_hidden_layers=2)
    directory = save_reference(reference, tmp_path / "model")
    original = reference_logits(reference, IDS)
    dense = quantise_directory(directory, *LAYOUTS[layout], is_linear)
    reference.load_state_dict(dense)
    expected = reference_logits(reference, IDS)
    assert np.abs(expected - original).max() > 1e-2
    packed = check_both_ways(directory, expected, most=1.7 if "8" in layout else 1)
    assert len(packed_leaves(packed)) == 2 * 7
    model, _ = qwen_jax.load_pretrained(directory)
    prompts = [[1, 2, 3], [4, 5]]
    ids = qwen_jax.generate(model, packed, prompts, max_new_tokens=6, temperature=0.0)
    dense = qwen_jax.load_pretrained(directory, "float32")[1]
    assert ids == qwen_jax.generate(model, dense, prompts, max_new_tokens=6, temperature=0.0)


@pytest.mark.parametrize("target_format", ["hf", "orbax"])
def test_converting_scales_that_are_no_numbers_warns_by_name(target_format, tmp_path):
    directory = save_reference(random_reference("qwen3", num_hidden_layers=1), tmp_path / "model")
    quantise_directory(directory, *LAYOUTS["gptq 4 bits"], is_linear)
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.scales"][0, 0] = torch.nan
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=rf"NaN or .* {re.escape(name)}\.weight;") as warned:
        convert(directory, tmp_path / "converted", target_format)
    assert len(warned) == 1


def test_weights_that_are_plain_after_all_are_refused(tmp_path):
    directory = save_reference(random_reference("qwen3", num_hidden_layers=1), tmp_path / "model")
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": LAYOUTS["awq"][0]}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        qwen_jax.load_pretrained(directory)
    assert str(error.value).startswith(
        f"{path}: quantization_config says awq, yet no tensor is named *.qweight; remove it"
    )


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2_moe", "gptq 4 bits"),
        ("qwen3_moe", "awq"),
        ("qwen3_moe", "gptq 8 bits out of order"),
        ("qwen3_moe", "fp8"),
        ("qwen3_next", "gptq 8 bits out of order"),
        ("qwen3_next", "fp8"),
        ("qwen3_5_text", "fp8"),
        ("qwen3_5_moe_text", "fp8"),
    ],
)
def test_fused_matrices_and_stacked_experts_stay_packed(family, layout, tmp_path):
    reference = random_reference(family)
    directory = save_reference(reference, tmp_path / "model")
    dense = quantise_directory(directory, *LAYOUTS[layout], is_linear)
    plain = save_reference(reference, tmp_path / "plain")
    save_file(dense, plain / "model.safetensors", {"format": "pt"})
    reference = type(reference).from_pretrained(plain, attn_implementation="eager")
    packed = check_both_ways(directory, reference_logits(reference, IDS), most=1.7)
    if reference.config.get_text_config().to_dict().get("num_experts"):
        experts = packed["layers_1"]["mlp"]["experts"]["down_proj"]["weight"]
        assert experts.shape == (6, 64, 40)


def sequence_classifier():
    fields = {"num_labels": 3, "pad_token_id": 7, "num_hidden_layers": 1}
    return random_reference("qwen3", 3, AutoModelForSequenceClassification, **fields)


def token_classifier():
    fields = {"num_labels": 5, "num_hidden_layers": 1}
    return random_reference("qwen2", 4, AutoModelForTokenClassification, **fields)


HEADS = {
    "two layers of scores": lambda: random_reward_model(2, 5, num_hidden_layers=1),
    "scores of a text": sequence_classifier,
    "scores of tokens": token_classifier,
    "none": lambda: random_reference("qwen3", 6, AutoModel, num_hidden_layers=1),
}


@pytest.mark.parametrize("layout", ["gptq 4 bits", "fp8"])
@pytest.mark.parametrize("head", HEADS)
def test_other_heads_are_those_of_the_dequantised_reference(head, layout, tmp_path):
    """Scores, or without a head the final hidden states, at every token."""
    reference = HEADS[head]()
    save = save_reward_model if isinstance(reference, RewardModel) else save_reference
    directory = save(reference, tmp_path / "model")

    def outputs():
        base = getattr(reference, "model", reference)
        with torch.no_grad():
            hidden = base(torch.as_tensor(IDS), use_cache=False).last_hidden_state
            return getattr(reference, "score", torch.nn.Identity())(hidden).numpy()

    original = outputs()
    reference.load_state_dict(quantise_directory(directory, *LAYOUTS[layout], is_linear))
    assert np.abs(outputs() - original).max() > 1e-2
    packed = check_both_ways(directory, outputs(), most=1.7 if "8" in layout else 1)
    assert len(packed_leaves(packed)) == 7


QWEN1 = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "vocab_size": 320,
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 16,
    "intermediate_size": 192, "layer_norm_epsilon": 1e-6, "seq_length": 256, "no_bias": True,
    "max_position_embeddings": 256, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "use_dynamic_ntk": True, "use_logn_attn": True, "tie_word_embeddings": False,
}  # fmt: skip


def qwen1_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {
        "transformer.wte.weight": torch.randn(320, 64),
        "transformer.ln_f.weight": 1 + 0.3 * torch.randn(64),
        "lm_head.weight": torch.randn(320, 64) / 8,
    }
    for i in range(2):
        layer = {
            "ln_1.weight": 1 + 0.3 * torch.randn(64),
            "ln_2.weight": 1 + 0.3 * torch.randn(64),
            "attn.c_attn.weight": torch.randn(192, 64) / 8,
            "attn.c_attn.bias": torch.randn(192) / 2,
            "attn.c_proj.weight": torch.randn(64, 64) / 8,
            "mlp.w1.weight": torch.randn(96, 64) / 8,
            "mlp.w2.weight": torch.randn(96, 64) / 8,
            "mlp.c_proj.weight": torch.randn(64, 96) / 10,
        }
        tensors |= {f"transformer.h.{i}.{name}": value for name, value in layer.items()}
    return tensors


def write_qwen1(directory):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(QWEN1))
    save_file(qwen1_tensors(), directory / "model.safetensors")
    return directory


def test_fused_projections_and_the_zero_biases_beside_them(tmp_path, refused):
    plain, directory = write_qwen1(tmp_path / "plain"), write_qwen1(tmp_path / "model")
    dense = quantise_directory(directory, *LAYOUTS["gptq 4 bits"], is_linear)
    save_file(dense, plain / "model.safetensors")
    stored = load_file(directory / "model.safetensors")
    bias = "transformer.h.1.mlp.w1.bias"
    save_file({**stored, bias: torch.zeros(96)}, directory / "model.safetensors")
    expected, _ = logits_of(plain, "dense")
    packed = check_both_ways(directory, expected, most=1)
    assert packed["layers_0"]["self_attn"]["k_proj"]["weight"].shape == (64, 64)
    save_file({**stored, bias: torch.ones(96)}, directory / "model.safetensors")
    refused(lambda: logits_of(directory, "dense"), bias, "not zero")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    return save_reference(random_reference("qwen3_moe", num_hidden_layers=2), directory)


@pytest.fixture(scope="module")
def families(plain, tmp_path_factory):
    """Directories of models with experts, with the delta rule besides, with fused projections."""
    root = tmp_path_factory.mktemp("families")
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    hybrid = save_reference(random_reference("qwen3_next", **layers), root / "hybrid")
    return {"qwen3_moe": plain, "qwen3_next": hybrid, "qwen": write_qwen1(root / "qwen")}


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "qwen"])
def test_what_we_quantise_loads_as_our_description_says(family, quantize, families, tmp_path):
    plain, bits = families[family], int(quantize[3:])
    target = tmp_path / "target"
    written = convert(plain, target, "hf", quantize=quantize)
    raw = json.loads((target / "config.json").read_text())
    assert raw.pop("quantization_config") == {
        "quant_method": "qwen_jax", "bits": bits, "group_size": 128
    }  # fmt: skip
    assert raw == json.loads((plain / "config.json").read_text())

    stored, original = (
        load_file(target / "model.safetensors"),
        load_file(plain / "model.safetensors"),
    )
    assert written.num_tensors == len(stored)
    sizes = [value.numel() * value.element_size() for value in stored.values()]
    assert written.num_bytes == sum(sizes) < written.num_bytes_dense
    dense = {}
    for name, value in original.items():
        if not is_linear(name):
            assert torch.equal(stored[name], value)
            dense[name] = value
            continue
        pieces = {
            "weight" + end: stored[name + end].numpy()
            for end in ("_packed", "_scales", "_zeros")
            if name + end in stored
        }
        dense[name] = torch.tensor(unpack_own(pieces, bits, 128))
        step = (value.max() - value.min()) / (127 if bits == 8 else 15)
        assert (dense[name] - value).abs().max() <= step
    by_hand = shutil.copytree(plain, tmp_path / "by_hand")
    save_file(dense, by_hand / "model.safetensors", {"format": "pt"})
    expected, _ = logits_of(by_hand, "dense")
    check_both_ways(target, expected, most=1.1 if bits == 8 else 0.7)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_what_we_quantise_generates_the_same_packed_or_not(quantize, plain, tmp_path):
    convert(plain, tmp_path / "target", "hf", quantize=quantize)
    model, dense = qwen_jax.load_pretrained(tmp_path / "target", "float32")
    packed = qwen_jax.load_pretrained(tmp_path / "target", "float32", weights="packed")[1]
    prompts = [[1, 2, 3], [4, 5]]
    ids = qwen_jax.generate(model, packed, prompts, max_new_tokens=6, temperature=0.0)
    assert ids == qwen_jax.generate(model, dense, prompts, max_new_tokens=6, temperature=0.0)


def test_the_measure_is_the_divergence_of_the_two_distributions(plain, tmp_path):
    convert(plain, tmp_path / "int4", "hf", quantize="int4")
    convert(plain, tmp_path / "int8", "hf", quantize="int8")
    found = measure_divergence(plain, tmp_path / "int4")
    assert (found.num_tokens, found.is_text) == (256, False)
    ids = np.random.default_rng(0).integers(0, 320, 256)[None]
    p, q = (
        torch.log_softmax(torch.tensor(np.asarray(model.apply({"params": params}, ids).logits)), -1)
        for model, params in map(qwen_jax.load_pretrained, (plain, tmp_path / "int4"))
    )
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    np.testing.assert_allclose(found.mean_kl, kl, rtol=1e-3)
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).float().mean()
    finer = measure_divergence(plain, tmp_path / "int8")
    assert 0 < finer.mean_kl < found.mean_kl / 20


def test_a_quantised_checkpoint_is_converted_to_what_it_stands_for(tmp_path):
    reference = random_reference("qwen3", num_hidden_layers=1)
    directory = save_reference(reference, tmp_path / "model")
    dense = quantise_directory(directory, *LAYOUTS["awq"], is_linear)
    descriptions = ("quantize_config.json", "quant_config.json")
    for name in descriptions:
        (directory / name).write_text('{"bits": 4}')
    for target_format in ("hf", "orbax"):
        target = tmp_path / target_format
        written = convert(directory, target, target_format)
        assert written.dequantised
        assert not any((target / name).exists() for name in descriptions)
        assert "quantization_config" not in json.loads((target / "config.json").read_text())
        np.testing.assert_array_equal(
            logits_of(target, "dense")[0], logits_of(directory, "dense")[0]
        )
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name: value.dtype for name, value in stored.items()} == dict.fromkeys(
        dense, torch.float32
    )
    assert all(torch.equal(stored[name], value) for name, value in dense.items())
    convert(directory, tmp_path / "again", "hf", quantize="int8")
    assert not any((tmp_path / "again" / name).exists() for name in descriptions)
    logits_of(tmp_path / "again", "packed")


def test_what_cannot_be_is_refused(plain, tmp_path, refused):
    def load(directory=plain, **options):
        return lambda: qwen_jax.load_pretrained(directory, **options)

    refused(load(weights="packed"), str(plain), "not quantised")
    refused(load(weights="int8"), "weights = int8", "dense, packed")
    target = tmp_path / "target"
    refused(lambda: convert(plain, target, "orbax", quantize="int8"), "int8", "orbax")
    refused(lambda: convert(plain, target, "hf", quantize="int2"), "int2", "int8, int4")
    convert(plain, target, "hf", quantize="int8")
    model, params = qwen_jax.load_pretrained(target, weights="packed")
    refused(
        lambda: qwen_jax.save_pretrained(tmp_path / "saved", model.config, params), "packed weights"
    )
    stored = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    for end in ("_packed", "_scales"):
        del stored[name + end]
    save_file({**stored, name: torch.ones(40, 64)}, target / "model.safetensors")
    refused(load(target, weights="packed"), "model.layers.0.mlp.experts", "not all quantised")
    raw = json.loads((target / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (target / "config.json").write_text(json.dumps(raw))
    refused(load(target), str(target), "quant_method", "bitsandbytes")


def test_nan_in_packed_weights_is_found(plain, tmp_path, refused):
    directory = shutil.copytree(plain, tmp_path / "model")
    quantise_directory(directory, *fp8_layout(), is_linear)
    stored = load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    stored[name].view(torch.uint8)[1, 2] = 0x7F
    save_file(stored, directory / "model.safetensors")
    for weights in ("dense", "packed"):
        with pytest.warns(UserWarning, match=name):
            qwen_jax.load_pretrained(directory, weights=weights)
