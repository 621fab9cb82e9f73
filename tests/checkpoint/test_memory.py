"""What a load takes beside the parameters, a shard of one too, and a conversion beside nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.names import leaf_at, regions
from qwen_jax.checkpoint.reader import BLOCK
from qwen_jax.checkpoint.regions import stored_shape
from qwen_jax.hf_config import read_hf_config
from qwen_jax.models.decoder import parameter_shapes

# Anonymous memory is sampled from the moment at which JAX runs until the work is done. Pages of a
# mapped file do not count.
CHILD = """
import json, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp, qwen_jax
from qwen_jax.checkpoint.conversion import convert

work, *arguments = sys.argv[1:]
if work == "shards":
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    source, address, number = arguments
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
jnp.zeros(4).block_until_ready()

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

done, samples = threading.Event(), [anonymous()]

def watch():
    while not done.is_set():
        samples.append(anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
leaves = []
if work == "load":
    leaves = jax.tree.leaves(qwen_jax.load_pretrained(*arguments, dtype="float32")[1])
elif work == "shards":
    params = qwen_jax.load_pretrained(source, "bfloat16", "fsdp:4,tensor:2")[1]
    leaves = [s.data for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
else:
    convert(*(argument or None for argument in arguments))
samples.append(anonymous())
done.set()
thread.join()
sizes = [leaf.nbytes for leaf in leaves]
measured = [max(samples) - samples[0], sum(sizes), max(sizes, default=0), len(samples)]
print(json.dumps({"measured": measured}))
"""

FIELDS = {
    "model_type": "qwen3",
    # Small beside the file, so that one copy too many of the checkpoint is out of bounds.
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}

# Many stored tensors make up one parameter here.
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 6,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
}


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


def write_checkpoint(directory, fields, fused=False):
    """Random numbers; returns the sizes of the file and of the largest tensor."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    config, dtype = read_hf_config(fields), fields["torch_dtype"]
    found = regions(config)
    if fused:
        found = regions(config, {f"model.layers.{i}." for i in range(config.num_hidden_layers)})
    shapes = parameter_shapes(config)
    some = (0.02 * np.random.default_rng(0).standard_normal(1 << 20)).astype(dtype)
    tensors = {
        region.name: np.resize(some, stored_shape(region, leaf_at(shapes, region.path).shape))
        for region in found
    }
    path = directory / "model.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    return path.stat().st_size, max(tensor.nbytes for tensor in tensors.values())


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        # What is freed goes back at once, so that only what is held is measured.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child):
    """Peak above the start, bytes of all arrays and of the largest, and the number of samples."""
    out, errors = child.communicate()
    assert child.returncode == 0, errors
    # Gloo speaks on stdout too, before or after.
    (line,) = (line for line in out.splitlines() if line.startswith("{"))
    return json.loads(line)["measured"]


@linux
@pytest.mark.parametrize(
    ("stored", "more"),
    [
        ("bfloat16", {"num_hidden_layers": 32}),
        ("float32", {"num_hidden_layers": 16}),
        ("bfloat16", EXPERTS),
    ],
    ids=["bfloat16", "float32", "experts"],
)
def test_a_load_takes_less_than_twice_the_largest_tensor_beside_the_parameters(
    tmp_path, stored, more
):
    size, _ = write_checkpoint(tmp_path, {**FIELDS, **more, "torch_dtype": stored})
    assert size > 10**9
    peak, parameters, largest, num_samples = finish(start("load", tmp_path))
    shutil.rmtree(tmp_path)
    assert num_samples > 20
    # The sampling sees the parameters themselves, so it would see more.
    assert parameters < peak < parameters + 2 * largest


@linux
def test_each_of_two_processes_holds_half_of_a_checkpoint(tmp_path):
    # Each stack of experts is a tenth of all, so that one held whole is out of bounds.
    more = {**EXPERTS, "num_hidden_layers": 3, "num_experts": 224}
    size, _ = write_checkpoint(tmp_path, {**FIELDS, **more, "torch_dtype": "bfloat16"}, fused=True)
    assert size > 2 * 10**9
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = [start("shards", tmp_path, address, number) for number in range(2)]
    for peak, shards, _, num_samples in map(finish, children):
        print(f"peak {peak / size:.3f} of the checkpoint, shards {shards / size:.3f} of it")
        assert num_samples > 20
        assert 0.49 * size < shards < peak < 0.55 * size
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def to_convert(tmp_path_factory):
    """A checkpoint in bfloat16 with its experts fused and the same in Orbax format."""
    root = tmp_path_factory.mktemp("convert")
    more = {**EXPERTS, "num_experts": 32, "moe_intermediate_size": 256, "torch_dtype": "bfloat16"}
    size, largest = write_checkpoint(root / "hf", {**FIELDS, **more}, fused=True)
    assert size > 4 * 10**8
    convert(root / "hf", root / "orbax", "orbax")
    yield root, largest
    shutil.rmtree(root)


@linux
@pytest.mark.parametrize(
    ("source", "target", "dtype"),
    [
        ("hf", "hf", ""),
        ("hf", "hf", "float32"),
        ("hf", "orbax", ""),
        ("orbax", "hf", ""),
        ("orbax", "hf", "float32"),
    ],
)
def test_a_conversion_takes_the_largest_tensor_and_not_the_model(
    to_convert, tmp_path, source, target, dtype
):
    root, largest = to_convert
    peak, *_, num_samples = finish(
        start("convert", root / source, tmp_path / "target", target, dtype)
    )
    shutil.rmtree(tmp_path)
    assert num_samples > 20
    # And some blocks: read, unpacked, cast or packed, and what the allocator keeps of them.
    assert peak < largest * (2 if dtype else 1) + 12 * BLOCK
