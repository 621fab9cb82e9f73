"""Figures of how experts are used, against loops, scipy, and what even use and collapse give."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from qwen_jax.config import MoeSpec
from qwen_jax.nn.router import Assignment, RouterOptions, assign, capacity_of, limit_capacity, route
from qwen_jax.training import router_figures as figures
from qwen_jax.training.balancing import DOMAIN, BalanceOptions
from qwen_jax.training.objective import Batch, TrainOptions
from qwen_jax.training.routing_sums import ALL_TOKENS, Grouping, sum_routing
from qwen_jax.training.train_step import init_train_state, make_evaluation, make_train_step
from tests.sharding.models import CONFIGS, one_device, random_batch

L, B, T, E, K = 2, 6, 9, 8, 3
SPEC = MoeSpec((0, 1), E, K, intermediate_size=8, renormalise=True)
# Of the second of four there is no row.
DOMAINS = np.array([0, 2, 2, 0, 3, 2])


# Of loads.


def gini(loads):
    pairs = sum(abs(int(a) - int(b)) for a, b in itertools.product(loads, loads))
    return pairs / (2 * len(loads) * max(loads.sum(), 1))


def overload(loads, devices):
    size, shares = len(loads) // devices, []
    for device in range(devices):
        shares.append(sum(loads[device * size : (device + 1) * size]))
    return max(shares) / np.mean(shares) - 1


def drops(loads, factor):
    capacity, dropped = math.ceil(factor * loads.sum() / len(loads)), 0
    for load in loads:
        dropped += max(load - capacity, 0)
    return dropped / loads.sum()


BY_HAND = {
    "max_vio": lambda loads: (loads.max() - loads.mean()) / loads.mean(),
    "load_entropy": lambda loads: scipy.stats.entropy(loads, base=len(loads)),
    "load_cv": scipy.stats.variation,
    "load_gini": gini,
    "dead_experts": lambda loads: sum(load < 0.01 * loads.mean() for load in loads),
}
# Even use, an expert with all, some without any, and one just short of a hundredth of its share.
LOADS = {
    "random": np.random.default_rng(0).integers(0, 90, E),
    "skewed": np.array([3, 900, 0, 0, 41, 2, 0, 700]),
    "nearly dead": np.array([99, 101, 9, 10, 50_000, 10_000, 10_000, 9_731]),
}


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_figure_of_loads_is_that_of_a_loop(name, loads):
    both = jnp.stack([loads, loads[::-1]])
    expected = BY_HAND[name](loads)
    np.testing.assert_allclose(of_loads(both)[name], [expected] * 2, rtol=1e-5)


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_experts_wait_for_the_busiest_device(loads):
    for devices in (1, 2, 4, 8):
        expected = overload(loads, devices)
        ours = figures.overload(jnp.asarray(loads), devices)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)
    assert figures.shared_devices(8) == (2, 4, 8)
    assert figures.shared_devices(60) == (2, 4)
    assert figures.shared_devices(128) == (2, 4, 8, 16, 32, 64)
    assert figures.shared_devices(5) == ()


@pytest.mark.parametrize("factor", figures.CAPACITY_FACTORS)
def test_what_a_capacity_would_drop_is_what_one_drops(factor):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1, (1, 61, E)) + rng.normal(0, 1.5, E)
    real = rng.uniform(size=(1, 61)) < 0.8
    routing = route(jnp.asarray(logits, jnp.float32), jnp.eye(E), SPEC, real)
    capacity = capacity_of(int(real.sum()), SPEC, factor)
    dropped = limit_capacity(routing, capacity, real).dropped
    assert dropped > 5
    found = figures.load_figures(routing.counts)[f"drop_{factor:g}"]
    np.testing.assert_allclose(found, dropped / (K * real.sum()), rtol=1e-6)


def of_loads(loads):
    """All figures of loads, [E] or with leading axes."""
    shared = {f"overload_{devices}": figures.overload(loads, devices) for devices in (2, 4, 8)}
    return {"max_vio": figures.max_violation(loads), **figures.load_figures(loads), **shared}


def test_even_use_and_collapse_have_the_figures_that_they_must():
    even, collapsed = of_loads(jnp.full(E, 40)), of_loads(jnp.eye(E, dtype=int)[5] * 320)
    wanted = dict.fromkeys(even, 0.0) | {"load_entropy": 1.0}
    assert jax.tree.map(float, even) == pytest.approx(wanted, abs=1e-6)
    wanted = {
        "max_vio": E - 1,
        "load_entropy": 0,
        "load_cv": (E - 1) ** 0.5,
        "load_gini": 1 - 1 / E,
        "dead_experts": E - 1,
        "drop_1": 1 - 1 / E,
        "drop_1.25": 1 - 1.25 / E,
        "drop_2": 1 - 2 / E,
        "overload_2": 1,
        "overload_4": 3,
        "overload_8": 7,
    }
    assert jax.tree.map(float, collapsed) == pytest.approx(wanted, abs=1e-6)


def test_without_any_load_every_figure_is_0():
    for name, value in of_loads(jnp.zeros(E, int)).items():
        assert value == 0, name
    assert figures.load_figures(jnp.array([7]))["load_entropy"] == 1
    assert figures.information(jnp.zeros((3, E), int)) == 0


# Of pairs.


def information(joint):
    """Mutual information in bits, by its definition."""
    joint = joint / joint.sum()
    total = 0.0
    for d, e in np.argwhere(joint > 0):
        total += joint[d, e] * np.log2(joint[d, e] / (joint[d].sum() * joint[:, e].sum()))
    return total


def test_information_is_what_an_expert_tells_of_a_domain():
    rng = np.random.default_rng(2)
    joint = rng.integers(0, 50, (2, 5, E)) * (rng.uniform(size=(2, 5, E)) < 0.5)
    expected = [information(one) for one in joint]
    np.testing.assert_allclose(figures.information(jnp.asarray(joint)), expected, rtol=1e-5)
    # 4 domains with two experts each, used alike: 2 bits. All domains the same way: none.
    apart = np.kron(np.eye(4, dtype=int), [3, 3])
    np.testing.assert_allclose(figures.information(jnp.asarray(apart)), 2, rtol=1e-6)
    alike = np.outer([1, 5, 2], rng.integers(1, 9, E))
    np.testing.assert_allclose(figures.information(jnp.asarray(alike)), 0, atol=1e-6)


def together(experts):
    """Tokens that chose both, by a loop."""
    found = np.zeros((E, E), int)
    for token in experts:
        for a, b in itertools.product(token, token):
            found[a, b] += 1
    return found


# Of all tokens.


def figures_by_hand(logits, experts, micro, domains):
    """One layer's, of real tokens: logits [N, E], experts [N, k], the numbers of their groups."""
    logits = logits.astype(np.float64)
    loads = np.bincount(experts.ravel(), minlength=E)
    found = {
        "load": loads / loads.mean(),
        "max_vio": loads.max() / loads.mean() - 1,
        "load_entropy": scipy.stats.entropy(loads) / np.log(E),
        "load_cv": loads.std() / loads.mean(),
        "load_gini": gini(loads),
        "dead_experts": sum(load < 0.01 * loads.mean() for load in loads),
    }
    for factor in (1, 1.25, 2):
        found[f"drop_{factor}"] = drops(loads, factor)
    for devices in (2, 4, 8):
        found[f"overload_{devices}"] = overload(loads, devices)
    batches = [experts[micro == group].ravel() for group in np.unique(micro)]
    loads = np.stack([np.bincount(own, minlength=E) for own in batches])
    found["max_vio_micro"] = np.mean(loads.max(1) / loads.mean(1) - 1)
    rows = {name: [] for name in ("router_entropy", "top_probability", "margin", "log_z")}
    variances = []
    for x, chosen in zip(logits, experts, strict=True):
        p, others = scipy.special.softmax(x), np.setdiff1d(np.arange(E), chosen)
        rows["router_entropy"].append(scipy.stats.entropy(p))
        rows["top_probability"].append(p.max())
        rows["margin"].append(p[chosen].min() - p[others].max())
        rows["log_z"].append(np.log(np.exp(x).sum()))
        variances.append(x.var())
    found |= {name: np.mean(values) for name, values in rows.items()}
    found["logit_scale"] = np.sqrt(np.mean(variances))
    pairs = together(experts)
    shares = [pairs[a, b] / max(pairs[a, a], 1) for a in range(E) for b in range(E) if a != b]
    found["pair_share"] = max(shares)
    joint = np.stack([np.bincount(experts[domains == d].ravel(), minlength=E) for d in range(4)])
    found["domain_information"] = information(joint)
    found["domain_share"] = np.stack([loads / max(loads.sum(), 1) for loads in joint])
    return found


