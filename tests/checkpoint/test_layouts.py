"""Experts one by one or all in one tensor, grouped projections, towers: each layout both ways."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

import qwen_jax
from qwen_jax.checkpoint import conversion
from qwen_jax.checkpoint.conversion import convert
from tests.checkpoint.test_conversion import assert_same_bits, load_in_transformers, stored
from tests.checkpoint.test_loading import rewrite
from tests.reference import random_reference, reference_logits, save_reference

SPARSE = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text")
FIELDS = {
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_5_text": {"tie_word_embeddings": True},
    "qwen3_next": {"decoder_sparse_step": 2, "attention_bias": True},
}
LAYER = "model.layers.1.mlp.experts"
NORMS = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")


@pytest.fixture(scope="module", params=[*SPARSE, "qwen3_5_text"])
def family(request, tmp_path_factory):
    """A random model of each family, and what transformers writes of it."""
    reference = random_reference(request.param, seed=9, **FIELDS.get(request.param, {}))
    return reference, save_reference(reference, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A model of two sparse layers in the layout with a tensor for each expert."""
    reference = random_reference("qwen3_moe", seed=4, num_hidden_layers=2)
    return reference, save_reference(reference, tmp_path_factory.mktemp("sparse"))


def write_fused(reference, source, target):
    """The checkpoint `source` in the layout in which transformers holds it in memory."""
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    tensors = reference.state_dict()
    if reference.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_trees_equal(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_what_is_written_loads_in_transformers_bit_by_bit(family, tmp_path):
    reference, source = family
    fused = write_fused(reference, source, tmp_path / "fused")
    model, params = qwen_jax.load_pretrained(source)
    assert_trees_equal(qwen_jax.load_pretrained(fused)[1], params)
    convert(fused, tmp_path / "orbax", "orbax")
    assert_trees_equal(qwen_jax.load_pretrained(tmp_path / "orbax")[1], params)
    for name, directory in (("hf", source), ("unfused", fused), ("back", tmp_path / "orbax")):
        written = convert(directory, tmp_path / name, "hf")
        assert_same_bits(stored(tmp_path / name), stored(source))
        assert written.num_left_out == 0
    qwen_jax.save_pretrained(tmp_path / "saved", model.config, params)
    assert_same_bits(stored(tmp_path / "saved"), stored(source))
    expected = reference.state_dict()
    found = load_in_transformers(tmp_path / "saved")
    assert type(found) is type(reference)
    assert found.state_dict().keys() == expected.keys()
    for key, values in expected.items():
        assert torch.equal(found.state_dict()[key], values), key
    # By config.json too it is the same model.
    ids = np.arange(20)[None]
    np.testing.assert_allclose(
        reference_logits(found, ids), reference_logits(reference, ids), rtol=0, atol=1e-5
    )


def test_a_layout_may_change_from_layer_to_layer(sparse, tmp_path):
    reference, source = sparse
    fused = stored(write_fused(reference, source, tmp_path / "fused"))

    def fuse_layer(tensors):
        kept = {name: values for name, values in tensors.items() if not name.startswith(LAYER)}
        return kept | {name: values for name, values in fused.items() if name.startswith(LAYER)}

    directory = rewrite(source, tmp_path / "mixed", fuse_layer)
    assert_trees_equal(qwen_jax.load_pretrained(directory)[1], qwen_jax.load_pretrained(source)[1])


def test_a_prediction_head_may_have_another_layout_than_the_layers(tmp_path):
    """As published with all experts in one tensor, and its head quantised or trained apart."""
    reference = random_reference("qwen3_5_moe_text", num_hidden_layers=2, full_attention_interval=2)
    source = save_reference(reference, tmp_path / "source")
    apart = stored(source)
    last = "model.layers.1."

    def add(tensors):
        head = {name.replace("model.layers.1.", "mtp.layers.0."): v for name, v in apart.items()}
        tensors |= {name: v for name, v in head.items() if name.startswith("mtp.")}
        tensors |= {f"mtp.{n}.weight": np.ones(64, np.float32) for n in NORMS}
        tensors["mtp.fc.weight"] = np.ones((64, 128), np.float32)

    fused = write_fused(reference, source, tmp_path / "fused")
    assert f"{last}mlp.experts.gate_up_proj" in stored(fused)
    assert f"{last}mlp.experts.0.up_proj.weight" in apart
    model, params = qwen_jax.load_pretrained(rewrite(fused, tmp_path / "headed", add))
    assert model.config.mtp_layers == 1
    assert_trees_equal(params["mtp"]["layers_0"], params["layers_1"])
    qwen_jax.save_pretrained(tmp_path / "saved", model.config, params)
    back = stored(tmp_path / "saved")
    assert_same_bits({name: v for name, v in back.items() if "mtp" not in name}, apart)
    assert load_in_transformers(tmp_path / "saved").num_parameters() == reference.num_parameters()


def fused_copy(tensors):
    gate, up, down = (
        np.stack([tensors[f"{LAYER}.{e}.{name}.weight"] for e in range(6)])
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    tensors |= {f"{LAYER}.gate_up_proj": np.concatenate([gate, up], 1), f"{LAYER}.down_proj": down}


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda t: t.pop(f"{LAYER}.3.up_proj.weight"), [f"{LAYER}.3.up_proj.weight", "missing"]),
        (
            lambda t: t.__setitem__(f"{LAYER}.6.up_proj.weight", t[f"{LAYER}.5.up_proj.weight"]),
            [f"{LAYER}.6.up_proj.weight", "unknown"],
        ),
        (
            lambda t: t.__setitem__(f"{LAYER}.2.up_proj.weight", np.ones((40, 63), np.float32)),
            [f"{LAYER}.2.up_proj.weight", "[40, 63]", "[40, 64]"],
        ),
        (
            lambda t: t.__setitem__("model.layers.1.mlp.gate.weight", np.ones((5, 64), np.float32)),
            ["model.layers.1.mlp.gate.weight", "[5, 64]", "[6, 64]"],
        ),
        (fused_copy, [f"{LAYER}.0.", "unknown"]),
    ],
    ids=["missing", "one too many", "misshapen", "misshapen router", "both layouts"],
)
def test_experts_that_do_not_fit_are_refused_by_name(sparse, tmp_path, refused, spoil, names):
    directory = rewrite(sparse[1], tmp_path / "spoilt", lambda tensors: (spoil(tensors), None)[1])
    refused(lambda: qwen_jax.load_pretrained(directory), *names)


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda t: t.pop(f"{LAYER}.down_proj"), [f"{LAYER}.down_proj", "missing"]),
        (
            # As some vision-language models of the family before have it.
            lambda t: t.__setitem__(
                f"{LAYER}.down_proj", t[f"{LAYER}.down_proj"].swapaxes(1, 2).copy()
            ),
            [f"{LAYER}.down_proj", "[6, 40, 64]", "[6, 64, 40]"],
        ),
        (
            lambda t: t.__setitem__(f"{LAYER}.gate_up_proj", t[f"{LAYER}.gate_up_proj"][:5].copy()),
            [f"{LAYER}.gate_up_proj", "[5, 80, 64]", "[6, 80, 64]"],
        ),
    ],
    ids=["missing", "transposed", "too few"],
)
def test_fused_experts_that_do_not_fit_are_refused_by_name(sparse, tmp_path, refused, spoil, names):
    fused = write_fused(*sparse, tmp_path / "fused")
    directory = rewrite(fused, tmp_path / "spoilt", lambda tensors: (spoil(tensors), None)[1])
    refused(lambda: qwen_jax.load_pretrained(directory), *names)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("linear_attn.in_proj_qkvz.weight", (287, 64)),
        ("linear_attn.in_proj_ba.weight", (13, 64)),
        ("linear_attn.conv1d.weight", (168, 4)),
        ("linear_attn.A_log", (5,)),
        ("linear_attn.dt_bias", (6, 1)),
        ("mlp.shared_expert_gate.weight", (64,)),
    ],
)
def test_misshapen_tensors_of_a_hybrid_are_refused_by_name(tmp_path, refused, name, shape):
    kinds = ["linear_attention", "full_attention"]
    reference = random_reference("qwen3_next", num_hidden_layers=2, layer_types=kinds)
    source = save_reference(reference, tmp_path / "source")
    name = f"model.layers.0.{name}"

    def spoil(tensors):
        assert name in tensors
        tensors[name] = np.ones(shape, np.float32)

    directory = rewrite(source, tmp_path / "spoilt", spoil)
    refused(lambda: qwen_jax.load_pretrained(directory), f"tensor {name} ", str(list(shape)))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("layout", ["single", "fused", "orbax"])
