"""Parameters spread over a mesh: the same bits as on one device, of slices that alone are read.

A child process has 8 virtual devices, which have to be asked for before JAX starts; it runs every
case on checkpoints that this process has written, and writes down what failed.
"""

import functools
import json
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import qwen_jax
from qwen_jax.checkpoint import reader
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.loading import open_model
from qwen_jax.checkpoint.names import leaf_at, regions
from qwen_jax.checkpoint.orbax_format import save_orbax
from qwen_jax.checkpoint.reader import StoredTensor
from qwen_jax.checkpoint.regions import stored_shape
from qwen_jax.hf_config import read_hf_config
from qwen_jax.models.decoder import parameter_shapes
from qwen_jax.nn.quantized import QuantizedWeight
from qwen_jax.sharding import axes

ROOT = Path(__file__).parents[2]
MESHES = ("fsdp:4,tensor:2", "expert:2,fsdp:2,tensor:2")
SMALL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 56}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
}
QWEN1 = {
    "model_type": "qwen",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "max_position_embeddings": 256,
    "seq_length": 256,
    "layer_norm_epsilon": 1e-6,
}
# Name of a checkpoint, with "fused" in it where a layer's experts are in one tensor -> its fields.
LAYOUTS = {
    "one stack of queries, keys and values": QWEN1,
    "biases": {**SMALL, "model_type": "qwen2"},
    "tied": {**SMALL, "model_type": "qwen3", "tie_word_embeddings": True},
    "one head of keys": {**SMALL, "model_type": "qwen3", "num_key_value_heads": 1},
    "experts": {**SMALL, **EXPERTS, "model_type": "qwen3_moe"},
    "fused experts": {**SMALL, **EXPERTS, "model_type": "qwen3_moe"},
    "grouped hybrid": {**SMALL, **SHARED, **HYBRID, "model_type": "qwen3_next"},
    "flat hybrid": {**SMALL, **HYBRID, "model_type": "qwen3_5_text"},
    "flat fused hybrid": {**SMALL, **SHARED, **HYBRID, "model_type": "qwen3_5_moe_text"},
}
# Of each: bits, inputs of a group.
QUANTISED = {"gptq": (4, 16), "gptq in another order": (8, 16), "awq": (4, 16), "fp8": (8, 16),
             "own 4 bits": (4, 16), "own 8 bits": (8, 16)}  # fmt: skip
CASES = {}


