"""The way back: between the formats, whole or not at all, and into transformers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
import transformers
from flax.traverse_util import flatten_dict

import qwen_jax
from qwen_jax.checkpoint import reader
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.loading import open_model
from qwen_jax.checkpoint.reader import StoredTensor
from qwen_jax.checkpoint.writer import write_tensors
from qwen_jax.hf_config import load_config
from tests.reference import quiet, random_reference, save_reference

POOLING = '{"pooling_mode_lasttoken": true}'
MODULES = '[{"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def mixed(reference, companions, tmp_path_factory):
    """bfloat16 with float32 norms and one float16 tensor, as no single dtype can say."""
    directory = save_reference(reference, tmp_path_factory.mktemp("mixed"))
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    for name, values in tensors.items():
        if not name.endswith("norm.weight"):
            tensors[name] = values.astype(jnp.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for file, content in companions.items():
        (directory / file).write_bytes(content)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(POOLING)
    for file in ("code.py", "pickle.bin"):
        (directory / "1_Pooling" / file).write_text("not wanted")
    (directory / "modules.json").write_text(MODULES)
    (directory / "modeling_qwen.py").write_text("raise SystemExit")
    (directory / "training_args.bin").write_bytes(b"pickle")
    (directory / ".cache").mkdir()
    return directory


def stored(directory) -> dict[str, np.ndarray]:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def assert_same_bits(ours, expected):
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        assert ours[name].dtype == values.dtype, name
        np.testing.assert_array_equal(ours[name].view(np.uint8), values.view(np.uint8), name)


def assert_companions(directory, companions, source):
    for file, content in companions.items():
        assert (directory / file).read_bytes() == content
    assert (directory / "additional_chat_templates" / "tool.jinja").read_text() == "tool"
    assert (directory / "modules.json").read_text() == MODULES
    assert [path.name for path in (directory / "1_Pooling").iterdir()] == ["config.json"]
    assert (directory / "1_Pooling" / "config.json").read_text() == POOLING
    assert (directory / "config.json").read_bytes() == (source / "config.json").read_bytes()
    left_out = {"modeling_qwen.py", "training_args.bin", ".cache"}
    assert not left_out & {path.name for path in directory.iterdir()}


def load_in_transformers(directory, dtype=None):
    with quiet():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", output_loading_info=True
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("max_shard_size", [10**9, 50_000], ids=["single", "sharded"])
def test_hf_to_hf_keeps_every_bit_and_every_companion(mixed, companions, tmp_path, max_shard_size):
    target = tmp_path / "target"
    written = convert(mixed, target, "hf", max_shard_size=max_shard_size)
    expected = stored(mixed)
    assert_same_bits(stored(target), expected)
    assert_companions(target, companions, mixed)
    assert written.num_tensors == len(expected)
    assert written.num_bytes == sum(values.nbytes for values in expected.values())
    shards = list(target.glob("*.safetensors"))
    assert (len(shards) > 3) == (max_shard_size == 50_000)
    for shard in shards:
        largest = max(values.nbytes for values in safetensors.numpy.load_file(shard).values())
        assert shard.stat().st_size <= max(max_shard_size, largest) + 10_000


def test_hf_to_orbax_to_hf_keeps_every_bit_and_every_companion(mixed, companions, tmp_path):
    convert(mixed, tmp_path / "orbax", "orbax")
    assert_companions(tmp_path / "orbax", companions, mixed)
    assert not list((tmp_path / "orbax").glob("*.safetensors"))
    convert(tmp_path / "orbax", tmp_path / "again", "orbax")
    convert(tmp_path / "again", tmp_path / "back", "hf")
    assert_same_bits(stored(tmp_path / "back"), stored(mixed))
    assert_companions(tmp_path / "back", companions, mixed)


def test_orbax_restores_what_is_written_block_by_block(mixed, tmp_path, monkeypatch):
    """By itself, blocks of zeros included."""
    monkeypatch.setattr(reader, "BLOCK", 1000)
    source = Path(shutil.copytree(mixed, tmp_path / "source"))
    tensors = stored(source)
    tensors[NORM][:] = 0
    tensors[EMBEDDING][3:90] = 0
    safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "orbax", "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((tmp_path / "orbax" / "params").absolute())
    assert_same_bits(
        {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(restored).items()},
        {
            "/".join(path): tensor.read()
            for path, tensor in open_model(load_config(source), source).tensors.items()
        },
    )


def test_float64_survives_orbax(mixed, tmp_path):
    source = Path(shutil.copytree(mixed, tmp_path / "source"))
    tensors = stored(source)
    tensors[NORM] = tensors[NORM].astype(np.float64) / 3
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", "hf")
    assert_same_bits(stored(tmp_path / "back"), tensors)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("max_shard_size", [10**9, 50_000], ids=["single", "sharded"])
def test_what_is_written_loads_in_transformers_bit_by_bit(tmp_path, family, tied, max_shard_size):
    reference = random_reference(family, seed=5, tie_word_embeddings=tied)
    source = save_reference(reference, tmp_path / "source", max_shard_size="60KB")
    convert(source, tmp_path / "orbax", "orbax")
    for name, directory in (("hf", source), ("from orbax", tmp_path / "orbax")):
        convert(directory, tmp_path / name, "hf", max_shard_size=max_shard_size)
    model, params = qwen_jax.load_pretrained(source)
    qwen_jax.save_pretrained(tmp_path / "saved", model.config, params, max_shard_size)
    expected = reference.state_dict()
    for name in ("hf", "from orbax", "saved"):
        found = load_in_transformers(tmp_path / name).state_dict()
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert torch.equal(found[key], values), (name, key)


def test_saved_parameters_keep_their_dtype_in_transformers(mixed, tmp_path):
    """A bfloat16 checkpoint loaded as float32 is written, declared and read as float32."""
    convert(mixed, tmp_path / "bfloat16", "hf", "bfloat16")
    model, params = qwen_jax.load_pretrained(tmp_path / "bfloat16", dtype="float32")
    params["norm"]["weight"] = params["norm"]["weight"] + 1e-6
    qwen_jax.save_pretrained(tmp_path / "saved", model.config, params)
    found = load_in_transformers(tmp_path / "saved").model.norm.weight
    np.testing.assert_array_equal(found.detach().numpy(), params["norm"]["weight"])


def test_a_tensor_of_odd_size_does_not_misalign_a_wider_one(tmp_path):
    narrow, wide = np.ones(3, jnp.bfloat16), np.arange(2, dtype=np.float32)
    tensors = {
        name: StoredTensor(name, None, values.shape, values.dtype, lambda values=values: values)
        for name, values in (("narrow", narrow), ("wide", wide))
    }
    write_tensors(tmp_path, tensors)
    content = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert (8 + size + header["wide"]["data_offsets"][0]) % 4 == 0
    assert_same_bits(stored(tmp_path), {"narrow": narrow, "wide": wide})


def test_jitted_and_bfloat16_trees_are_saved(mixed, tmp_path):
    model, params = qwen_jax.load_pretrained(mixed, dtype="bfloat16")
    params = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree))(params)
    qwen_jax.save_pretrained(tmp_path / "saved", model.config, params)
    back = qwen_jax.load_pretrained(tmp_path / "saved", dtype="bfloat16")[1]
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("target_format", ["hf", "orbax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_casts_every_tensor_and_changes_that_field_only(
    mixed, tmp_path, dtype, target_format
):
    target = tmp_path / "target"
    convert(mixed, target, target_format, dtype)
    before, after = (json.loads((d / "config.json").read_text()) for d in (mixed, target))
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"dtype", "torch_dtype"}
    assert list(after) == list(before)
    assert after.get("dtype", dtype) == after.get("torch_dtype", dtype) == dtype
    if target_format == "orbax":
        convert(target, tmp_path / "hf", "hf")
        target = tmp_path / "hf"
    expected = {name: values.astype(dtype) for name, values in stored(mixed).items()}
    assert_same_bits(stored(target), expected)
    assert load_in_transformers(target).dtype == getattr(torch, dtype)


def test_a_bin_source_and_a_lone_head_are_written_under_the_names_of_transformers(
    reference, tmp_path
):
    source = save_reference(reference, tmp_path / "source")
    (source / "model.safetensors").unlink()
    tensors = {name: values for name, values in reference.state_dict().items() if name != EMBEDDING}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)
    torch.save(tensors, source / "pytorch_model.bin")
    convert(source, tmp_path / "target", "hf")
    found = load_in_transformers(tmp_path / "target").state_dict()
    assert all(torch.equal(found[name], value) for name, value in reference.state_dict().items())
    assert "rotary" not in str(stored(tmp_path / "target").keys())


def test_a_cast_that_overflows_is_refused_and_leaves_nothing(mixed, tmp_path, refused):
    source = Path(shutil.copytree(mixed, tmp_path / "source"))
    tensors = stored(source)
    tensors[NORM][0] = 1e6
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    for target_format in ("hf", "orbax"):
        refused(
            lambda to=target_format: convert(source, tmp_path / "new" / "target", to, "float16"),
            "model.norm.weight" if target_format == "hf" else "norm",
            "float16",
        )
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


BIAS, GATE = "mlp.gate.e_score_correction_bias", "mlp.gate.weight"


@pytest.fixture(params=["qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text"])
def biased(request, tmp_path):
    """A checkpoint whose routers' scores have biases, and these by name."""
    source = save_reference(random_reference(request.param), tmp_path / "biased")
    tensors, rng = stored(source), np.random.default_rng(0)
    gates = [name for name in tensors if name.endswith(GATE)]
    biases = {
        name.removesuffix(GATE) + BIAS: rng.normal(size=6).astype(np.float32) for name in gates
    }
    safetensors.numpy.save_file(tensors | biases, source / "model.safetensors", {"format": "pt"})
    set_field(source, router_score_bias=True)
    return source, biases


