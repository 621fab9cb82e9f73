"""Layers that lie stacked: names, steps of every optimiser, frozen ones, meshes, compiling."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

import qwen_jax
from qwen_jax.benchmark.programs import lower_train
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.sharding import aot
from qwen_jax.sharding.axes import as_mesh, read_mesh
from qwen_jax.sharding.chips import read_topology
from qwen_jax.sharding.jobs import Job, build_program
from qwen_jax.training.objective import Batch, TrainOptions
from qwen_jax.training.optimisers import OptimiserOptions, make_optimiser
from qwen_jax.training.stacking import (
    is_stacked,
    segments,
    stack_layers,
    stacked_names,
    unstack_layers,
)
from qwen_jax.training.train_step import (
    abstract_train_state,
    init_train_state,
    make_evaluation,
    make_train_step,
)
from tests.models.passes import random_ids
from tests.reference import random_reference, save_reference

STEP = TrainOptions(dtype="float32", remat="none", mtp_loss=0.0)
FAMILIES = {
    "dense": ("qwen3", {"num_hidden_layers": 3}),
    "hybrid": (
        "qwen3_next",
        {
            "num_hidden_layers": 5,
            "layer_types": ["linear_attention", "full_attention"] * 2 + ["full_attention"],
            "mlp_only_layers": [4],
        },
    ),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    def load(name):
        if name not in found:
            family, fields = FAMILIES[name]
            directory = save_reference(
                random_reference(family, **fields), tmp_path_factory.mktemp(name)
            )
            found[name] = qwen_jax.load_pretrained(directory)
        return found[name]

    found = {}
    return load


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_layer_comes_back_bit_for_bit(loaded, name):
    model, params = loaded(name)
    stacked = stack_layers(model.config, params)
    assert is_stacked(stacked) and not is_stacked(params)
    layers = [layer for key in stacked for layer in stacked_names(key) or ()]
    assert sorted(layers) == sorted(key for key in params if key.startswith("layers_"))
    apart = unstack_layers(stacked)
    assert apart.keys() == params.keys()
    equal(apart, params)
    assert unstack_layers(params).keys() == params.keys()


def test_names_say_which_layers_lie_in_a_stack(loaded):
    stacked = stack_layers(loaded("hybrid")[0].config, loaded("hybrid")[1])
    assert {key for key in stacked if "layers" in key} == {
        "layers_0_to_2_by_2",
        "layers_1_to_3_by_2",
        "layers_4_to_4_by_1",
    }
    path = "layers_1_to_3_by_2/self_attn/q_proj/weight"
    assert stacked_names(path) == [f"layers_{i}/self_attn/q_proj/weight" for i in (1, 3)]
    assert stacked_names("layers_1/mlp/up_proj/weight") is None
    assert stacked_names("mtp_layers_0/mlp/up_proj/weight") is None


OPTIMISERS = {
    "adamw": OptimiserOptions(
        learning_rate=1e-2, schedule="constant", weight_decay=0.3, eps=1e-4, clip_norm=0.5,
        decay_except=("k_proj",),
    ),
    "muon": OptimiserOptions(
        name="muon", learning_rate=1e-2, schedule="constant", weight_decay=0.3, eps=1e-4
    ),
    "adafactor": OptimiserOptions(
        name="adafactor", learning_rate=1e-2, schedule="constant", weight_decay=0.3
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_steps_are_those_of_layers_apart(loaded, name, optimiser):
    model, params = loaded(name)
    rule = make_optimiser(OPTIMISERS[optimiser], 9, params)
    batch = Batch(random_ids(model, (2, 12)))
    states, figures = [], []
    for stacked in (False, True):
        state = init_train_state(model, rule, params=params, stacked=stacked)
        assert is_stacked(state.params) == stacked
        step = make_train_step(model, rule, STEP)
        for _ in range(3):
            state, metrics = step(state, batch)
        states.append(state.whole())
        figures.append(metrics)
    np.testing.assert_allclose(figures[1]["loss"], figures[0]["loss"], rtol=1e-5)
    np.testing.assert_allclose(figures[1]["grad_norm"], figures[0]["grad_norm"], rtol=1e-4)

    def close(path, before, apart, stacked):
        moved = np.abs(apart - before).max()
        message = jax.tree_util.keystr(path)
        assert moved > 1e-3, message
        np.testing.assert_allclose(stacked, apart, rtol=0, atol=2e-3 * moved, err_msg=message)

    jax.tree_util.tree_map_with_path(close, params, *states)


def test_evaluations_and_steps_without_a_scan_take_either(loaded):
    model, params = loaded("dense")
    batch = Batch(random_ids(model, (2, 12)))
    stacked = stack_layers(model.config, params)
    for scan in (True, False):
        evaluate = make_evaluation(model, dataclasses.replace(STEP, scan=scan))
        one, other = (evaluate(tree, [batch])["eval_loss"] for tree in (params, stacked))
        assert one == pytest.approx(other, rel=1e-6)


def test_frozen_parameters_stay_apart(loaded):
    model, params = loaded("dense")
    batch = Batch(random_ids(model, (2, 12)))

    def trained(name):
        return "q_proj" in name or name.startswith("norm")

    rule, ends = optax.sgd(0.1), []
    for stacked in (False, True):
        state = init_train_state(model, rule, params=params, trained=trained, stacked=stacked)
        assert not is_stacked(state.frozen)
        step = make_train_step(model, rule, STEP, state)
        for _ in range(2):
            state, _ = step(state, batch)
        ends.append(state.whole())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), *ends)
    equal(ends[1]["layers_1"]["mlp"], params["layers_1"]["mlp"])
    assert (ends[1]["layers_1"]["self_attn"]["q_proj"]["weight"]
            != params["layers_1"]["self_attn"]["q_proj"]["weight"]).any()  # fmt: skip


def test_what_differs_between_layers_of_a_stack_is_refused(loaded):
    model, params = loaded("dense")
    with pytest.raises(UserError, match="layers 0 and 1 cannot be scanned together"):
        init_train_state(
            model,
            optax.sgd(0.1),
            params=params,
            trained=lambda name: name.startswith("layers_1/"),
            stacked=True,
        )
    options = OptimiserOptions(decay_except=("layers_1/self_attn",))
    rule = make_optimiser(options, 9, params)
    init_train_state(model, rule, params=params)
    with pytest.raises(UserError, match="in two ways, and they are scanned together"):
        init_train_state(model, rule, params=params, stacked=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_mesh_each_layer_lies_as_by_itself(loaded, name):
    model, params = loaded(name)
    spread = Decoder(model.config, mesh=as_mesh("fsdp:2,tensor:2"))
    rule = make_optimiser(OPTIMISERS["adamw"], 9, params)
    state = init_train_state(spread, rule, params=params, stacked=True)
    wanted = abstract_train_state(spread, rule, stacked=True)
    jax.tree.map(lambda a, shape: check(a.sharding == shape.sharding), state, wanted)
    apart = abstract_train_state(spread, rule)
    for key, tree in state.params.items():
        for layer in stacked_names(key) or ():
            jax.tree.map(
                lambda a, b: check(a.sharding.spec[1:] == tuple(b.sharding.spec)),
                tree,
                apart.params[layer],
            )
    moments = state.opt_state[1][0].mu
    jax.tree.map(lambda m, p: check(m.sharding == p.sharding), moments, state.params)

    batch = Batch(random_ids(model, (4, 12)))
    after, _ = make_train_step(spread, rule, STEP, state)(state, batch)
    alone = init_train_state(model, rule, params=params)
    expected, _ = make_train_step(model, rule, STEP)(alone, batch)
    whole = after.whole()
    jax.tree.map(
        lambda a, b, p: np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * np.abs(b - p).max()),
        whole,
        expected.params,
        params,
    )


def check(condition):
    assert condition


def instructions(text):
    return len(re.findall(r"^\s+(?:ROOT )?%?\S+ = ", text, re.MULTILINE))


def with_layers(config, count):
    return dataclasses.replace(config, layer_types=config.layer_types[:1] * count)


def test_what_is_compiled_does_not_grow_with_the_layers(loaded):
    config = loaded("dense")[0].config
    few, many = (
        instructions(lower_train(with_layers(config, n), 1, 16, scan=True).compile().as_text())
        for n in (2, 12)
    )
    assert many <= 1.02 * few


@pytest.mark.skipif(not aot.has_compiler(), reason="libtpu is not installed")
def test_what_is_compiled_for_a_tpu_does_not_grow_with_the_layers(loaded):
    config, topology = loaded("dense")[0].config, read_topology("v5e:2x2")
    counts = []
    for layers in (2, 12):
        mesh = tuple(read_mesh("fsdp:4").items())
        job = Job(with_layers(config, layers), topology, mesh, "train", 4, 128)
        program = build_program(job, aot.make_mesh(topology, job.sizes))
        lowered = program.function.trace(*program.arguments).lower()
        counts.append(instructions(aot.compile_program(lowered).hlo))
    assert counts[1] <= 1.02 * counts[0], counts


def test_shapes_are_stacked_without_arrays(loaded):
    config = loaded("hybrid")[0].config
    shapes = jax.eval_shape(lambda p: stack_layers(config, p), parameter_shapes(config))
    first, last = (segment.stack(0) for segment in segments(config))
    assert first == "layers_0_to_2_by_2"
    assert shapes[first]["linear_attn"]["out_proj"]["weight"].shape == (2, 64, 120)
    assert shapes[last]["mlp"]["up_proj"]["weight"].shape == (1, 96, 64)
