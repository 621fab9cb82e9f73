"""The bias that balances experts without a loss: how loads move it, and that nothing else does."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax.config import MoeSpec
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.nn.router import route
from qwen_jax.sharding.axes import as_mesh
from qwen_jax.training.balancing import BalanceOptions, grouping_of, make_grouping
from qwen_jax.training.checkpoints import Checkpoints
from qwen_jax.training.objective import Batch, TrainOptions
from qwen_jax.training.router_figures import max_violation
from qwen_jax.training.routing_sums import ALL_TOKENS, sum_routing
from qwen_jax.training.score_bias import fit_biases, is_score_bias, moves_of
from qwen_jax.training.train_step import init_train_state, make_train_step
from tests.sharding.models import CONFIGS, random_batch, random_params

RATE = 0.01
# Decay would pull at a bias that the optimiser had.
OPTIMISER = optax.adamw(1e-2, weight_decay=0.5)


def options(rate=RATE, **fields):
    step = {name: fields.pop(name) for name in ("microbatches", "scan", "dtype") if name in fields}
    balance = BalanceOptions(loss=0.1, bias_rate=rate, figures=False, **fields)
    return TrainOptions(**{"dtype": "float32"} | step, remat="none", block_size=16, balance=balance)


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def biases_of(tree):
    """By the name of the layer."""
    return {
        name.removesuffix("/mlp/gate/score_bias"): leaf
        for name, leaf in named(tree).items()
        if is_score_bias(name)
    }


def with_bias(config):
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, score_bias=True))


def random_biased(config):
    """A model with biases of the size of differences between probabilities."""
    config = with_bias(config)

    def shrink(path, leaf):
        return 0.1 * leaf if "score_bias" in jax.tree_util.keystr(path) else leaf

    return Decoder(config), jax.tree_util.tree_map_with_path(shrink, random_params(config))


def padded_batch(rows=6, seed=1):
    ids, mask = random_batch(CONFIGS["moe"], rows, seed=seed)
    return Batch(ids, attention_mask=mask)


# How loads move it.


def moves_by_hand(counts, rate, update):
    """Of an expert's counts in each group, [G, E]: the mean of the groups that have any."""
    moves = []
    for loads in counts[counts.sum(1) > 0].astype(np.float64):
        mean, move = loads.mean(), []
        for load in loads:
            sign = 1 if load < mean else -1 if load > mean else 0
            move.append(rate * (sign if update == "sign" else (mean - load) / mean))
        moves.append(move)
    return np.mean(moves, axis=0)


@pytest.mark.parametrize("update", ["sign", "proportional"])
@pytest.mark.parametrize("group", ["global", "micro", "sequence", "device", "shuffled", "buffer"])
def test_moves_are_the_mean_over_groups_of_what_their_loads_ask_for(group, update):
    E, k, B, T = 6, 2, 5, 8
    spec = MoeSpec((0, 1), E, k, intermediate_size=8, renormalise=True)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (2, B, T, E)) + rng.normal(0, 1, (2, B, 1, E))
    # The second micro-batch has no token.
    real = np.arange(T) < np.array([8, 4, 0, 0, 7])[:, None]
    asked = BalanceOptions(bias_rate=0.03, bias_update=update, bias_group=group, microbatch_rows=2)
    grouping = make_grouping(grouping_of(group), (B, T), asked, 3, jax.random.key(1))
    groupings = ALL_TOKENS | {grouping_of(group): grouping}
    sums, expected = [], []
    ids = np.zeros(B, int) if grouping.ids is None else np.asarray(grouping.ids)
    ids = np.broadcast_to(ids[:, None], (B, T)) if ids.ndim == 1 else ids
    for x in logits.astype(np.float32):
        routing = route(jnp.asarray(x), jnp.eye(E), spec, real)
        sums.append(sum_routing(routing, real, groupings))
        counts = np.zeros((grouping.count, E), int)
        for b, t in np.argwhere(real):
            counts[ids[b, t], np.argsort(-x[b, t])[:k]] += 1
        counts = counts.cumsum(0) if group == "buffer" else counts
        expected.append(moves_by_hand(counts, 0.03, update))
    ours = moves_of(jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums), asked)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-8)
    if update == "proportional":
        # What is given to one expert is taken from others.
        np.testing.assert_allclose(ours.sum(1), 0, atol=1e-7)