def set_field(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_biases_of_routers_scores_come_and_go(biased, tmp_path):
    source, biases = biased
    model, params = qwen_jax.load_pretrained(source)
    assert model.config.moe.score_bias
    found = {
        name: values
        for name, values in flatten_dict(params, sep="/").items()
        if name.endswith("score_bias")
    }
    assert len(biases) == model.config.num_hidden_layers
    assert found.keys() == {
        f"layers_{i}/mlp/gate/score_bias" for i in range(model.config.num_hidden_layers)
    }
    for i, name in enumerate(f"model.layers.{i}.{BIAS}" for i in range(len(biases))):
        np.testing.assert_array_equal(found[f"layers_{i}/mlp/gate/score_bias"], biases[name])
    qwen_jax.save_pretrained(tmp_path / "saved", model.config, params)
    convert(source, tmp_path / "orbax", "orbax")
    for name, directory in (("hf", source), ("from orbax", tmp_path / "orbax")):
        convert(directory, tmp_path / name, "hf")
        assert_same_bits(stored(tmp_path / name), stored(source))
    for name in ("saved", "hf", "from orbax"):
        assert load_config(tmp_path / name).moe == model.config.moe
        tensors = stored(tmp_path / name)
        assert_same_bits({key: tensors[key] for key in tensors if key.endswith(BIAS)}, biases)
        again = qwen_jax.load_pretrained(tmp_path / name)[1]
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_biases_of_routers_scores_are_float32_in_models_of_any_dtype(biased, tmp_path):
    source, biases = biased
    convert(source, tmp_path / "converted", "hf", dtype="bfloat16")
    convert(source, tmp_path / "orbax", "orbax", dtype="bfloat16")
    model, params = qwen_jax.load_pretrained(source, dtype="bfloat16")
    qwen_jax.save_pretrained(tmp_path / "saved", model.config, params)
    for name in ("converted", "saved"):
        tensors = stored(tmp_path / name)
        assert_same_bits({key: tensors[key] for key in biases}, biases)
        others = {tensors[key].dtype.name for key in tensors.keys() - biases.keys()}
        assert others == {"bfloat16"}
        assert load_config(tmp_path / name).dtype == "bfloat16"
    for name, mesh in (("converted", None), ("orbax", None), ("saved", "expert:2")):
        again = qwen_jax.load_pretrained(tmp_path / name, dtype="bfloat16", mesh=mesh)[1]
        jax.tree.map(np.testing.assert_array_equal, again, params)
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), again, params)


