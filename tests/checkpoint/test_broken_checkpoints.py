"""What is wrong with a checkpoint is said in one line that names the file or the tensor."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

import qwen_jax
from qwen_jax.checkpoint.conversion import convert
from tests.reference import save_reference

NORM = "model.norm.weight"


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of a good checkpoint, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def sharded(reference, tmp_path):
    return save_reference(reference, tmp_path / "model", max_shard_size="60KB")


@pytest.fixture
def bin_directory(copy):
    (copy / "model.safetensors").unlink()
    return copy


def edit(directory, change, file="model.safetensors"):
    tensors = safetensors.numpy.load_file(directory / file)
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
    return directory


def edit_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return directory


def load(directory):
    return lambda: qwen_jax.load_pretrained(directory)


def test_an_unknown_tensor_is_named(copy, refused):
    edit(copy, lambda t: t.__setitem__("model.layers.0.mlp.gate.weight", np.ones(2, np.float32)))
    refused(load(copy), str(copy), "unknown tensors", "model.layers.0.mlp.gate.weight")


def test_a_tensor_whose_name_has_a_line_break_still_gives_one_line(copy, refused):
    edit(copy, lambda t: t.__setitem__("a\nb", np.ones(2, np.float32)))
    refused(load(copy), r"a\nb")


def test_missing_tensors_are_named_and_counted(copy, refused):
    def drop(tensors):
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    edit(copy, drop)
    refused(load(copy), "missing tensors", "model.layers.1.input_layernorm.weight", "and 6 more")


def test_a_misspelt_tensor_is_suggested(copy, refused):
    edit(copy, lambda t: t.__setitem__("model.norm.weigth", t.pop(NORM)))
    refused(load(copy), f"{NORM} (model.norm.weigth is there instead)")


def test_a_misshapen_tensor_is_named_with_both_shapes(copy, refused):
    edit(copy, lambda t: t.__setitem__(NORM, np.ones(63, np.float32)))
    refused(load(copy), "model.safetensors", NORM, "[63]", "[64]")


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (np.int64, "save it as one of F64, F32"),
        (np.bool_, "save it as one of F64, F32"),
        (np.int8, "no quantization_config"),
        (np.uint8, "no quantization_config"),
    ],
)
def test_integer_tensors_are_refused(copy, refused, dtype, says):
    edit(copy, lambda t: t.__setitem__(NORM, np.ones(64, dtype)))
    refused(load(copy), NORM, "is stored as", says)


def test_a_tensor_in_two_shards_is_named_with_both(sharded, refused):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    home = index[NORM]
    other = next(file for file in index.values() if file != home)
    edit(sharded, lambda t: t.__setitem__(NORM, np.ones(64, np.float32)), other)
    refused(load(sharded), NORM, home, other, "keep one")


def test_a_missing_shard_is_named(sharded, refused):
    shard = max(sharded.glob("model-*.safetensors"))
    shard.unlink()
    refused(load(sharded), "index.json", shard.name, "missing")


@pytest.mark.parametrize("inside", ["{name}", "../outside/{name}", "/{name}", "..", "a\\b", ""])
def test_an_index_reaches_no_file_outside_its_directory(sharded, refused, inside):
    outside = sharded.parent / "outside"
    outside.mkdir()
    shard = min(sharded.glob("model-*.safetensors"))
    shard.rename(outside / shard.name)
    file = str(outside / shard.name) if inside == "{name}" else inside.format(name=shard.name)

    def redirect(index):
        for name, home in index["weight_map"].items():
            if home == shard.name:
                index["weight_map"][name] = file

    edit_index(sharded, redirect)
    refused(load(sharded), "index.json", "is not a file name in this directory")


def test_a_tensor_that_its_shard_lacks_is_named(sharded, refused):
    edit_index(sharded, lambda index: index["weight_map"].__setitem__("more", max(
        index["weight_map"].values())))  # fmt: skip
    refused(load(sharded), "tensor more is not in model-")


def test_a_tensor_that_the_index_lacks_is_named(sharded, refused):
    edit_index(sharded, lambda index: index["weight_map"].pop(NORM))
    refused(load(sharded), f"tensor {NORM} is not in model.safetensors.index.json")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{" * 9999]
)
def test_a_broken_index_is_refused(sharded, refused, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(load(sharded), "model.safetensors.index.json")


@pytest.mark.parametrize("size", [0, 4, 100, -1, -5000])
def test_a_truncated_safetensors_file_is_refused(copy, refused, size):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    refused(load(copy), "model.safetensors", "broken or truncated")


@pytest.mark.parametrize("content", [b"garbage" * 100, b"\xff" * 64, b"\x02" + bytes(7) + b"[]"])
def test_a_garbage_safetensors_file_is_refused(copy, refused, content):
    (copy / "model.safetensors").write_bytes(content)
    refused(load(copy), "model.safetensors", "broken or truncated")


def test_an_empty_directory_is_refused(tmp_path, refused):
    refused(load(tmp_path), "the directory is empty")


def test_a_directory_without_weights_is_refused(copy, refused):
    (copy / "model.safetensors").unlink()
    refused(load(copy), "no weights", "model.safetensors")


def test_a_missing_directory_is_refused(tmp_path, refused):
    refused(load(tmp_path / "nothing"), "no such directory")


def test_a_directory_without_config_json_is_refused(copy, refused):
    (copy / "config.json").unlink()
    refused(load(copy), f"{copy}: holds no config.json", "give the directory of a checkpoint")


def test_a_source_that_is_no_path_is_refused(refused):
    refused(load(None), "the source is a NoneType", "hub id")


@pytest.mark.parametrize("tower", [False, True])
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(copy, companions, refused, tower):
    for name, content in companions.items():
        (copy / name).write_bytes(content)
    qwen_jax.load_tokenizer(copy)
    size = {"vocab_size": 256}
    config = {"model_type": "qwen3_5", "text_config": size} if tower else size
    (copy / "config.json").write_text(json.dumps(config))
    refused(lambda: qwen_jax.load_tokenizer(copy), "id 256", "vocab_size is 256")


def test_a_file_given_as_source_is_refused(copy, refused):
    refused(load(copy / "model.safetensors"), "is a file")


class Malicious:
    """Unpickled, it creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_bin_file_that_would_run_code_is_refused_and_does_not(
    bin_directory, refused, tmp_path, zipped
):
    proof = tmp_path / "proof"
    content = {NORM: torch.ones(2), "more": Malicious(proof)}
    path = bin_directory / "pytorch_model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(load(bin_directory), "pytorch_model.bin")
    assert not proof.exists()
    # The trap works: trusting the file springs it.
    torch.load(path, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize("value", [3, "text", [1.0], {"a": torch.ones(1)}, None])
def test_a_bin_file_with_more_than_tensors_is_refused(bin_directory, refused, value):
    torch.save({NORM: torch.ones(64), "more": value}, bin_directory / "pytorch_model.bin")
    refused(load(bin_directory), "pytorch_model.bin", "entry 'more'", "not a tensor")


def test_a_bin_file_that_holds_no_dict_is_refused(bin_directory, refused):
    torch.save(torch.ones(3), bin_directory / "pytorch_model.bin")
    refused(load(bin_directory), "pytorch_model.bin", "holds a Tensor")


def test_integers_in_a_bin_file_are_refused(bin_directory, refused):
    torch.save({NORM: torch.ones(64, dtype=torch.int64)}, bin_directory / "pytorch_model.bin")
    refused(load(bin_directory), NORM, "torch.int64")


@pytest.mark.parametrize("how", ["truncated", "garbage", "empty"])
def test_a_broken_bin_file_is_refused(bin_directory, refused, how):
    path = bin_directory / "pytorch_model.bin"
    torch.save({NORM: torch.ones(64)}, path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:200], "garbage": b"x" * 99, "empty": b""}[how])
    refused(load(bin_directory), "pytorch_model.bin")