@pytest.mark.parametrize(("update", "rate"), [("sign", 1e-3), ("proportional", 1e-2)])
def test_experts_of_a_skewed_router_come_to_be_used_evenly(update, rate):
    E, N = 16, 1024
    spec = MoeSpec((0,), E, 2, intermediate_size=8, renormalise=True)
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.normal(0, 1, (1, N, E)) + rng.normal(0, 1, E), jnp.float32)
    asked = BalanceOptions(bias_rate=rate, bias_update=update)

    def step(bias, _):
        routing = route(logits, jnp.eye(E), spec, bias=bias)
        sums = jax.tree.map(lambda leaf: leaf[None], sum_routing(routing))
        return bias + moves_of(sums, asked)[0], max_violation(routing.counts)

    _, violations = jax.jit(lambda bias: jax.lax.scan(step, bias, length=400))(jnp.zeros(E))
    # What loads are without, where they stay: nothing else moves.
    assert violations[0] > 1.5
    assert violations[-100:].max() < 0.1


# What a step does with it.


@pytest.fixture(scope="module")
def deep():
    """Dense and sparse layers in turns, and a head: names that are neither rows nor places."""
    config = CONFIGS["moe"]
    moe = dataclasses.replace(config.moe, layers=(1, 3))
    layer_types = config.layer_types * 2
    return random_biased(
        dataclasses.replace(config, layer_types=layer_types, moe=moe, mtp_layers=1)
    )


def one_step(model, params, batch, options, stacked=False, trained=None):
    state = init_train_state(model, OPTIMISER, params=params, stacked=stacked, trained=trained)
    step = make_train_step(model, OPTIMISER, options, state)
    return step(state, batch)