def test_a_bias_of_routers_scores_that_is_not_a_number_is_named(biased, tmp_path):
    source, biases = biased
    tensors, name = stored(source), min(biases)
    tensors[name][2] = np.nan
    safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="NaN") as caught:
        convert(source, tmp_path / "converted", "hf", dtype="bfloat16")
    assert name in str(caught[0].message)


@pytest.mark.parametrize("said", [False, None])
def test_biases_of_routers_scores_that_config_json_does_not_tell_of_are_refused(
    biased, refused, said
):
    source, biases = biased
    set_field(source, router_score_bias=said)
    refused(lambda: qwen_jax.load_pretrained(source), str(source), "unknown tensors", min(biases))


def test_biases_of_routers_scores_that_are_not_there_are_refused(biased, refused):
    source, biases = biased
    tensors = {name: values for name, values in stored(source).items() if name not in biases}
    safetensors.numpy.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    refused(lambda: qwen_jax.load_pretrained(source), str(source), "missing tensors", min(biases))


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_a_target_that_exists_is_refused_before_any_work(tmp_path, refused, kind):
    target = tmp_path / "target"
    if kind == "directory":
        target.mkdir()
        (target / "precious").write_text("data")
    elif kind == "file":
        target.write_text("data")
    else:
        target.symlink_to(tmp_path / "nowhere")
    # The source does not exist either, which nobody has looked at yet.
    refused(lambda: convert("/nowhere/at/all", target, "hf"), str(target), "exists already")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("target_format", ["hf", "orbax"])