@pytest.fixture
def orbax_directory(saved, tmp_path):
    convert(saved, tmp_path / "orbax", "orbax")
    return tmp_path / "orbax"


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "_METADATA").unlink(),
        lambda d: (d / "_METADATA").write_text("{"),
        lambda d: (d / "_CHECKPOINT_METADATA").unlink(),
        lambda d: (d / "manifest.ocdbt").unlink(),
        lambda d: (d / "manifest.ocdbt").write_bytes(b"garbage"),
        lambda d: shutil.rmtree(d / "d"),
        lambda d: [f.write_bytes(f.read_bytes()[:-9]) for f in d.glob("ocdbt.process_0/d/*")],
        lambda d: [f.unlink() for f in d.rglob("d/*")],
    ],
    ids=["no metadata", "broken metadata", "no checkpoint metadata", "no manifest",
         "broken manifest", "no index", "truncated data", "no data"],
)  # fmt: skip
def test_a_broken_orbax_directory_is_refused(orbax_directory, saved, refused, damage):
    damage(orbax_directory / "params")
    try:
        _, params = qwen_jax.load_pretrained(orbax_directory)
    except qwen_jax.UserError:
        refused(load(orbax_directory), str(orbax_directory / "params"), "Orbax")
    else:
        # Orbax keeps some of its books twice.
        expected = qwen_jax.load_pretrained(saved)[1]
        for path in (("norm", "weight"), ("embed_tokens", "weight")):
            np.testing.assert_array_equal(params[path[0]][path[1]], expected[path[0]][path[1]])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_hidden_layers": 4}, "missing parameters for qwen3: layers_3/"),
        ({"num_hidden_layers": 2}, "unknown parameters for qwen3: layers_2/"),
        ({"intermediate_size": 80}, "parameter layers_0/mlp/"),
        ({"tie_word_embeddings": False}, "missing parameters for qwen3: lm_head/weight"),
    ],
)
def test_an_orbax_tree_of_another_model_is_refused(orbax_directory, refused, change, part):
    path = orbax_directory / "config.json"
    config = {**json.loads(path.read_text()), **change}
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))
    refused(load(orbax_directory), part)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda p: p["norm"].pop("weight"), "missing parameters for qwen3: norm/weight"),
        (lambda p: p.__setitem__("more", jnp.ones(2)), "unknown parameters for qwen3: more"),
        (lambda p: p["norm"].__setitem__("weight", jnp.ones(3)), "norm/weight has shape [3]"),
        (lambda p: p["norm"].__setitem__("weight", 1.0), "norm/weight has no array"),
    ],
    ids=["missing", "unknown", "misshapen", "no array"],
)
def test_a_tree_that_is_not_the_configs_is_not_saved(saved, tmp_path, refused, change, part):
    model, params = qwen_jax.load_pretrained(saved)
    change(params)
    target = tmp_path / "target"
    refused(lambda: qwen_jax.save_pretrained(target, model.config, params), part)
    assert list(tmp_path.iterdir()) == []
