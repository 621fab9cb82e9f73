"""Adapters in PEFT's format, both ways, live: PEFT's read here, ours read by PEFT, equal logits."""

import json

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

import qwen_jax
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.peft_reader import load_adapter
from qwen_jax.checkpoint.peft_writer import save_adapter
from qwen_jax.checkpoint.writer import save_pretrained
from qwen_jax.errors import UserError
from qwen_jax.nn.low_rank import attach, detach, low_rank_weights
from qwen_jax.training.lora import LoraOptions, add_adapters, is_adapter
from qwen_jax.training.partition import combine, partition
from tests.models.passes import random_ids
from tests.reference import random_reference, reference_logits, save_reference

TWO = {"num_hidden_layers": 2}
MIXED = {**TWO, "layer_types": ["linear_attention", "full_attention"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Family, fields of its config, and those of LoraConfig.
CASES = {
    "one layer of two, ranks and scales by pattern": (
        "qwen3",
        TWO,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "layers_to_transform": [1],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 3, "layers.1.mlp.down_proj": 5},
            "alpha_pattern": {"v_proj": 7},
        },
    ),
    "all linear layers": ("qwen2", TWO, {"target_modules": "all-linear"}),
    "an expression, less some": (
        "qwen3",
        TWO,
        {
            "target_modules": r".*\.layers\.\d+\..*_proj",
            "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"],
        },
    ),
    "experts and router": (
        "qwen3_moe",
        TWO,
        {"target_modules": ["o_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    ),
    "one of the experts' tensors": (
        "qwen3_moe",
        TWO,
        {"target_modules": [], "target_parameters": EXPERTS[:1]},
    ),
    "fused projections by key head": (
        "qwen3_next",
        MIXED,
        {
            "target_modules": ["q_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"],
            "target_parameters": [*EXPERTS, "mlp.shared_expert.gate_proj.weight"],
        },
    ),
    "fused projections": ("qwen3_5_text", MIXED, {"target_modules": ["in_proj_qkv", "in_proj_z"]}),
}


def adapt(reference, **fields):
    """PEFT's model with a random adapter that changes much."""
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **fields)
    adapted = peft.get_peft_model(reference, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return adapted


def close(ours, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-5 * max(scale, 1))


def theirs(adapted, ids):
    return reference_logits(adapted.base_model.model, ids)


@pytest.mark.parametrize("name", CASES)
def test_what_peft_wrote_and_what_it_reads_gives_equal_logits(name, tmp_path):
    family, fields, targets = CASES[name]
    reference = random_reference(family, **fields)
    base = save_reference(reference, tmp_path / "base")
    model, params = qwen_jax.load_pretrained(base)
    ids = random_ids(model, (2, 9))
    plain = reference_logits(reference, ids)
    adapted = adapt(reference, **targets)
    adapted.save_pretrained(tmp_path / "theirs")
    expected = theirs(adapted, ids)
    assert np.abs(expected - plain).max() > 0.1

    adapter = load_adapter(tmp_path / "theirs", model.config)
    params = attach(params, adapter)
    logits = model.apply({"params": params}, ids).logits
    close(logits, expected)

    save_adapter(tmp_path / "ours", model.config, params, "base")
    again = peft.PeftModel.from_pretrained(random_reference(family, **fields), tmp_path / "ours")
    close(theirs(again, ids), expected)
    written = safetensors.numpy.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    read = safetensors.numpy.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert written.keys() == read.keys()
    for key, values in read.items():
        np.testing.assert_array_equal(written[key], values, err_msg=key)
    back = load_adapter(tmp_path / "ours", model.config)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)


def random_adapters(params, targets, rank=3):
    options = LoraOptions(rank=rank, alpha=10, targets=targets)
    trained, frozen = partition(add_adapters(params, options, jax.random.key(1)), is_adapter)
    rng = np.random.default_rng(2)
    drawn = jax.tree.map(
        lambda a: (rng.standard_normal(a.shape) / a.shape[-1] ** 0.5).astype(np.float32), trained
    )
    return combine(drawn, frozen)


@pytest.mark.parametrize(
    ("family", "fields", "targets"),
    [
        ("qwen3", TWO, ("layers_0/*/q_proj", "up_proj", "lm_head")),
        ("qwen3_moe", {**TWO, "mlp_only_layers": [0]}, ("mlp/*", "k_proj")),
        (
            "qwen3_next",
            MIXED,
            ("self_attn/gate_proj", "k_proj", "experts/up_proj", "[vb]_proj", "shared_expert*"),
        ),
        ("qwen3_5_moe_text", MIXED, ("linear_attn/*_proj", "mlp/*")),
    ],
)
def test_peft_reads_what_was_trained_apart(family, fields, targets, tmp_path):
    reference = random_reference(family, **fields)
    model, params = qwen_jax.load_pretrained(save_reference(reference, tmp_path / "base"))
    params = random_adapters(params, targets)
    ids = random_ids(model, (2, 9))
    logits = model.apply({"params": params}, ids).logits
    assert np.abs(logits - reference_logits(reference, ids)).max() > 0.1
    save_adapter(tmp_path / "ours", model.config, params)
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "ours")
    close(logits, theirs(adapted, ids))
    adapter = load_adapter(tmp_path / "ours", model.config)
    again = attach(detach(params)[0], adapter)
    close(model.apply({"params": again}, ids).logits, logits)


