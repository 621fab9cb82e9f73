"""Experts cut from a dense model: what stays equal, what is drawn anew, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

import qwen_jax
from qwen_jax.checkpoint.writer import save_pretrained
from qwen_jax.config import MoeSpec
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.sharding.axes import as_mesh, parameter_shardings
from qwen_jax.training import upcycle as upcycle_module
from qwen_jax.training.upcycle import UpcycleOptions, upcycle
from tests.models.passes import random_ids
from tests.reference import random_reference, reference_logits, save_reference
from tests.sharding.models import CONFIGS, make_config, one_device

WIDTH = 48
OPTIONS = UpcycleOptions(num_experts=4, num_experts_per_tok=2, intermediate_size=WIDTH, redrawn=0.0)
DENSE = make_config(qkv_bias=False, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def dense():
    return one_device(DENSE)


def grow(dense, key=0, **changes):
    model, params = dense
    return upcycle(
        model.config, params, dataclasses.replace(OPTIONS, **changes), jax.random.key(key)
    )


def blocks(params):
    return [params[f"layers_{i}"]["mlp"] for i in range(2)]


def pieces(block):
    """An expert's channels, as what each reads and writes: [E, F, 3 D]."""
    weights = {name: np.asarray(leaf["weight"]) for name, leaf in block.items()}
    down = np.swapaxes(weights["down_proj"], -1, -2)
    return np.concatenate([weights["gate_proj"], weights["up_proj"], down], -1)


@pytest.mark.parametrize("chosen", [2, 4])
def test_experts_of_the_whole_width_compute_what_the_dense_model_did(dense, chosen):
    model, params = dense
    config, made = grow(dense, num_experts_per_tok=chosen)
    ids = random_ids(model, (2, 9))
    ours = Decoder(config).apply({"params": made}, ids)
    expected = model.apply({"params": params}, ids).logits
    np.testing.assert_allclose(ours.logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # The experts are not one: each has the channels in an order of its own.
    gates = made["layers_0"]["mlp"]["experts"]["gate_proj"]["weight"]
    assert all((gates[0] != gates[i]).any() for i in range(1, 4))


def test_all_of_narrow_experts_add_up_to_the_dense_block(dense):
    """Fine-grained: 6 experts of 16 are two copies of 48 channels; evenly weighted, a third."""
    model, params = dense
    config, made = grow(dense, num_experts=6, num_experts_per_tok=6, intermediate_size=16)
    for block in blocks(made):
        block["gate"]["weight"] *= 0
    smaller = jax.tree.map(lambda a: a, params)
    for block in blocks(smaller):
        block["down_proj"]["weight"] /= 3
    ids = random_ids(model, (2, 9))
    ours = Decoder(config).apply({"params": made}, ids).logits
    expected = model.apply({"params": smaller}, ids).logits
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_channels_are_those_of_the_copies_in_a_new_order_and_the_rest_is_dropped(dense):
    _, made = grow(dense, num_experts=5, intermediate_size=20)
    for block, before in zip(blocks(made), blocks(dense[1]), strict=True):
        channels = pieces(before)
        cut = pieces(block["experts"]).reshape(100, -1)
        which = [np.flatnonzero((channels == row).all(-1)).item() for row in cut]
        # Three copies of 48, of which the last is cut short.
        for start in (0, 48):
            assert sorted(which[start : start + 48]) == list(range(48))
            assert which[start : start + 48] != list(range(48))
        assert len(set(which[96:])) == 4
        assert which[:48] != which[48:96]
    first, second = (pieces(block["experts"]) for block in blocks(made))
    assert (first != second).any()


def test_half_of_each_expert_is_drawn_anew(dense):
    plain, redrawn = grow(dense)[1], grow(dense, redrawn=0.5)[1]
    for before, after in zip(blocks(plain), blocks(redrawn), strict=True):
        for name, leaf in after["experts"].items():
            new = leaf["weight"] != before["experts"][name]["weight"]
            shares = np.asarray(new.mean(axis=(1, 2)))
            np.testing.assert_allclose(shares, 0.5, atol=0.06)
            assert 0.018 < np.asarray(leaf["weight"])[np.asarray(new)].std() < 0.022
        np.testing.assert_array_equal(before["gate"]["weight"], after["gate"]["weight"])
    router = redrawn["layers_0"]["mlp"]["gate"]["weight"]
    assert 0.012 < router.std() < 0.028
    again, other = grow(dense, redrawn=0.5)[1], grow(dense, key=1, redrawn=0.5)[1]
    jax.tree.map(np.testing.assert_array_equal, again, redrawn)
    assert (other["layers_0"]["mlp"]["gate"]["weight"] != router).any()
    # What is not a feed-forward block is the very same.
    assert redrawn["layers_1"]["self_attn"] is dense[1]["layers_1"]["self_attn"]


def test_all_layers_are_made_by_one_program(dense, monkeypatch):
    traced, make = [], upcycle_module._experts
    monkeypatch.setattr(
        upcycle_module, "_experts", lambda *a, **k: traced.append(0) or make(*a, **k)
    )
    grow(dense)
    assert len(blocks(dense[1])) == 2
    assert len(traced) == 1


def test_transformers_loads_what_is_made_of_each_family(tmp_path):
    for family, shared in (("qwen3", None), ("qwen2", 24)):
        reference = random_reference(family, num_hidden_layers=2)
        model, params = qwen_jax.load_pretrained(save_reference(reference, tmp_path / family))
        options = UpcycleOptions(4, 2, 32, shared_intermediate_size=shared)
        config, made = upcycle(model.config, params, options, jax.random.key(0))
        save_pretrained(tmp_path / "experts" / family, config, made)
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "experts" / family,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        ids = random_ids(model, (1, 7))
        expected = reference_logits(theirs, ids)
        ours = Decoder(config).apply({"params": made}, ids).logits
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_on_a_mesh_the_same_numbers_lie_where_the_model_wants_them(dense):
    model, params = dense
    mesh = as_mesh("expert:2,tensor:2")
    options = dataclasses.replace(OPTIONS, redrawn=0.5)
    shapes = parameter_shapes(DENSE)
    placed = jax.device_put(params, parameter_shardings(DENSE, mesh, shapes))
    config, ours = upcycle(model.config, placed, options, jax.random.key(0), mesh)
    expected = grow(dense, redrawn=0.5)[1]
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    wanted = parameter_shardings(config, mesh, parameter_shapes(config))
    same = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), ours, wanted)
    assert all(jax.tree.leaves(same))


