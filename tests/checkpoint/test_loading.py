"""Formats, dtypes, tied tables and values: what is loaded equals the state dict bit by bit."""

import json
import shutil
import sys
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

import qwen_jax
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.names import leaf_at, regions
from tests.reference import random_reference, reference_logits, save_reference

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def bits(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(np.asarray(values)).view(np.uint8)


def assert_equals_state_dict(model, params, state_dict, dtype=torch.float32):
    names = {region.name: region.path for region in regions(model.config)}
    assert len(jax.tree.leaves(params)) == len(names)
    for name, path in names.items():
        leaf = leaf_at(params, path)
        expected = state_dict[name].to(dtype)
        assert leaf.shape == tuple(expected.shape), name
        np.testing.assert_array_equal(bits(leaf), bits(expected), name)


def rewrite(directory, target, change):
    """A copy of a checkpoint directory after `change` of its tensors, a dict that it edits."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors = change(tensors) or tensors
    safetensors.numpy.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture
def changed(saved, tmp_path):
    return lambda change: rewrite(saved, tmp_path / "changed", change)


def single(model, directory):
    save_reference(model, directory)


def sharded(model, directory):
    save_reference(model, directory, max_shard_size="60KB")
    assert (directory / "model.safetensors.index.json").is_file()


def single_bin(model, directory):
    save_reference(model, directory)
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")


def sharded_bin(model, directory):
    save_reference(model, directory)
    (directory / "model.safetensors").unlink()
    state_dict = model.state_dict()
    names = sorted(state_dict)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, held in shards.items():
        torch.save({name: state_dict[name] for name in held}, directory / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", [single, sharded, single_bin, sharded_bin])
def test_parameters_and_logits_equal_the_reference(form, tied, tmp_path):
    reference = random_reference("qwen2", seed=3, tie_word_embeddings=tied)
    form(reference, tmp_path)
    model, params = qwen_jax.load_pretrained(tmp_path)
    assert_equals_state_dict(model, params, reference.state_dict())
    ids = np.arange(24)[None]
    logits = model.apply({"params": params}, ids).logits
    np.testing.assert_allclose(logits, reference_logits(reference, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("to", TORCH_DTYPES)
@pytest.mark.parametrize("stored", TORCH_DTYPES)
def test_every_pair_of_dtypes_is_cast_as_torch_casts(reference, stored, to, tmp_path):
    copy = random_reference("qwen3", tie_word_embeddings=True).to(TORCH_DTYPES[stored])
    save_reference(copy, tmp_path)
    model, params = qwen_jax.load_pretrained(tmp_path, dtype=to)
    assert_equals_state_dict(model, params, copy.state_dict(), TORCH_DTYPES[to])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {to}


def test_float64_tensors_are_read(saved, changed):
    directory = changed(lambda t: {name: value.astype(np.float64) for name, value in t.items()})
    ours, expected = qwen_jax.load_pretrained(directory)[1], qwen_jax.load_pretrained(saved)[1]
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_safetensors_are_preferred_to_bin(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"garbage")
    qwen_jax.load_pretrained(tmp_path / "both")


def test_without_torch_a_bin_file_is_refused_in_one_line(reference, tmp_path, refused, monkeypatch):
    single_bin(reference, tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(lambda: qwen_jax.load_pretrained(tmp_path), "pytorch_model.bin", "pip install torch")


def test_a_bin_file_that_shares_storage_loads(reference, tmp_path):
    single_bin(reference, tmp_path)
    state_dict = torch.load(tmp_path / "pytorch_model.bin")
    assert state_dict[HEAD].data_ptr() == state_dict[EMBEDDING].data_ptr()
    model, params = qwen_jax.load_pretrained(tmp_path)
    assert_equals_state_dict(model, params, reference.state_dict())


def test_rope_scaling_and_dtype_given_as_arguments_are_used(saved):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model, params = qwen_jax.load_pretrained(saved, dtype="bfloat16", rope_scaling=yarn)
    assert model.config.rope.factor == 4.0
    assert jax.tree.leaves(params)[0].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", ["float64", "int8", "half", np.int32])
def test_an_unknown_dtype_is_refused(saved, refused, dtype):
    refused(lambda: qwen_jax.load_pretrained(saved, dtype=dtype), "dtype", "float32, bfloat16")


def test_a_tied_model_without_its_second_copy_loads(saved, reference):
    assert HEAD not in safetensors.numpy.load_file(saved / "model.safetensors")
    model, params = qwen_jax.load_pretrained(saved)
    assert "lm_head" not in params
    assert_equals_state_dict(model, params, reference.state_dict())


def test_a_tied_model_with_an_equal_second_copy_loads(changed, reference):
    # NaN must not make a table differ from itself.
    def copy(tensors):
        tensors[EMBEDDING][0, 0] = np.nan
        tensors[HEAD] = tensors[EMBEDDING].copy()

    with pytest.warns(UserWarning, match="embed_tokens"):
        _, params = qwen_jax.load_pretrained(changed(copy))
    np.testing.assert_array_equal(
        params["embed_tokens"]["weight"][1:], reference.model.embed_tokens.weight.detach()[1:]
    )


def test_a_tied_model_with_only_its_head_loads(changed, reference):
    directory = changed(lambda t: t.__setitem__(HEAD, t.pop(EMBEDDING)))
    model, params = qwen_jax.load_pretrained(directory)
    assert_equals_state_dict(model, params, reference.state_dict())


@pytest.mark.parametrize(
    "differ",
    [
        lambda table: np.concatenate([table[:-1], table[-1:] + 1]),
        lambda table: table[:-1],
        lambda table: table.astype(np.float16),
    ],
    ids=["value", "shape", "dtype"],
)
def test_a_tied_model_with_another_second_copy_is_refused(changed, refused, differ):
    directory = changed(lambda t: t.__setitem__(HEAD, differ(t[EMBEDDING])))
    refused(lambda: qwen_jax.load_pretrained(directory), HEAD, EMBEDDING, "tie_word_embeddings")


def test_old_rotary_buffers_are_accepted(changed, reference):
    def add(tensors):
        for i in range(3):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(12, np.float32)

    model, params = qwen_jax.load_pretrained(changed(add))
    assert_equals_state_dict(model, params, reference.state_dict())


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_nonfinite_weights_are_warned_of_or_refused_by_name(
    saved, tmp_path, refused, dtype, value, layout
):
    def spoil(tensors):
        tensors = {name: values.astype(dtype) for name, values in tensors.items()}
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = value
        return tensors

    directory = rewrite(saved, tmp_path / "spoilt", spoil)
    if layout == "orbax":
        convert(directory, tmp_path / "orbax", "orbax")
        directory = tmp_path / "orbax"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, params = qwen_jax.load_pretrained(directory, dtype=dtype)
    (message,) = [str(w.message) for w in caught if w.category is UserWarning]
    assert "up_proj" in message and "down_proj" not in message and message.isprintable()
    np.testing.assert_array_equal(
        np.float32(params["layers_1"]["mlp"]["up_proj"]["weight"][-1, -1]), np.float32(value)
    )
    refused(
        lambda: qwen_jax.load_pretrained(directory, dtype=dtype, allow_nonfinite=False),
        "up_proj",
        "NaN or infinite",
    )


def test_finite_weights_are_not_warned_of_though_their_squares_overflow(changed):
    directory = changed(lambda t: {**t, EMBEDDING: t[EMBEDDING] * np.float32(1e30)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        qwen_jax.load_pretrained(directory, allow_nonfinite=False)


def test_overflow_in_a_cast_to_float16_is_reported_by_name(changed, refused):
    def grow(tensors):
        tensors["model.norm.weight"][3] = 70000.0

    directory = changed(grow)
    qwen_jax.load_pretrained(directory, allow_nonfinite=False)
    with pytest.warns(UserWarning, match=r"as float16 in model\.norm\.weight;"):
        qwen_jax.load_pretrained(directory, dtype="float16")
    refused(
        lambda: qwen_jax.load_pretrained(directory, dtype="float16", allow_nonfinite=False),
        "model.norm.weight",
    )


def test_no_progress_bar_is_printed_where_stderr_is_not_a_terminal(saved, capfd):
    qwen_jax.load_pretrained(saved)
    assert capfd.readouterr() == ("", "")