def test_experts_of_earlier_transformers_are_read(tmp_path):
    """A module for each expert, which PEFT itself turns into parameters of all as it loads them."""
    reference = random_reference("qwen3_moe", **TWO)
    model, params = qwen_jax.load_pretrained(save_reference(reference, tmp_path / "base"))
    ids = random_ids(model, (2, 9))
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for expert in range(6):
            for name, wide in (("gate_proj", True), ("up_proj", True), ("down_proj", False)):
                start = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}.lora_"
                n_out, n_in = (40, 64) if wide else (64, 40)
                tensors[f"{start}A.weight"] = rng.standard_normal((4, n_in), np.float32) / 8
                tensors[f"{start}B.weight"] = rng.standard_normal((n_out, 4), np.float32) / 2
    write(tmp_path, tensors, target_modules=["gate_proj", "up_proj", "down_proj"])
    adapter = load_adapter(tmp_path, model.config)
    logits = model.apply({"params": attach(params, adapter)}, ids).logits
    close(logits, theirs(peft.PeftModel.from_pretrained(reference, tmp_path), ids))

    del tensors["base_model.model.model.layers.1.mlp.experts.4.up_proj.lora_A.weight"]
    del tensors["base_model.model.model.layers.1.mlp.experts.4.up_proj.lora_B.weight"]
    write(tmp_path, tensors, target_modules=["gate_proj", "up_proj", "down_proj"])
    with pytest.raises(UserError, match="5 of the 6 experts of layers_1/mlp/experts/up_proj"):
        load_adapter(tmp_path, model.config)


def write(directory, tensors, **fields):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_reference(random_reference("qwen3", **TWO), directory)
    return directory, *qwen_jax.load_pretrained(directory)


START = "base_model.model.model.layers"


def pair(module, n_out=96, n_in=64, rank=4):
    rng = np.random.default_rng(0)
    return {
        f"{module}.lora_A.weight": rng.standard_normal((rank, n_in), np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((n_out, rank), np.float32),
    }


QUERIES = pair(f"{START}.0.self_attn.q_proj") | pair(f"{START}.1.self_attn.q_proj")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, 'peft_type = "LOHA" is not supported: only LORA is'),
        ({"bias": "all"}, 'bias = "all" is not supported'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa" is not supported'),
        ({"use_dora": True}, "use_dora = true is not supported"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save = \["lm_head"\] is not supported'),
        ({"from_the_future": 3}, "from_the_future = 3 is not supported"),
        ({"lora_bias": True}, "lora_bias = true is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": "four"}, 'r = "four" should be an integer'),
        ({"r": 8}, r"q_proj.lora_A.weight has shape \[4, 64\], the model and rank 8 make it"),
        ({"target_modules": ["k_proj"]}, "q_proj is not among the targets of adapter_config.json"),
        ({"target_modules": ["q_proj", "k_proj"]}, "lacks model.layers.0.self_attn.k_proj"),
        ({"layers_to_transform": 0}, "layers.1.self_attn.q_proj is not among the targets"),
        ({"target_modules": "(q_proj"}, r'target_modules "\(q_proj" is no regular expression'),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern q_proj = -1 should be above 0"),
    ],
)
def test_settings_that_are_not_honoured_are_refused_by_name(small, tmp_path, fields, message):
    write(tmp_path, QUERIES, **{"target_modules": ["q_proj"], **fields})
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path, small[1].config)


