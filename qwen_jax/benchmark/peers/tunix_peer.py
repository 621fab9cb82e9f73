"""google-tunix at the work of `qwen_jax.benchmark.serving`, in an environment of its own.

PYTHON tunix_peer.py TASK reads a line, reads and writes tokens, and answers with the seconds.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.qwen3.model import ModelConfig
from tunix.models.qwen3.params import create_model_from_safe_tensors


def load(directory: Path):
    """The graph of a dense Qwen3 and its float32 state, from a checkpoint."""
    fields = json.loads((directory / "config.json").read_text())
    theta = fields.get("rope_theta") or fields["rope_parameters"]["rope_theta"]
    config = ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["head_dim"],
        num_kv_heads=fields["num_key_value_heads"],
        norm_eps=fields["rms_norm_eps"],
        rope_theta=theta,
        use_tied_embedding=fields["tie_word_embeddings"],
    )
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=automatic)
    model = create_model_from_safe_tensors(str(directory), config, mesh, dtype=jnp.float32)
    return model, nnx.split(model)


def main() -> None:
    """Serves."""
    task = json.loads(sys.argv[1])
    rows, length, steps = task["rows"], task["length"], task["steps"]
    model, (graph, state) = load(Path(task["directory"]))
    ids = np.random.default_rng(0).integers(0, task["vocab_size"], (rows, length))
    capacity = length + steps + 1

    def step(state, cache, ids, start):
        columns = start + jnp.arange(ids.shape[1])
        positions = jnp.broadcast_to(columns, ids.shape)
        mask = jnp.arange(capacity) <= columns[:, None]
        mask = jnp.broadcast_to(mask, (rows, *mask.shape))
        logits, cache = nnx.merge(graph, state)(ids, positions, cache, mask)
        return cache, jnp.argmax(logits[:, -1], axis=-1)[:, None]

    step = jax.jit(step, donate_argnums=1)
    for _ in sys.stdin:
        begin = time.perf_counter()
        cache = model.init_cache(rows, capacity, jnp.float32)
        cache, token = step(state, cache, jnp.asarray(ids), 0)
        tokens = [jax.block_until_ready(token)]
        middle = time.perf_counter()
        for i in range(steps):
            cache, token = step(state, cache, token, length + i)
            tokens.append(token)
        chosen = np.concatenate(jax.device_get(tokens), axis=1)
        seconds = {"prefill": middle - begin, "decode": time.perf_counter() - middle}
        reading = {"seconds": seconds, "outcome": chosen.ravel().tolist()}
        print(json.dumps(reading), flush=True)


if __name__ == "__main__":
    main()