def test_converting_reads_every_parameter_once(sparse, tmp_path, monkeypatch, layout, dtype):
    """An expert's tensor is not cut out of a whole that is read again for each."""
    reference, source = sparse
    if layout == "fused":
        source = write_fused(reference, source, tmp_path / "fused")
    elif layout == "orbax":
        convert(source, tmp_path / "orbax", "orbax")
        source = tmp_path / "orbax"
    reads = []

    def counted(tensor):
        def read(index=()):
            reads.append(tensor.name)
            return tensor.read(index)

        if tensor.parts:
            return conversion.stack([counted(part) for part in tensor.parts])
        return conversion.dataclasses.replace(tensor, read=read)

    opened = conversion.open_model

    def open_model(*arguments):
        model = opened(*arguments)
        tensors = {path: counted(tensor) for path, tensor in model.tensors.items()}
        return conversion.dataclasses.replace(model, tensors=tensors)

    monkeypatch.setattr(conversion, "open_model", open_model)
    written = convert(source, tmp_path / "target", "hf", dtype)
    whole = 2 * 3 * 5  # the projections of two layers beyond the first of six experts
    assert len(reads) == written.num_tensors - (0 if layout == "single" else whole)


VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
ROPE = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 2, 2],
    "mrope_interleaved": True,
}