def test_what_experts_cannot_be_cut_of_is_refused(dense):
    params, key = dense[1], jax.random.key(0)
    with pytest.raises(UserError, match="a model of 8 experts has experts already"):
        upcycle(CONFIGS["moe"], params, OPTIONS, key)
    with pytest.raises(UserError, match="model_type = qwen has no kin with experts"):
        upcycle(dataclasses.replace(DENSE, family="qwen"), params, OPTIONS, key)
    with pytest.raises(UserError, match="shared_intermediate_size is missing: qwen2_moe always"):
        upcycle(dataclasses.replace(DENSE, family="qwen2"), params, OPTIONS, key)
    shared = dataclasses.replace(OPTIONS, shared_intermediate_size=24)
    with pytest.raises(UserError, match="this model_type has no shared expert"):
        upcycle(DENSE, params, shared, key)
    packed = {**params, "layers_1": {**params["layers_1"], "mlp": {"gate_proj": {"weight": None}}}}
    with pytest.raises(UserError, match="layers_1/mlp/gate_proj is no dense matrix"):
        upcycle(DENSE, packed, OPTIONS, key)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts", 1, "num_experts_per_tok = 2 is more than num_experts = 1"),
        ("intermediate_size", 0, "intermediate_size = 0 must be at least 1"),
        ("redrawn", 1.5, "redrawn = 1.5 must be at least 0 and at most 1"),
        ("aux_loss_coef", -1.0, "aux_loss_coef = -1.0 must be at least 0"),
    ],
)
def test_options_that_are_none_are_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(OPTIONS, **{field: value})


def test_the_spec_is_what_the_options_say():
    assert OPTIONS.spec(2) == MoeSpec((0, 1), 4, 2, WIDTH, renormalise=True)