def without(name):
    return {key: values for key, values in QUERIES.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no adapter"),
        (without(f"{START}.1.self_attn.q_proj.lora_B.weight"), "1.self_attn.q_proj has no lora_B"),
        ({**QUERIES, "lm_head.base_layer.weight": np.ones(3)}, "lm_head.base_layer.weight is not"),
        (QUERIES | pair(f"{START}.7.self_attn.q_proj"), "7.self_attn.q_proj is no linear layer of"),
        (QUERIES | pair(f"{START}.0.self_attn.q_norm"), "q_norm is not among the targets"),
        (
            QUERIES | pair("base_model.model.layers.0.self_attn.q_proj"),
            "layers.0.self_attn.q_proj is there twice",
        ),
        (
            {key: np.where(values > 2, np.nan, values) for key, values in QUERIES.items()},
            "NaN or infinite values as float32 in .*q_proj.lora_A.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(small, tmp_path, tensors, message):
    write(tmp_path, tensors, target_modules=["q_proj"])
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path, small[1].config)


def test_files_that_are_missing_are_named(small, tmp_path):
    with pytest.raises(UserError, match=r"adapter_config.json: no such file"):
        load_adapter(tmp_path, small[1].config)
    write(tmp_path, QUERIES, target_modules=["q_proj"])
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin is not read; save the adapter as"):
        load_adapter(tmp_path, small[1].config)
    with pytest.raises(UserError, match="no such directory; give that of an adapter"):
        load_adapter(tmp_path / "none", small[1].config)


def test_off_is_not_refused_nor_are_names_of_a_larger_model(small, tmp_path):
    """As later versions of PEFT write what they add, and as adapters of vision models are named."""
    spelled = {
        key.replace("model.layers", "model.language_model.layers"): values
        for key, values in QUERIES.items()
    }
    off = {"from_the_future": None, "another": False, "third": {}, "lora_dropout": 0.05}
    write(tmp_path, spelled, target_modules=["q_proj"], use_dora=False, **off)
    found = dict(low_rank_weights(load_adapter(tmp_path, small[1].config)))
    first = found["layers_0", "self_attn", "q_proj", "weight"]
    np.testing.assert_array_equal(first.a, QUERIES[f"{START}.0.self_attn.q_proj.lora_A.weight"])
    assert first.scale == 1.5


def test_on_a_mesh_an_adapter_lies_and_computes_as_its_weights_do(small, tmp_path):
    base, model, params = small
    write(tmp_path, QUERIES, target_modules=["q_proj"])
    ids = random_ids(model, (2, 9))
    own = attach(params, load_adapter(tmp_path, model.config))
    expected = model.apply({"params": own}, ids).logits
    spread, params = qwen_jax.load_pretrained(base, mesh="fsdp:2,tensor:2")
    adapter = load_adapter(tmp_path, model.config, spread.mesh)
    leaf = adapter["layers_0"]["self_attn"]["q_proj"]["weight"]
    assert leaf.a.addressable_shards[0].data.shape == (4, 32)
    assert leaf.b.addressable_shards[0].data.shape == (48, 4)
    close(spread.apply({"params": attach(params, adapter)}, ids).logits, expected)


def test_what_cannot_be_saved_is_refused(small, tmp_path):
    base, model, params = small
    with pytest.raises(UserError, match="the parameters have no adapter to save"):
        save_adapter(tmp_path / "a", model.config, params)
    adapted = random_adapters(params, ("q_proj",))
    with pytest.raises(UserError, match=f"{base}: exists already"):
        save_adapter(base, model.config, adapted)
    with pytest.raises(UserError, match="has adapters; merge them"):
        save_pretrained(tmp_path / "b", model.config, adapted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_merged_checkpoint_is_the_model_with_its_adapter(family, tmp_path):
    reference = random_reference(family, **TWO)
    base = save_reference(reference, tmp_path / "base")
    model, params = qwen_jax.load_pretrained(base)
    params = random_adapters(params, ("*_proj",))
    save_adapter(tmp_path / "adapter", model.config, params)
    ids = random_ids(model, (1, 9))
    expected = model.apply({"params": params}, ids).logits
    convert(base, tmp_path / "merged", "hf", adapter=tmp_path / "adapter")
    again, merged = qwen_jax.load_pretrained(tmp_path / "merged")
    close(again.apply({"params": merged}, ids).logits, expected)