@pytest.fixture(
    scope="module",
    params=[("qwen3_5", False), ("qwen3_5", True), ("qwen3_5_moe", False)],
    ids=["dense", "dense tied", "sparse"],
)
def seeing(request, tmp_path_factory):
    """A vision-language model with a random text tower, and what transformers writes of it."""
    name, tied = request.param
    text = random_reference(f"{name}_text", seed=3, rope_parameters=ROPE, tie_word_embeddings=tied)
    config = transformers.AutoConfig.for_model(
        name,
        text_config=text.config.to_dict(),
        vision_config=VISION,
        tie_word_embeddings=tied,
        eos_token_id=[7, 9],
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model = model.eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return model, text, save_reference(model, tmp_path_factory.mktemp("seeing"))


def text_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids), use_cache=False).logits.numpy()


def test_the_text_tower_of_a_vision_language_model_loads(seeing):
    reference, text, directory = seeing
    names = stored(directory)
    assert any(name.startswith("model.visual.") for name in names)
    assert any(name.startswith("model.language_model.layers.3.") for name in names)
    model, params = qwen_jax.load_pretrained(directory)
    assert model.config.rope.mrope_section == (2, 2, 2)
    ids = np.random.default_rng(0).integers(0, 320, (2, 70))
    logits = model.apply({"params": params}, ids).logits
    np.testing.assert_allclose(logits, text_logits(reference, ids), rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, reference_logits(text, ids), rtol=0, atol=1e-4)


def test_the_text_tower_of_a_model_without_a_head_loads(seeing, tmp_path):
    reference, text, _ = seeing
    directory = save_reference(reference.model, tmp_path / "bare")
    assert any(name.startswith("language_model.layers.") for name in stored(directory))
    model, params = qwen_jax.load_pretrained(directory)
    ids = np.arange(20)[None]
    out = model.apply({"params": params}, ids)
    assert out.logits is None
    with torch.no_grad():
        expected = text.model(torch.as_tensor(ids), use_cache=False).last_hidden_state
    np.testing.assert_allclose(out.hidden_states[-1], expected, rtol=0, atol=1e-4)
    convert(directory, tmp_path / "text", "hf")
    assert_trees_equal(qwen_jax.load_pretrained(tmp_path / "text")[1], params)


def test_a_vision_language_model_is_converted_to_its_text_tower(seeing, tmp_path):
    reference, text, directory = seeing
    (directory / "preprocessor_config.json").write_text("{}")
    params = qwen_jax.load_pretrained(directory)[1]
    convert(directory, tmp_path / "orbax", "orbax")
    for source, target in ((directory, "hf"), (tmp_path / "orbax", "back")):
        written = convert(source, tmp_path / target, "hf")
        towers = sum(name.startswith("model.visual.") for name in stored(directory))
        assert written.num_left_out == (towers if source is directory else 0)
        found = load_in_transformers(tmp_path / target)
        assert type(found) is type(text)
        expected = text.state_dict()
        assert found.state_dict().keys() == expected.keys()
        for key, values in expected.items():
            assert torch.equal(found.state_dict()[key], values), key
        assert found.config.rope_parameters["mrope_section"] == [2, 2, 2]
        assert found.config.eos_token_id == [7, 9]
        loaded = qwen_jax.load_pretrained(tmp_path / target)[1]
        assert_trees_equal(loaded, params)
    assert_trees_equal(qwen_jax.load_pretrained(tmp_path / "orbax")[1], params)
    # What transformers loads as the tower alone is the tower in the whole.
    ids = np.arange(20)[None]
    np.testing.assert_allclose(
        reference_logits(found, ids), text_logits(reference, ids), rtol=0, atol=1e-5
    )


def test_the_field_of_the_whole_model_decides_whether_the_head_is_tied(seeing, tmp_path, refused):
    reference, _, directory = seeing
    tied = reference.config.tie_word_embeddings
    raw = json.loads((directory / "config.json").read_text())
    assert raw["tie_word_embeddings"] is tied
    raw["text_config"]["tie_word_embeddings"] = not tied
    shutil.copytree(directory, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw))
    model, params = qwen_jax.load_pretrained(tmp_path / "other")
    assert model.config.tie_word_embeddings is tied
    assert ("lm_head" in params) is not tied
    raw["tie_word_embeddings"] = not tied
    raw["text_config"]["tie_word_embeddings"] = tied
    (tmp_path / "other" / "config.json").write_text(json.dumps(raw))
    words = ["lm_head.weight", "missing" if tied else "tie_word_embeddings"]
    refused(lambda: qwen_jax.load_pretrained(tmp_path / "other"), *words)


def test_a_tensor_under_two_beginnings_is_refused(seeing, tmp_path, refused):
    *_, directory = seeing
    name = "layers.0.input_layernorm.weight"

    def repeat(tensors):
        tensors[f"model.{name}"] = tensors[f"model.language_model.{name}"]

    spoilt = rewrite(directory, tmp_path / "spoilt", repeat)
    refused(
        lambda: qwen_jax.load_pretrained(spoilt),
        f"model.{name}",
        f"model.language_model.{name}",
        "the same tensor",
    )
