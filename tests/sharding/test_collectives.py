"""What devices send each other, read out of the compiled program."""

import re

import jax
import pytest

from qwen_jax.sharding import axes, hlo
from tests.sharding.models import CONFIGS, one_device, random_batch


@pytest.fixture(scope="module")
def forward():
    """Of a mixture of experts on 2 x 2 x 2 devices: parameters, and the program's collectives."""
    model, params = one_device(CONFIGS["moe"])
    mesh = axes.as_mesh("fsdp:2,expert:2,tensor:2")
    params = jax.device_put(params, axes.parameter_shardings(model.config, mesh, params))
    ids, _ = random_batch(model.config, rows=8, length=16)
    run = jax.jit(lambda params: model.clone(mesh=mesh).apply({"params": params}, ids).logits)
    program = run.lower(params).compile().as_text()
    return params, hlo.collectives(hlo.read_module(program))


def test_weights_are_put_together_in_the_layer_that_uses_them(forward):
    params, found = forward
    gathered = [c for c in found if c.kind == "all-gather" and "all_gather" not in c.op_name]
    expected = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "hidden" in axes.parameter_axes(name) and not name.startswith("embed"):
            layer = re.match(r"layers_(\d+)", name)
            # Experts of one shard and rows of one shard, never those of all.
            shard = leaf.addressable_shards[0].data.nbytes
            expected.append((layer and layer[1], 2 * shard))
    places = [re.search(r"/layer_(\d+)/|_table/", c.op_name) for c in gathered]
    assert sorted(((p[1], c.bytes) for p, c in zip(places, gathered, strict=True)), key=str) == (
        sorted(expected, key=str)
    )


def test_tokens_travel_to_the_experts_and_back(forward):
    _, found = forward
    config = CONFIGS["moe"]
    # 8 rows of 16 on 4 shards of the batch; two shards of experts see the tokens of both.
    tokens = 2 * 2 * 16
    hidden, choices = tokens * config.hidden_size * 4, tokens * config.moe.num_experts_per_tok * 4
    for layer in range(2):
        own = [c for c in found if f"/layer_{layer}/" in c.op_name and "shard_map" in c.op_name]
        sizes = sorted(c.bytes for c in own if c.kind == "all-gather")
        assert sizes == [choices, choices, hidden]
        assert [c.bytes for c in own if c.kind == "reduce-scatter"] == [hidden]
