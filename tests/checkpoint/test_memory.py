"""What a load takes beside the parameters: less than twice the largest tensor."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from qwen_jax.checkpoint.names import leaf_at, regions
from qwen_jax.checkpoint.regions import stored_shape
from qwen_jax.hf_config import read_hf_config
from qwen_jax.models.decoder import parameter_shapes

# Anonymous memory is sampled from the moment at which JAX runs until the parameters are there.
CHILD = """
import json, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp, qwen_jax

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
model, params = qwen_jax.load_pretrained(sys.argv[1], dtype="float32")
samples.append(anonymous())
done.set()
thread.join()
sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
print(json.dumps([max(samples) - samples[0], sum(sizes), max(sizes), len(samples)]))
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
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
    fields = {**FIELDS, **more, "torch_dtype": stored}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_hf_config(fields)
    shapes = parameter_shapes(config)
    some = (0.02 * np.random.default_rng(0).standard_normal(1 << 20)).astype(stored)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(
        {
            region.name: np.resize(some, stored_shape(region, leaf_at(shapes, region.path).shape))
            for region in regions(config)
        },
        path,
        metadata={"format": "pt"},
    )
    assert path.stat().st_size > 10**9
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    shutil.rmtree(tmp_path)
    peak, parameters, largest, num_samples = json.loads(done.stdout)
    assert num_samples > 20
    # The sampling sees the parameters themselves, so it would see more.
    assert parameters < peak < parameters + 2 * largest
