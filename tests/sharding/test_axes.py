"""The tables are checked before anything runs, in words that name the parameter."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from qwen_jax.errors import UserError
from qwen_jax.models.decoder import parameter_shapes
from qwen_jax.sharding import axes
from tests.sharding.models import CONFIGS, make_config


def check(config, text):
    axes.check_mesh(config, axes.as_mesh(text), parameter_shapes(config))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fsdp", "'fsdp' should be an axis and its size"),
        ("fsdp:0", "'fsdp:0' should be an axis and its size"),
        ("fsdp:2,", "'nothing' should be an axis and its size"),
        ("model:2", "axis model is unknown; known: data, fsdp, expert, context, tensor"),
        ("fsdp:2,fsdp:2", "an axis is named twice"),
        ("fsdp:16", "needs 16 devices, here are 8; give a smaller one, or set JAX_NUM_CPU_DEVICES"),
    ],
)
def test_a_mesh_that_is_none_is_refused(text, said):
    with pytest.raises(UserError) as error:
        axes.as_mesh(text)
    assert said in str(error.value)


def test_a_mesh_of_jax_gets_the_axes_that_it_lacks():
    devices = np.array(jax.devices()).reshape(4, 2)
    mesh = axes.as_mesh(Mesh(devices, ("tensor", "fsdp"), axis_types=(AxisType.Explicit,) * 2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 4}
    assert set(mesh.axis_types) == {AxisType.Auto}
    # The device at a place of one mesh is at the same place of the other.
    assert mesh.devices[0, 1, 0, 0, 2] == devices[2, 1]
    with pytest.raises(UserError, match="axis batch is unknown"):
        axes.as_mesh(Mesh(devices, ("batch", "tensor")))


@pytest.mark.parametrize(
    ("config", "mesh", "said"),
    [
        (make_config(num_attention_heads=6), "tensor:4",
         "parameter layers_0/self_attn/o_proj/weight: 6 heads do not divide by tensor:4"),
        (make_config(intermediate_size=50), "tensor:4",
         "parameter layers_0/mlp/down_proj/weight: 50 width do not divide by tensor:4"),
        (make_config(vocab_size=97), "tensor:2",
         "parameter embed_tokens/weight: 97 vocabulary do not divide by tensor:2"),
        (make_config(hidden_size=36, head_dim=8), "fsdp:8",
         "parameter embed_tokens/weight: 36 hidden do not divide by fsdp:8"),
        (CONFIGS["moe"], "expert:3",
         "parameter layers_0/mlp/experts/down_proj/weight: 8 experts do not divide by expert:3"),
    ],
)  # fmt: skip
def test_a_parameter_that_does_not_divide_is_named(config, mesh, said):
    with pytest.raises(UserError) as error:
        check(config, mesh)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"heads": ("fsdp",)}, "hidden and heads both lie along the mesh's fsdp"),
        ({"heads": ("rows",)}, "the rule for heads: axis rows is unknown"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(monkeypatch, rule, said):
    monkeypatch.setattr(axes, "RULES", axes.RULES | rule)
    if "rows" in said:
        monkeypatch.setattr(axes, "num_shards", lambda *_: 1)
    with pytest.raises(UserError) as error:
        check(CONFIGS["dense"], "fsdp:2")
    assert said in str(error.value)
    assert "parameter layers_0/self_attn/" in str(error.value)


def test_a_logical_axis_without_a_rule_is_refused(monkeypatch):
    monkeypatch.delitem(axes.RULES, "width")
    with pytest.raises(UserError, match="mlp/down_proj/weight: logical axis width has no rule"):
        check(CONFIGS["dense"], "fsdp:2")


def test_too_few_key_heads_are_whole_and_repeated():
    config = CONFIGS["dense"]
    mesh = axes.as_mesh("tensor:8")
    layout = axes.Layout.of(config, mesh)
    path = "layers_0/self_attn/k_proj/weight"
    assert axes.parameter_sharding(config, mesh, path).spec == PartitionSpec(None, "fsdp")
    assert axes.repeats(layout, 2, "kv_heads") == 4
    # 3 heads on 2 shards: 6 of them, so that each shard has 3.
    assert axes.repeats(axes.Layout(axes.as_mesh("tensor:2")), 3, "kv_heads") == 2
    assert axes.repeats(axes.Layout(axes.as_mesh("tensor:2")), 4, "kv_heads") == 1