def check_figures(ours, logits, experts, real, rows=2, domains=DOMAINS, but=()):
    """All layers' figures of routers' logits [L, B, T, E], against the loops."""
    tokens = np.argwhere(real)
    micro, kinds = tokens[:, 0] // rows, domains[tokens[:, 0]]
    for i, (x, chosen) in enumerate(zip(logits, experts, strict=True)):
        expected = figures_by_hand(np.asarray(x)[real], np.asarray(chosen)[real], micro, kinds)
        assert ours.keys() == expected.keys() | set(but)
        for name in expected.keys() - set(but):
            np.testing.assert_allclose(
                ours[name][i], expected[name], rtol=1e-4, atol=1e-6, err_msg=name
            )


def draw():
    """Routers of which some experts have no token, and a batch with a micro-batch of padding."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1, (L, B, T, E)) + rng.normal(0, 1, (L, B, 1, E))
    logits[..., 6] -= 9
    real = np.arange(T) < np.array([9, 5, 0, 0, 7, 9])[:, None]
    return logits.astype(np.float32), real


def sums_of(logits, real, bias=None):
    groupings = ALL_TOKENS | {
        "micro": Grouping(jnp.arange(B) // 2, 3),
        DOMAIN: Grouping(jnp.asarray(DOMAINS), 4),
    }
    found = []
    for x in logits:
        routing = route(jnp.asarray(x), jnp.eye(E), SPEC, real, bias)
        found.append((sum_routing(routing, real, groupings, each=True), routing.experts))
    sums, experts = zip(*found, strict=True)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums), experts


@pytest.mark.parametrize("biased", [False, True])
def test_every_figure_of_a_batch_is_that_of_a_loop_over_its_tokens(biased):
    logits, real = draw()
    bias = jnp.asarray(np.random.default_rng(4).normal(0, 0.3, E)) if biased else None
    sums, experts = sums_of(logits, real, bias)
    ours = figures.router_figures(sums, SPEC)
    check_figures(ours, logits, experts, real)
    assert ours["dead_experts"][0] >= (not biased)
    # Where another score than the probability chooses, the choice is not of the likeliest.
    assert ours["margin"].min() > 0 or biased
    assert ours["margin"].max() < 0 or not biased


def test_pairs_are_counted_by_token():
    logits, real = draw()
    sums, experts = sums_of(logits, real)
    for i in range(L):
        expected = together(np.asarray(experts[i])[real])
        np.testing.assert_array_equal(sums.each.together[i], expected)
        own = np.maximum(np.diag(expected), 1)[:, None]
        ours = figures.co_activation(sums.each.together)[i]
        np.testing.assert_allclose(ours, expected / own, rtol=1e-6)


def test_a_token_that_all_or_no_experts_take_has_no_margin():
    logits = jnp.asarray(np.random.default_rng(5).normal(0, 2, (1, 12, E)), jnp.float32)
    routing = assign(logits, SPEC, RouterOptions(assignment=Assignment.EXPERT_CHOICE))
    experts = routing.experts.at[0, 0].set(jnp.arange(E)).at[0, 1].set(E)
    each = sum_routing(routing.replace(experts=experts), each=True).each
    expected = 0.0
    for x, chosen in zip(np.asarray(logits[0]), np.asarray(experts[0]), strict=True):
        p, chosen = scipy.special.softmax(x), chosen[chosen < E]
        others = np.setdiff1d(np.arange(E), chosen)
        if len(chosen) and len(others):
            expected += p[chosen].min() - p[others].max()
    np.testing.assert_allclose(each.margin, expected, rtol=1e-5)


def test_figures_of_padding_alone_are_numbers():
    logits, real = draw()
    sums, _ = sums_of(logits, np.zeros_like(real))
    for name, values in figures.router_figures(sums, SPEC).items():
        assert np.isfinite(values).all(), name


def test_figures_pull_at_no_router():
    logits, real = draw()

    def total(logits):
        each = sums_of(logits, real)[0].each
        return sum(leaf.sum() for leaf in jax.tree.leaves(each) if leaf.dtype == jnp.float32)

    assert not jax.grad(total)(jnp.asarray(logits)).any()


# Of a step and of an evaluation.


@pytest.fixture(scope="module")
def model():
    return one_device(CONFIGS["moe"])


OPTIONS = TrainOptions(
    dtype="float32",
    remat="none",
    block_size=16,
    balance=BalanceOptions(microbatch_rows=2, num_domains=4),
)


def batch_of(seed):
    ids, _ = random_batch(CONFIGS["moe"], B, T, seed)
    return Batch(ids, attention_mask=draw()[1], domains=jnp.asarray(DOMAINS))


def routed(model, batch):
    """Logits and experts of both layers, of a plain pass."""
    model, params = model
    router = model.apply({"params": params}, batch.input_ids, batch.attention_mask).router
    return [routing.logits for routing in router], [routing.experts for routing in router]


@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_reports_the_figures_of_its_batch(model, parts):
    batch, optimiser = batch_of(7), optax.sgd(1e-3)
    state = init_train_state(model[0], optimiser, params=model[1])
    options = dataclasses.replace(OPTIONS, microbatches=parts)
    metrics = make_train_step(model[0], optimiser, options)(state, batch)[1]
    check_figures(metrics["router"], *routed(model, batch), batch.attention_mask)


def test_a_step_without_figures_reports_none(model):
    balance = BalanceOptions(figures=False)
    optimiser, options = optax.sgd(1e-3), dataclasses.replace(OPTIONS, balance=balance)
    step = make_train_step(model[0], optimiser, options)
    state = init_train_state(model[0], optimiser, params=model[1])
    metrics = jax.eval_shape(lambda state, batch: step(state, batch)[1], state, batch_of(7))
    assert "router" not in metrics and "expert_counts" in metrics


def test_an_evaluation_tells_all_batches_together_from_each_by_itself(model):
    batches = [batch_of(7), batch_of(8), batch_of(9)]
    found = make_evaluation(model[0], OPTIONS)(model[1], batches)
    ours, real = dict(found["eval_router"]), batches[0].attention_mask
    each = [routed(model, batch) for batch in batches]
    logits, experts = (
        [np.concatenate(layers) for layers in zip(*(one[i] for one in each), strict=True)]
        for i in range(2)
    )
    domains, all_real = np.tile(DOMAINS, 3), np.tile(real, (3, 1))
    # Micro-batches are of the batches that they are in, whose rows they divide.
    check_figures(ours, logits, experts, all_real, domains=domains, but=["max_vio_batch"])
    for i in range(L):
        own = []
        for _, chosen in each:
            loads = np.bincount(np.asarray(chosen[i])[real].ravel(), minlength=E)
            own.append(loads.max() / loads.mean() - 1)
        np.testing.assert_allclose(ours["max_vio_batch"][i], np.mean(own), rtol=1e-5)
        # Fewer tokens are never more even; as even only where the same expert is the busiest.
        assert ours["max_vio"][i] <= ours["max_vio_batch"][i] + 1e-6 < ours["max_vio_micro"][i]
    assert (ours["max_vio"] < ours["max_vio_batch"] - 1e-3).any()
    assert "eval_expert_counts" not in found


def test_packed_figures_are_those_that_were_packed():
    rng = np.random.default_rng(0)
    shapes = {"load": (2, 3), "max_vio": (2,), "domain_share": (2, 4, 3), "none": (0,)}
    given = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    packed = jax.device_get(
        jax.jit(lambda: figures.pack({name: jnp.asarray(a) for name, a in given.items()}))()
    )
    assert list(packed) == list(given) and len(packed) == 4 and "other" not in packed
    for name, figure in given.items():
        np.testing.assert_array_equal(packed[name], figure)
    with pytest.raises(KeyError, match="other"):
        packed["other"]
    assert jax.tree.leaves(packed)[0].shape == (2 * 3 + 2 + 2 * 4 * 3,)