WAYS = {
    "one by one, frozen but for norms": ({"scan": False}, {"trained": lambda name: "norm" in name}),
    "stacked, in parts": ({"microbatches": 3}, {"stacked": True}),
    "mesh": ({}, {"stacked": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_moves_each_layers_bias_by_that_layers_loads(deep, way):
    model, params = deep
    if way == "mesh":
        model = model.clone(mesh=as_mesh("data:2,expert:2"))
    changes, kept = WAYS[way]
    batch = padded_batch()
    state, metrics = one_step(model, params, batch, options(**changes), **kept)
    before, after = biases_of(params), biases_of(state.whole())
    layers = ["layers_1", "layers_3", "mtp/layers_0"]
    assert sorted(before) == sorted(after) == layers
    moves = {
        name: moves_by_hand(counts[None], RATE, "sign")
        for name, counts in zip(layers, np.asarray(metrics["expert_counts"]), strict=True)
    }
    for name in layers:
        np.testing.assert_allclose(after[name] - before[name], moves[name], atol=1e-7, err_msg=name)
    # No two are the same, so that none can stand for another.
    assert len({tuple(move) for move in moves.values()}) == len(layers)
    # Loads of the layers that a plain pass runs.
    router = deep[0].apply({"params": params}, batch.input_ids, batch.attention_mask).router
    for i, row in ((1, 0), (3, 1)):
        np.testing.assert_array_equal(metrics["expert_counts"][row], router[i].counts)
    # The optimiser has never heard of it.
    assert not any("score_bias" in name for name in (*named(state.params), *named(state.opt_state)))


def test_a_head_that_is_not_trained_keeps_its_biases(deep):
    model, params = deep
    state, _ = one_step(model, params, padded_batch(), dataclasses.replace(options(), mtp_loss=0.0))
    before, after = biases_of(params), biases_of(state.whole())
    for name, bias in before.items():
        assert (after[name] == bias).all() == name.startswith("mtp/"), name


@pytest.fixture(scope="module")
def small():
    return random_biased(CONFIGS["moe"])


@pytest.mark.parametrize("group", ["sequence", "micro"])
def test_a_step_counts_in_the_groups_that_are_asked_for(small, group):
    model, params = small
    batch = padded_batch(6)
    asked = options(bias_group=group, bias_update="proportional", microbatch_rows=4, microbatches=2)
    state, _ = one_step(model, params, batch, asked, stacked=True)
    after, before = biases_of(state.whole()), biases_of(params)
    router = model.apply({"params": params}, batch.input_ids, batch.attention_mask).router
    for i, routing in enumerate(router):
        counts = np.zeros((6, 8), int)
        for b, t in np.argwhere(batch.attention_mask):
            counts[b if group == "sequence" else b // 4, routing.experts[b, t]] += 1
        moved = after[f"layers_{i}"] - before[f"layers_{i}"]
        np.testing.assert_allclose(moved, moves_by_hand(counts, RATE, "proportional"), atol=1e-7)


def test_a_rate_of_0_leaves_it_where_it_is(small):
    model, params = small
    state, metrics = one_step(model, params, padded_batch(), options(rate=0.0))
    assert metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, biases_of(state.whole()), biases_of(params))


@pytest.fixture(scope="module")
def run(small):
    """A step whose state is stacked, and the state before the first."""
    model, params = small

    def begin():
        return init_train_state(model, OPTIMISER, params=params, stacked=True)

    return begin, make_train_step(model, OPTIMISER, options())


def test_a_step_that_is_not_finite_moves_nothing(run):
    begin, step = run
    ids, mask = random_batch(CONFIGS["moe"], 6)
    weights = np.ones(ids.shape, np.float32)
    weights[0, 3] = np.nan
    state, metrics = step(begin(), Batch(ids, attention_mask=mask, loss_weights=weights))
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, state.moved, begin().moved)
    state, metrics = step(
        begin(), Batch(ids, attention_mask=mask, loss_weights=np.ones_like(weights))
    )
    assert metrics["finite"]
    (stack,) = biases_of(state.moved).values()
    (before,) = biases_of(begin().moved).values()
    assert stack.shape == (2, 8) and np.mean(stack != before) > 0.8


def test_a_run_that_goes_on_from_a_checkpoint_is_the_unbroken_one(run, tmp_path):
    begin, step = run

    def go_on(state, seeds):
        for seed in seeds:
            state, _ = step(state, padded_batch(seed=seed))
        return state

    def data():
        return iter(grain.MapDataset.range(10).to_iter_dataset())

    unbroken = go_on(begin(), range(4))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state = go_on(begin(), range(2))
        checkpoints.save(state, 2, data())
        expected = jax.device_get(state.moved)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored, _ = checkpoints.restore(jax.eval_shape(begin), data())
    jax.tree.map(np.testing.assert_array_equal, restored.moved, expected)
    jax.tree.map(np.testing.assert_array_equal, go_on(restored, range(2, 4)), unbroken)
    (bias,), (before,) = biases_of(unbroken.moved).values(), biases_of(begin().moved).values()
    assert np.abs(bias - before).max() == pytest.approx(4 * RATE, rel=1e-4)


def test_moves_that_bfloat16_cannot_tell_are_seen_by_the_choice():
    """Experts whose biases are 2e-4 apart near 0.3, where bfloat16's steps are 2e-3."""
    config = with_bias(CONFIGS["moe"])
    order = np.stack([np.random.default_rng(i).permutation(8) for i in range(2)])
    start = (0.3 + 2e-4 * order).astype(np.float32)
    assert len(np.unique(jnp.asarray(start, jnp.bfloat16))) == 1
    params = random_params(config)
    for i in range(2):
        # All tokens find all experts as likely, so that biases alone decide.
        gate = params[f"layers_{i}"]["mlp"]["gate"]
        gate |= {"weight": 0 * gate["weight"], "score_bias": jnp.asarray(start[i])}
    rate, batch, expected = 1e-3, padded_batch(), start.copy()
    model, optimiser = Decoder(config), optax.sgd(0.0)
    state = init_train_state(model, optimiser, params=params, stacked=True)
    step = make_train_step(model, optimiser, options(rate, dtype="bfloat16"))
    for _ in range(3):
        state, metrics = step(state, batch)
        for i, counts in enumerate(np.asarray(metrics["expert_counts"])):
            chosen = np.argsort(-expected[i])[:3]
            np.testing.assert_array_equal(np.flatnonzero(counts), np.sort(chosen))
            assert (counts[chosen] == batch.attention_mask.sum()).all()
            expected[i] += np.float32(rate)
            expected[i][chosen] -= np.float32(2 * rate)
    (bias,) = biases_of(state.moved).values()
    assert bias.dtype == np.float32
    np.testing.assert_allclose(bias, expected, atol=1e-7)


# Where there is one, and where there is none.


def test_biases_are_added_as_zeros_and_dropped_where_the_config_has_none(deep):
    model, params = deep
    plain = dataclasses.replace(
        model.config, moe=dataclasses.replace(model.config.moe, score_bias=False)
    )
    dropped = fit_biases(plain, params)
    assert jax.tree.structure(dropped) == jax.tree.structure(parameter_shapes(plain))
    added = fit_biases(model.config, dropped)
    assert jax.tree.structure(added) == jax.tree.structure(params)
    assert all(bias.shape == (8,) and not bias.any() for bias in biases_of(added).values())
    # What is there stays: biases where there are to be some, and all others.
    for ours, theirs in ((fit_biases(model.config, params), params), (dropped, params)):
        theirs = named(theirs)
        for name, leaf in named(ours).items():
            np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


def test_a_rate_for_a_model_without_biases_is_refused():
    model = Decoder(CONFIGS["moe"])
    with pytest.raises(UserError, match=r"^balance.bias_rate = 0.01: .* set score_bias of its"):
        make_train_step(model, OPTIMISER, options())