def write_checkpoint(fields, directory, dtype="float32", fused=False):
    """Random numbers under the names that the tables give."""
    config = read_hf_config(fields)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**fields, "torch_dtype": dtype}))
    found = regions(config)
    if fused:
        found = regions(config, {f"model.layers.{i}." for i in range(config.num_hidden_layers)})
    shapes, rng = parameter_shapes(config), np.random.default_rng(0)
    wanted = {r.name: stored_shape(r, leaf_at(shapes, r.path).shape) for r in found}
    tensors = {n: rng.standard_normal(s, np.float32).astype(dtype) for n, s in wanted.items()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def write_quantised(kind, directory, group):
    """Random pieces in place of the large matrices."""
    method, (bits, _) = kind.split()[0], QUANTISED[kind]
    directory = write_checkpoint({**SMALL, "model_type": "qwen3"}, directory)
    rng = np.random.default_rng(1)
    pieces = {}
    for name, tensor in safetensors.numpy.load_file(directory / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            pieces[name] = tensor
            continue
        (n_out, n_in), stem = tensor.shape, name.removesuffix("weight")

        def words(*shape):
            return rng.integers(-(2**31), 2**31, shape, np.int32)

        def scales(*shape):
            return rng.uniform(0.5, 1, shape).astype(np.float16)

        groups = -(-n_in // group)
        if method == "fp8":
            octets = rng.integers(0, 0x78, (n_out, n_in), np.uint8)
            pieces[name] = octets.view(ml_dtypes.float8_e4m3fn)
            pieces[f"{name}_scale_inv"] = scales(-(-n_out // 20), groups)
        elif method == "own":
            packed = rng.integers(0, 256, (n_out, n_in * bits // 8)).astype(np.uint8)
            pieces[f"{name}_packed"] = packed.view(np.int8) if bits == 8 else packed
            pieces[f"{name}_scales"] = scales(n_out, groups)
            if bits == 4:
                pieces[f"{name}_zeros"] = rng.integers(0, 16, (n_out, groups), np.uint8)
        else:
            columns = n_out // 8 if method == "awq" else n_out
            rows = n_in if method == "awq" else n_in * bits // 32
            pieces[f"{stem}qweight"] = words(rows, columns)
            pieces[f"{stem}qzeros"] = words(groups, n_out * bits // 32)
            pieces[f"{stem}scales"] = scales(groups, n_out)
        if "order" in kind:
            pieces[f"{stem}g_idx"] = rng.permutation(n_in).astype(np.int32) // group
    safetensors.numpy.save_file(pieces, directory / "model.safetensors", {"format": "pt"})
    what = {
        "gptq": {"bits": bits, "group_size": group, "desc_act": "order" in kind, "sym": False},
        "awq": {"bits": 4, "group_size": group, "version": "gemm", "zero_point": True},
        "fp8": {"weight_block_size": [20, group], "fmt": "e4m3", "activation_scheme": "dynamic"},
        "own": {"bits": bits, "group_size": group},
    }[method]
    what["quant_method"] = "qwen_jax" if method == "own" else method
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "quantization_config": what}))
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """All of the above, written; what differs in nothing but its dtype is in bfloat16."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, fields in LAYOUTS.items():
        dtype = "bfloat16" if "hybrid" in name else "float32"
        write_checkpoint(fields, root / name, dtype, "fused" in name)
    for kind, (_, group) in QUANTISED.items():
        write_quantised(kind, root / kind, group)
    write_quantised("fp8", root / "fp8 in wide blocks", 48)
    for name in ("tied", "flat fused hybrid"):
        convert(root / name, root / f"{name} in orbax", "orbax")
    spoilt = safetensors.numpy.load_file(root / "experts" / "model.safetensors")
    spoilt["model.layers.1.mlp.experts.3.up_proj.weight"][-1, -1] = np.nan
    write_checkpoint(LAYOUTS["experts"], root / "spoilt")
    safetensors.numpy.save_file(spoilt, root / "spoilt" / "model.safetensors", {"format": "pt"})
    return root


# What can be cut, cut anywhere, is what is in the whole.


@pytest.mark.parametrize("name", [*LAYOUTS, *QUANTISED, "flat fused hybrid in orbax"])
def test_a_slice_of_a_tensor_is_read_as_the_slice_of_the_whole(checkpoints, name, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK", 1000)
    directory, rng = checkpoints / name, np.random.default_rng(0)
    config = read_hf_config(json.loads((directory / "config.json").read_text()))
    for path, tensor in open_model(config, directory).tensors.items():
        whole = tensor.read()
        assert whole.shape == tensor.shape
        for _ in range(4):
            ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in whole.shape]
            index = tuple(slice(*map(int, pair)) for pair in ends)
            part = tensor[index]
            assert part.shape == whole[index].shape
            np.testing.assert_array_equal(part.read(), whole[index], str(path))
            inner = (slice(part.shape[0] // 2, part.shape[0]),)
            np.testing.assert_array_equal(part[inner].read(), whole[index][inner], str(path))
            out = np.empty(part.shape, np.float32)
            part.read_into(out)
            np.testing.assert_array_equal(out, whole[index].astype(np.float32), str(path))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7), (40, 1, 3), (2, 300)])
def test_blocks_are_a_tensor_in_its_order(monkeypatch, shape):
    monkeypatch.setattr(reader, "BLOCK", 64)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    cut = [values[index] for index in reader.blocks(shape, values.dtype)]
    assert max(part.nbytes for part in cut) <= 64 and len(cut) > values.nbytes // 64 - 1
    np.testing.assert_array_equal(np.concatenate([part.ravel() for part in cut]), values.ravel())


# In the child process.


def case(*parameters):
    """Registers a function to run in the child process, once for each tuple of parameters."""

    def register(function):
        for values in parameters or [()]:
            name = ", ".join([function.__name__.replace("_", " "), *map(str, values)])
            CASES[name] = lambda root, values=values: function(root, *values)
        return function

    return register


@functools.cache
def unsharded(directory, dtype=None, weights="dense"):
    return qwen_jax.load_pretrained(directory, dtype, weights=weights)


def assert_same_bits(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        want = leaf_at_keys(expected, path)
        assert leaf.dtype == want.dtype, path
        np.testing.assert_array_equal(
            np.asarray(leaf).view(np.uint8), np.asarray(want).view(np.uint8), str(path)
        )


def leaf_at_keys(tree, path):
    for key in path:
        tree = getattr(tree, key.name) if hasattr(key, "name") else tree[key.key]
    return tree


def bytes_of_first_device(params):
    first = jax.devices()[0]
    shards = [s for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


@case(*((name, mesh) for name in LAYOUTS for mesh in MESHES))
def loads_bit_by_bit(root, name, mesh):
    for dtype in ("float32", "bfloat16"):
        model, expected = unsharded(root / name, dtype)
        sharded, params = qwen_jax.load_pretrained(root / name, dtype, mesh)
        assert sharded.config == model.config and sharded.mesh == axes.as_mesh(mesh)
        assert_same_bits(params, expected)
        shardings = axes.parameter_shardings(model.config, axes.as_mesh(mesh), params)
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        # Norms and the heads of keys that are too few are on every device.
        share = 1 / 4 if mesh == MESHES[1] else 1 / 8
        assert bytes_of_first_device(params) < total * (share + 0.06)
        for layer in (params["layers_0"], params["layers_1"]):
            for leaf in jax.tree.leaves(layer["mlp"].get("experts", {})):
                assert leaf.addressable_shards[0].data.size * 8 == leaf.size


@case(*((kind, mesh) for kind in QUANTISED for mesh in MESHES))
def loads_quantised_weights_bit_by_bit(root, kind, mesh):
    for weights in ("dense", "packed"):
        expected = unsharded(root / kind, weights=weights)[1]
        params = qwen_jax.load_pretrained(root / kind, mesh=mesh, weights=weights)[1]
        assert_same_bits(params, expected)
        weight = params["layers_1"]["mlp"]["down_proj"]["weight"]
        if weights == "packed":
            assert isinstance(weight, QuantizedWeight)
            weight = weight.values
        shards = 8 if mesh == MESHES[0] else 4
        assert weight.addressable_shards[0].data.size * shards == weight.size


def refused(call, *parts):
    with pytest.raises(qwen_jax.UserError) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), caught.value


@case()
def packed_groups_that_do_not_divide_are_refused_by_name(root):
    directory = root / "fp8 in wide blocks"
    load = functools.partial(qwen_jax.load_pretrained, directory, mesh=MESHES[0])
    refused(lambda: load(weights="packed"), "mlp/gate_proj/weight", "scales [96, 2]", "fsdp:4")
    assert_same_bits(load()[1], unsharded(directory)[1])


@case()
def a_mesh_that_does_not_fit_is_refused_before_anything_is_read(root):
    def nothing_is_read(*_):
        raise AssertionError

    read_into = StoredTensor.read_into
    StoredTensor.read_into = nothing_is_read
    try:
        load = functools.partial(qwen_jax.load_pretrained, root / "tied")
        refused(lambda: load(mesh="tensor:8"), "o_proj", "4 heads", "tensor:8")
        refused(lambda: load(mesh="fsdp:16"), "16 devices")
        refused(lambda: load(mesh="rows:2"), "rows")
    finally:
        StoredTensor.read_into = read_into


@case()
def a_mesh_of_jax_is_taken(root):
    mesh = jax.make_mesh((2, 4), ("tensor", "fsdp"))
    model, params = qwen_jax.load_pretrained(root / "tied", mesh=mesh)
    assert_same_bits(params, unsharded(root / "tied")[1])
    assert model.mesh.axis_names == axes.MESH_AXES


@case()
def what_several_devices_hold_is_read_once(root):
    reads, read_into = [], StoredTensor.read_into

    def counted(tensor, out):
        reads.append((tensor.name, out.size))
        read_into(tensor, out)

    StoredTensor.read_into = counted
    try:
        params = qwen_jax.load_pretrained(root / "tied", mesh="data:4,tensor:2")[1]
    finally:
        StoredTensor.read_into = read_into
    assert sum(size for _, size in reads) == sum(leaf.size for leaf in jax.tree.leaves(params))


@case()
def what_is_not_finite_is_named_whichever_slice_it_is_in(root):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qwen_jax.load_pretrained(root / "spoilt", mesh=MESHES[1])
    (message,) = [str(w.message) for w in caught if "NaN" in str(w.message)]
    assert message.count("_proj") == 1 and "model.layers.1.mlp.experts.3.up_proj" in message
    refused(
        lambda: qwen_jax.load_pretrained(root / "spoilt", mesh=MESHES[0], allow_nonfinite=False),
        "experts.3.up_proj",
    )


@case(("tied",), ("flat fused hybrid",))
def orbax_restores_onto_another_mesh_and_onto_none(root, name):
    expected = unsharded(root / name, "float32")[1]
    params = qwen_jax.load_pretrained(root / name, "float32", MESHES[0])[1]
    # Ours has blocks of tensors on disk, Orbax's the shards of the devices that wrote it.
    target = root / f"{name} from devices"
    target.mkdir()
    (target / "config.json").write_bytes((root / name / "config.json").read_bytes())
    save_orbax(target, params)
    for directory in (target, root / f"{name} in orbax"):
        for mesh in (None, MESHES[1], "fsdp:8"):
            found = qwen_jax.load_pretrained(directory, "float32", mesh)[1]
            assert_same_bits(found, expected)
        dtypes = unsharded(root / name, None if "in orbax" in str(directory) else "float32")[1]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        wanted = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            dtypes,
            shardings,
        )
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(directory / "params", wanted)
        assert_same_bits(restored, dtypes)
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings


@case(("biases",), ("grouped hybrid",), ("experts",))
def sharded_parameters_are_saved_as_whole_ones_are(root, name):
    model, params = qwen_jax.load_pretrained(root / name, "float32")
    sharded = qwen_jax.load_pretrained(root / name, "float32", MESHES[1])[1]
    for kind, tree in (("whole", params), ("sharded", sharded)):
        qwen_jax.save_pretrained(root / f"{name} {kind}", model.config, tree, 100_000)
    files = sorted(path.name for path in (root / f"{name} whole").iterdir())
    assert len(files) > 2
    for file in files:
        ours = (root / f"{name} sharded" / file).read_bytes()
        assert ours == (root / f"{name} whole" / file).read_bytes(), file


def child_environment():
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **cache}


@pytest.fixture(scope="module")
def failures(checkpoints, tmp_path_factory):
    path = tmp_path_factory.mktemp("child") / "failures.json"
    done = subprocess.run(
        [sys.executable, __file__, "8", checkpoints, path],
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", CASES)
def test_on_8_devices(failures, name):
    assert failures[name] is None, failures[name]


def run_cases(root, path):
    failures = {}
    for name, function in CASES.items():
        try:
            function(root)
            failures[name] = None
        except Exception:
            failures[name] = traceback.format_exc()
    path.write_text(json.dumps(failures))


# In two processes of 4 devices each.


def take_part(root, target):
    """Both load, each its slices; both write both formats; NaN that one of them has both report."""
    for name in ("biases", "flat fused hybrid"):
        model, params = qwen_jax.load_pretrained(root / name, "float32", "fsdp:2,tensor:4"
                                                 if name == "biases" else MESHES[1])  # fmt: skip
        expected = unsharded(root / name, "float32")[1]
        jax.tree.map(assert_own_shards, params, expected)
        qwen_jax.save_pretrained(target / name, model.config, params, 100_000)
        orbax = target / f"{name} in orbax"
        orbax.mkdir(exist_ok=True)
        (orbax / "config.json").write_bytes((target / name / "config.json").read_bytes())
        save_orbax(orbax, params)
        found = qwen_jax.load_pretrained(orbax, "float32", "fsdp:8")[1]
        jax.tree.map(assert_own_shards, found, expected)
    refused(
        lambda: qwen_jax.load_pretrained(root / "spoilt", mesh=MESHES[1], allow_nonfinite=False),
        "experts.3.up_proj",
    )


def assert_own_shards(leaf, expected):
    assert len(leaf.addressable_shards) == 4 and leaf.dtype == expected.dtype
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])


def run_two_processes(*arguments):
    """Runs this file twice, as the processes 0 and 1 of 4 devices each; returns their output."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "4", *map(str, arguments), address, str(i)],
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    done = [child.communicate(timeout=500) for child in children]
    for child, (_, errors) in zip(children, done, strict=True):
        assert child.returncode == 0, errors
    return [out for out, _ in done]


def test_two_processes_load_and_save_together(checkpoints, tmp_path):
    run_two_processes("take_part", checkpoints, tmp_path)
    for name in ("biases", "flat fused hybrid"):
        expected = qwen_jax.load_pretrained(checkpoints / name, "float32")[1]
        for directory in (tmp_path / name, tmp_path / f"{name} in orbax"):
            assert_same_bits(qwen_jax.load_pretrained(directory, "float32")[1], expected)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    if sys.argv[1] == "8":
        run_cases(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        *_, address, number = sys.argv
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, num_processes=2, process_id=int(number))
        take_part(Path(sys.argv[3]), Path(sys.argv[4]))
