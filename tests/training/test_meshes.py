"""A train step on a mesh is that of one device, and each device holds its share of the state."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from qwen_jax.sharding.axes import Layout, as_mesh
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.loss import cross_entropy
from qwen_jax.training.objective import Batch, TrainOptions
from qwen_jax.training.train_step import (
    abstract_train_state,
    init_train_state,
    make_train_step,
)
from tests.sharding.models import CONFIGS, one_device, random_batch

OPTIONS = TrainOptions(
    dtype="float32",
    remat="dots",
    z_loss=0.1,
    balance=BalanceOptions(loss=1.5, z_loss=0.1),
    block_size=8,
)
# An epsilon of the gradients' size: far below it, steps multiply the noise of small gradients. At
# 1e-3 a last bit of each parameter moves steps by 1e-4 of the largest; at this, by 3e-5.
OPTIMISER = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-1, eps=1e-2))
CASES = [
    ("dense", "data:2,fsdp:2,tensor:2"),
    ("dense", "fsdp:2,context:2,tensor:2"),
    ("moe", "fsdp:2,expert:2,tensor:2"),
    ("hybrid", "fsdp:2,context:2,tensor:2"),
]


@pytest.mark.parametrize("mesh", ["fsdp:2,context:2,tensor:2", "expert:2,tensor:4", "data:4"])
def test_sums_and_gradients_are_those_of_one_device(mesh):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (4, 10, 16))
    head = jax.random.normal(keys[1], (48, 16))
    targets = jax.random.randint(keys[2], (4, 10), 0, 48).at[0, 0].set(-100)
    weights = jax.random.uniform(keys[3], (4, 10)).at[0, 0].set(0)

    def run(layout):
        def loss(x, head):
            return cross_entropy(x, head, targets, weights, z_loss=0.1, block_size=7, layout=layout)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, head)

    ours, expected = run(Layout(as_mesh(mesh))), run(None)
    jax.tree.map(close, ours, expected)


def close(ours, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * scale)


def deep(name):
    """The model of that name with its layers repeated, so that there is something to scan."""
    config = CONFIGS[name]
    moe = config.moe and dataclasses.replace(config.moe, layers=(0, 1, 2, 3))
    return one_device(dataclasses.replace(config, layer_types=config.layer_types * 2, moe=moe))


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_steps_are_those_of_one_device(name, mesh):
    model, params = deep(name)
    # Rows that do not divide by the mesh, with padding on either side.
    ids, mask = random_batch(model.config)
    batch = Batch(
        ids, attention_mask=mask, loss_weights=np.linspace(0, 2, ids.size).reshape(ids.shape)
    )

    def run(model):
        state = init_train_state(model, OPTIMISER, params=params)
        step, history = make_train_step(model, OPTIMISER, OPTIONS), []
        for _ in range(2):
            state, metrics = step(state, batch)
            history.append(metrics)
        return state, history

    state, history = run(model.clone(mesh=as_mesh(mesh)))
    expected_state, expected_history = run(model)
    assert history[0]["grad_norm"] > 0.5
    jax.tree.map(close, history, expected_history)
    moved = jax.tree.map(lambda a, b: a - b, state.params, params)
    expected_moved = jax.tree.map(lambda a, b: a - b, expected_state.params, params)
    for ours, expected in zip(jax.tree.leaves(moved), jax.tree.leaves(expected_moved), strict=True):
        # What was moved is small beside the parameters, which round it.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    wanted = abstract_train_state(model.clone(mesh=as_mesh(mesh)), OPTIMISER)
    jax.tree.map(lambda a, shape: check(a.sharding == shape.sharding), state, wanted)


def check(condition):
    assert condition


def test_moments_lie_where_their_parameters_do_from_the_start():
    model = one_device(CONFIGS["moe"])[0].clone(mesh=as_mesh("fsdp:2,expert:2,tensor:2"))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    state = init_train_state(model, optimiser, key=jax.random.key(0))
    adam = state.opt_state[1][0]
    for moments in (adam.mu, adam.nu):
        jax.tree.map(lambda m, p: check(m.sharding == p.sharding), moments, state.params)
    experts = adam.mu["layers_0"]["mlp"]["experts"]["up_proj"]["weight"]
    assert experts.addressable_shards[0].data.size * 8 == experts.size
    assert adam.count.sharding.spec == PartitionSpec()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    # What is cut is cut in 4 or 8; norms, biases and routers are whole.
    assert held < sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 4
    alone = init_train_state(model.clone(mesh=None), optimiser, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.params, alone.params)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@pytest.mark.parametrize(
    "optimiser",
    [
        optax.adafactor(1e-2, min_dim_size_to_factor=8),
        optax.contrib.muon(1e-2),
        optax.MultiSteps(optax.masked(optax.adamw(1e-2), matrices), 2),
    ],
    ids=["adafactor", "muon", "masked in steps"],
)
def test_state_of_every_optimiser_has_a_place(optimiser):
    model = one_device(CONFIGS["dense"])[0].clone(mesh=as_mesh("fsdp:2,tensor:2"))
    state = init_train_state(model, optimiser, key=jax.random.key(0))
    jax.tree.map(
        lambda a, b: check((a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)),
        state,
        abstract_train_state(model, optimiser),
    )
    like = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "gate_proj" in jax.tree_util.keystr(path) and leaf.shape == (48, 32)
    ]
    for leaf in like:
        assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    ids = np.zeros((2, 6), int)
    state, metrics = make_train_step(model, optimiser, OPTIONS)(state, Batch(ids))
    assert np.isfinite(metrics["loss"])