def test_a_broken_source_leaves_nothing(mixed, tmp_path, refused, target_format):
    source = Path(shutil.copytree(mixed, tmp_path / "source"))
    tensors = stored(source)
    del tensors[NORM]
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    refused(lambda: convert(source, tmp_path / "a" / "b", target_format), NORM)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("target", ["file/below", "/proc/nothing/here"])
def test_a_target_that_cannot_be_written_is_refused(mixed, tmp_path, refused, target):
    (tmp_path / "file").write_text("data")
    refused(lambda: convert(mixed, tmp_path / target, "hf"), target, "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


FULL_DISK = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
runpy.run_module("tools.convert", run_name="__main__")
"""


@pytest.mark.parametrize("target_format", ["hf", "orbax"])
def test_a_full_disk_gives_one_line_and_leaves_nothing(mixed, tmp_path, target_format):
    """A limit on file sizes stands for the full disk."""
    arguments = (f"--source={mixed}", f"--target={tmp_path / 'new' / 'target'}")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments, f"--format={target_format}"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert str(tmp_path / "new" / "target") in done.stderr
    assert "cannot be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


# Stops where the parent wants to kill it: in the middle of the tensors, or with all of them
# written and the directory not yet under its name.
KILLED = """
import pathlib, sys, time
from qwen_jax.checkpoint import conversion, writer, reader

def wait(*_):
    print("now", flush=True)
    time.sleep(600)

source, target, target_format, where = sys.argv[1:]
if where == "tensors":
    opened = conversion.open_model
    def open_model(*arguments):
        model = opened(*arguments)
        middle = sorted(model.tensors)[len(model.tensors) // 2]
        model.tensors[middle] = reader.dataclasses.replace(model.tensors[middle], read=wait)
        return model
    conversion.open_model = open_model
else:
    pathlib.Path.replace = wait
conversion.convert(source, target, target_format)
"""


@pytest.mark.parametrize("where", ["tensors", "rename"])
@pytest.mark.parametrize("target_format", ["hf", "orbax"])
def test_a_killed_conversion_leaves_no_target(mixed, tmp_path, target_format, where):
    target = tmp_path / "target"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, mixed, target, target_format, where],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "now\n"
        assert not target.exists()
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(".target.incomplete-")
        assert (partial / "vocab.json").is_file()
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert not target.exists()
    # What is left does not stand in the way of another try.
    convert(mixed, target, target_format)
    assert (target / "config.json").is_file()
