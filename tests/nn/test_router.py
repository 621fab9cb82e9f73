"""Which experts a token goes to: by a bias of the scores, with noise, and together with others.

Truth are loops in float64, and torch's gradients with the choice held fixed.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import torch
from scipy.optimize import linear_sum_assignment

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.moe import Dispatch
from qwen_jax.nn.router import Assignment, RouterOptions, assign, route
from qwen_jax.nn.sparse_moe import SparseMoe
from qwen_jax.sharding.axes import as_mesh
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.forward import as_computed, forward, with_groups
from qwen_jax.training.objective import Batch, TrainOptions
from qwen_jax.training.train_step import (
    RouterLearnsNothing,
    init_train_state,
    make_evaluation,
    make_train_step,
)
from tests.nn.expert_layers import D, close, make_spec, random_layer
from tests.sharding.models import CONFIGS, make_config, one_device, random_batch, random_params

JOINT = [a for a in Assignment if a is not Assignment.TOP_K]
EXACT = TrainOptions(dtype="float32", scan=False, remat="none", block_size=16)


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def best(scores, k):
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def weights_of(probabilities, experts, renormalise):
    """Of the chosen experts; 0 for E, which is none. A loop over tokens."""
    E = probabilities.shape[-1]
    weights = np.zeros(experts.shape)
    for token in np.ndindex(experts.shape[:-1]):
        for j, e in enumerate(experts[token]):
            weights[token][j] = probabilities[token][e] if e < E else 0
        if renormalise and weights[token].any():
            weights[token] /= weights[token].sum()
    return weights


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# A bias of the scores.


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_bias_takes_part_in_the_choice_and_not_in_the_weights(renormalise):
    spec = make_spec(8, 3, renormalise)
    x, router, _ = random_layer(spec, 60)
    x, bias, real = x.reshape(3, 20, D), 0.2 * draw(1, 8), draw(2, 3, 20) > -0.5
    routing = jax.jit(route, static_argnames="spec")(x, router, spec, real, bias)
    p = softmax(x.astype(np.float64) @ router.T.astype(np.float64))
    experts = best(p + bias, 3)
    np.testing.assert_array_equal(routing.experts, experts)
    np.testing.assert_allclose(routing.weights, weights_of(p, experts, renormalise), rtol=1e-5)
    np.testing.assert_array_equal(routing.counts, np.bincount(experts[real].ravel(), minlength=8))
    assert 0.3 < (experts != best(p, 3)).any(-1).mean() < 1


@pytest.mark.parametrize("renormalise", [False, True])
def test_no_gradient_reaches_a_bias_and_the_routers_is_that_of_the_weights(renormalise):
    spec = make_spec(8, 3, renormalise)
    x, router, _ = random_layer(spec, 40)
    bias, cotangent = 0.2 * draw(1, 8), draw(3, 40, 3)

    def ours(x, router, bias):
        return jnp.sum(route(x, router, spec, bias=bias).weights * cotangent)

    gradients = jax.jit(jax.grad(ours, (0, 1, 2)))(x, router, bias)
    xs, rows = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, router))
    p = torch.softmax(xs @ rows.T, -1)
    experts = best(p.detach().numpy() + bias, 3)
    chosen = p.gather(1, torch.as_tensor(experts))
    if renormalise:
        chosen = chosen / chosen.sum(1, keepdim=True)
    (chosen * torch.as_tensor(cotangent)).sum().backward()
    close(gradients[0], xs.grad.numpy(), 1e-5)
    close(gradients[1], rows.grad.numpy(), 1e-5)
    assert not gradients[2].any()


# Noise.


def test_noise_is_added_to_the_logits_that_are_compared_and_weighed():
    spec = make_spec(8, 3)
    x, router, _ = random_layer(spec, 40)
    noise = draw(4, 40, 8)
    routing = route(x, router, spec, noise=noise)
    logits = x.astype(np.float64) @ router.T.astype(np.float64)
    p = softmax(logits + noise)
    np.testing.assert_array_equal(routing.experts, best(p, 3))
    np.testing.assert_allclose(routing.weights, weights_of(p, best(p, 3), True), rtol=1e-5)
    assert (best(p, 3) != best(logits, 3)).any()


def layer_config(spec) -> ModelConfig:
    return make_config(hidden_size=D, moe=dataclasses.replace(spec, layers=(0,)))


def layer_params(spec, seed=0):
    _, router, experts = random_layer(spec, 1, seed)
    experts = {name: {"weight": leaf} for name, leaf in experts.items()}
    return {"gate": {"weight": router}, "experts": experts}


@pytest.mark.parametrize("assignment", Assignment)
def test_noise_is_normal_with_the_deviation_that_is_asked_for(assignment):
    spec, s = make_spec(8, 3), 0.7
    params, x = layer_params(spec), random_layer(spec, 4 * 64)[0].reshape(4, 64, D)
    layer = SparseMoe(layer_config(spec), router=RouterOptions(assignment=assignment, noise=s))
    clean = layer.apply({"params": params}, x)[1].logits
    noisy = layer.apply({"params": params}, x, rngs={"router": jax.random.key(3)})[1].logits
    np.testing.assert_allclose(clean, x @ params["gate"]["weight"].T, rtol=1e-4, atol=1e-5)
    found = np.asarray(noisy - clean, np.float64).ravel()
    assert scipy.stats.kstest(found / s, "norm").pvalue > 0.01
    # Of 2,048 numbers: 4 deviations of their mean and of their deviation.
    assert abs(found.mean()) < 4 * s / found.size**0.5
    assert abs(found.std() / s - 1) < 4 / (2 * found.size) ** 0.5


def flat_routers(params):
    """Routers of zeros, whose logits are the noise alone."""

    def flatten(path, leaf):
        return 0 * leaf if "gate']['weight" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(flatten, params)


def sums_in_training(model, params, batch, options):
    """Of all routers, each row of the batch counted by itself."""

    @jax.jit
    def run(params, batch):
        noisy = model.clone(router=options.router)
        batch = with_groups(noisy, batch, options)
        return forward(noisy, as_computed(noisy, params, options), batch, options)[2]

    return run(params, batch)


def test_each_layer_and_each_batch_has_noise_of_its_own_and_the_same_batch_the_same():
    s, E = 0.5, 8
    model, params = one_device(dataclasses.replace(CONFIGS["moe"], mtp_layers=2))
    options = dataclasses.replace(
        EXACT,
        router=RouterOptions(noise=s),
        balance=BalanceOptions(loss=1.0, group="sequence"),
    )
    params, ids = flat_routers(params), random_batch(model.config, 4, 40)[0]
    swapped = ids.copy()
    swapped[1, [5, 6]] = swapped[1, [6, 5]]
    assert (swapped != ids).any()
    first, again, other = (
        sums_in_training(model, params, Batch(rows), options) for rows in (ids, ids, swapped)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    # Mean probabilities of each row, as far as they are not even: all layers of both batches.
    found = [
        (np.asarray(g.probabilities) / np.asarray(g.tokens)[..., None] - 1 / E).reshape(4, -1)
        for g in (first.groups["sequence"], other.groups["sequence"])
    ]
    alike = np.corrcoef(np.concatenate(found))
    assert alike.shape == (8, 8)
    # Of 32 numbers that are independent; 1 where two are the same.
    assert np.abs(alike - np.eye(8)).max() < 0.65
    # The mean over tokens of the variance over E numbers.
    variance = first.each.logit_variance / first.tokens
    np.testing.assert_allclose(variance, s**2 * (1 - 1 / E), rtol=0.15)


@pytest.fixture(scope="module")
def every_other_layer_sparse():
    """Two repeats of a dense and a sparse layer: a layer's number is not its place in a scan."""
    config = CONFIGS["moe"]
    moe = dataclasses.replace(config.moe, layers=(1, 3))
    model, params = one_device(
        dataclasses.replace(config, layer_types=config.layer_types * 2, moe=moe)
    )
    return model, params, Batch(random_batch(model.config, 4)[0])


def update(model, params, batch, options):
    """By a step of plain gradient descent, whose update is the gradient; and its metrics."""
    state = init_train_state(model, optax.sgd(1.0), params=params)
    state, metrics = make_train_step(model, optax.sgd(1.0), options)(state, batch)
    return jax.tree.map(lambda a, b: a - b, params, state.whole()), metrics


NOISY = dataclasses.replace(
    EXACT, router=RouterOptions(noise=1.0), balance=BalanceOptions(loss=0.5, figures=False)
)


@pytest.fixture(scope="module")
def noisy_update(every_other_layer_sparse):
    return update(*every_other_layer_sparse, NOISY)


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"scan": True, "remat": "full"}], ids=str)
def test_noise_is_the_same_in_a_scan_and_where_layers_run_again(
    every_other_layer_sparse, noisy_update, changes
):
    ours, metrics = update(*every_other_layer_sparse, dataclasses.replace(NOISY, **changes))
    expected, expected_metrics = noisy_update
    np.testing.assert_array_equal(metrics["expert_counts"], expected_metrics["expert_counts"])
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), ours, expected)


def test_noise_changes_what_is_learned_and_no_evaluation(every_other_layer_sparse, noisy_update):
    model, params, batch = every_other_layer_sparse
    silent = dataclasses.replace(NOISY, router=RouterOptions())
    noisy, clean, in_training = (
        make_evaluation(model, options, at_rest=at_rest)(params, [batch])
        for options, at_rest in ((NOISY, True), (silent, True), (NOISY, False))
    )
    assert noisy == clean
    assert in_training["eval_loss"] == pytest.approx(float(noisy_update[1]["loss"]), rel=1e-5)
    assert abs(in_training["eval_loss"] - clean["eval_loss"]) > 1e-3


# Several tokens at once.


def in_groups(logits, rows, choose):
    """`choose` of each group of rows by itself, [N, k] of [N, E]."""
    B, T, E = logits.shape
    found = [choose(group.reshape(-1, E)) for group in np.split(logits, B // rows)]
    return np.concatenate(found).reshape(B, T, -1)


def by_sinkhorn(k):
    def choose(logits):
        plan = np.exp(logits.astype(np.float64))
        for _ in range(8):
            plan /= plan.sum(1, keepdims=True)
            plan /= plan.sum(0)
        return best(plan / plan.sum(1, keepdims=True), k)

    return choose


def by_experts(k):
    def choose(logits):
        N, E = logits.shape
        p, taken = softmax(logits), np.full((N, E), E)
        for e in range(E):
            taken[best(p[:, e], N * k // E), e] = e
        return taken

    return choose


def by_seats(logits):
    """Each expert has as many seats as its even share: the assignment of BASE layers."""
    N, E = logits.shape
    _, seats = linear_sum_assignment(np.repeat(logits, N // E, axis=1), maximize=True)
    return (seats // (N // E))[:, None]


RENDERINGS = {
    "sinkhorn": (2, by_sinkhorn(2)),
    "expert_choice": (2, by_experts(2)),
    "base": (1, by_seats),
}


@pytest.mark.parametrize(("rows", "renormalise"), [(None, True), (1, False), (2, True)])
@pytest.mark.parametrize("assignment", JOINT)
def test_groups_of_rows_are_assigned_each_by_itself(assignment, rows, renormalise):
    k, choose = RENDERINGS[assignment]
    logits = 2 * draw(5, 4, 12, 6)
    options = RouterOptions(assignment=assignment, rows=rows)
    routing = assign(jnp.asarray(logits), make_spec(6, k, renormalise), options)
    experts = in_groups(logits, rows or 4, choose)
    np.testing.assert_array_equal(routing.experts, experts)
    weights = weights_of(softmax(logits), experts, renormalise)
    np.testing.assert_allclose(routing.weights, weights, rtol=1e-5)
    chosen = experts[experts < 6]
    np.testing.assert_array_equal(routing.counts, np.bincount(chosen, minlength=6))
    assert routing.dropped == 0 and routing.experts.dtype == jnp.int32


def collapsed(T=24, B=2, E=6):
    """Logits that nearly all prefer the same experts."""
    return draw(6, B, T, E) + 3 * draw(7, E)


@pytest.mark.parametrize("assignment", JOINT)
def test_experts_are_used_evenly_however_skewed_the_router_is(assignment):
    spec, logits = make_spec(6, 2), collapsed(T=96)
    real = np.arange(96) < np.array([[96], [48]])
    options = RouterOptions(assignment=assignment, rows=1)
    routing = assign(jnp.asarray(logits), spec, options, jnp.asarray(real))
    experts = np.asarray(routing.experts)
    assert (experts[~real] == 6).all() and not np.asarray(routing.weights)[~real].any()
    for b in range(2):
        share = real[b].sum() * 2 // 6
        alone = np.bincount(best(logits[b], 2)[real[b]].ravel(), minlength=6)
        assert alone.max() > 2.5 * share
        loads = np.bincount(experts[b][experts[b] < 6], minlength=6)
        if assignment is Assignment.SINKHORN:
            # Its plan is even; what is largest of each token's part is so nearly.
            assert loads.max() < 1.5 * share
        else:
            assert (loads == share).all()


@pytest.mark.parametrize("assignment", JOINT)
@pytest.mark.parametrize("renormalise", [False, True])
def test_the_gradient_is_that_of_the_weights_with_the_choice_held_fixed(assignment, renormalise):
    spec, logits = make_spec(6, 2, renormalise), collapsed()
    options = RouterOptions(assignment=assignment)
    experts = np.asarray(assign(jnp.asarray(logits), spec, options).experts)
    cotangent = draw(8, *experts.shape)

    def ours(logits):
        return jnp.sum(assign(logits, spec, options).weights * cotangent)

    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    p = torch.softmax(theirs, -1)
    kept = torch.as_tensor(experts < 6)
    chosen = p.gather(-1, torch.as_tensor(np.minimum(experts, 5)).long()) * kept
    if renormalise:
        total = chosen.sum(-1, keepdim=True)
        chosen = chosen / torch.where(total > 0, total, 1)
    (chosen * torch.as_tensor(cotangent)).sum().backward()
    expected = theirs.grad.numpy()
    assert np.abs(expected).max() > 0.05
    close(jax.jit(jax.grad(ours))(logits), expected, 1e-5)


def mixed(params, x, experts, weights):
    """The weighted sum of each token's experts, by a loop over tokens in float64."""
    stacks = {name: leaf["weight"].astype(np.float64) for name, leaf in params["experts"].items()}
    out = np.zeros(x.shape)
    for token in np.ndindex(x.shape[:-1]):
        for e, weight in zip(experts[token], weights[token], strict=True):
            if e < len(stacks["gate_proj"]):
                gate, up = (stacks[name][e] @ x[token] for name in ("gate_proj", "up_proj"))
                out[token] += weight * (stacks["down_proj"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("method", [m for m in Dispatch if m is not Dispatch.CAPACITY])
def test_a_token_that_no_expert_chooses_passes_by(method):
    spec = make_spec(6, 1)
    params, x = layer_params(spec), random_layer(spec, 36)[0].reshape(2, 18, D)
    options = RouterOptions(assignment=Assignment.EXPERT_CHOICE, rows=1)
    layer = SparseMoe(layer_config(spec), method, options)
    y, _ = jax.jit(layer.apply)({"params": params}, x)
    logits = x.astype(np.float64) @ params["gate"]["weight"].T
    experts = in_groups(logits, 1, by_experts(1))
    close(y, mixed(params, x, experts, weights_of(softmax(logits), experts, True)))
    numbers = (experts < 6).sum(-1)
    # Some with none, some with several, and on average k.
    assert numbers.min() == 0 and numbers.max() > 1 and numbers.mean() == 1
    assert not np.asarray(y)[numbers == 0].any()


@pytest.mark.parametrize("assignment", JOINT)
def test_the_router_of_a_layer_learns_by_the_weights_of_what_was_chosen(assignment):
    spec = make_spec(6, 2)
    params, x = layer_params(spec), random_layer(spec, 24)[0].reshape(2, 12, D)
    layer = SparseMoe(layer_config(spec), router=RouterOptions(assignment=assignment))
    cotangent = draw(9, *x.shape)

    def ours(params):
        y, routing = layer.apply({"params": params}, x)
        return jnp.sum(y * cotangent), routing

    gradients, routing = jax.jit(jax.grad(ours, has_aux=True))(params)
    experts = np.asarray(routing.experts)
    router = params["gate"]["weight"].astype(np.float64)

    def theirs(router):
        weights = weights_of(softmax(x @ router.T), experts, True)
        return np.sum(mixed(params, x, experts, weights) * cotangent)

    # Differences along a few directions.
    ours, scale = np.asarray(gradients["gate"]["weight"], np.float64), 1e-5
    assert np.abs(ours).max() > 1e-2
    for seed in range(3):
        along = draw(10 + seed, *router.shape)
        slope = (theirs(router + scale * along) - theirs(router - scale * along)) / (2 * scale)
        np.testing.assert_allclose(np.sum(ours * along), slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("assignment", JOINT)
def test_what_a_mesh_adds_to_a_batch_takes_no_part_in_an_assignment(assignment):
    config = CONFIGS["moe"]
    # 3 rows for 4 devices; rows of 12 columns with padding on either side.
    (ids, mask), params = random_batch(config), random_params(config)
    model = Decoder(config, router=RouterOptions(assignment=assignment))
    expected = model.apply({"params": params}, ids, mask)
    ours = model.clone(mesh=as_mesh("data:2,expert:2")).apply({"params": params}, ids, mask)
    for one, other in zip(ours.router, expected.router, strict=True):
        np.testing.assert_array_equal(one.experts[mask], other.experts[mask])
        np.testing.assert_array_equal(one.counts, other.counts)
    close(ours.logits[mask], expected.logits[mask], 1e-5)


FINE = dataclasses.replace(
    CONFIGS["moe"], moe=dataclasses.replace(CONFIGS["moe"].moe, num_experts=16)
)
TEXT = np.random.default_rng(12).integers(0, FINE.vocab_size, (1, 64))


def changed_before(model, params, last=4):
    """What part of the positions before the last few sees that these are others."""
    other = TEXT.copy()
    other[:, -last:] = (TEXT[:, -last:] + 7) % FINE.vocab_size
    run = jax.jit(lambda ids: model.apply({"params": params}, ids).logits[0])
    difference = np.abs(np.asarray(run(TEXT)) - np.asarray(run(other))).max(-1)
    assert difference[-last:].min() > 0.1
    return np.mean(difference[:-last] > 1e-4)


@pytest.mark.parametrize("assignment", JOINT)
def test_joint_assignments_leak_the_future(assignment):
    model = Decoder(FINE, router=RouterOptions(assignment=assignment))
    # Where experts choose the notes count 83% behind two layers.
    assert changed_before(model, random_params(FINE)) > 0.6


@pytest.mark.parametrize("how", ["likeliest experts", "bias", "capacity", "hardly any room"])
def test_other_choices_do_not_leak_the_future(how):
    moe = dataclasses.replace(FINE.moe, score_bias=how == "bias")
    config = dataclasses.replace(FINE, moe=moe)
    factor = {"capacity": 0.8, "hardly any room": 0.05}.get(how)
    model, params = (
        Decoder(config, router=RouterOptions(capacity_factor=factor)),
        random_params(config),
    )
    if factor is not None:
        router = jax.jit(lambda ids: model.apply({"params": params}, ids).router)(TEXT)
        assert min(routing.dropped for routing in router) > 10
    assert changed_before(model, params) == 0


# What cannot be.


def test_rows_that_do_not_divide_are_refused():
    options = RouterOptions(assignment=Assignment.BASE, rows=2)
    with pytest.raises(UserError, match=r"^router.rows = 2 do not divide the batch's 3 rows"):
        assign(jnp.zeros((3, 4, 6)), make_spec(), options)


@pytest.mark.parametrize("assignment", JOINT)
def test_a_joint_assignment_in_a_model_with_a_bias_of_scores_is_refused(assignment):
    spec = dataclasses.replace(make_spec(), score_bias=True)
    layer = SparseMoe(layer_config(spec), router=RouterOptions(assignment=assignment))
    with pytest.raises(UserError, match=rf"^router.assignment = {assignment}: .* bias of its"):
        layer.init(jax.random.key(0), jnp.zeros((1, 6, D)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"assignment": "hash"}, "assignment = hash is not supported; known: top_k, expert_choice"),
        ({"noise": -0.1}, "noise = -0.1 must be finite, at least 0"),
        ({"noise": float("nan")}, "noise = nan must be finite"),
        ({"assignment": "base", "rows": 0}, "rows = 0 must be at least 1"),
        ({"rows": 2}, "rows = 2: with top_k every token chooses by itself"),
        (
            {"assignment": "expert_choice", "capacity_factor": 1.0},
            "capacity_factor: with expert_choice an expert takes its share",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=f"^{message}"):
        RouterOptions(**fields)


# One choice.


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_router_whose_one_choice_weighs_1_learns_nothing_and_says_so(renormalise):
    config = CONFIGS["moe"]
    moe = dataclasses.replace(config.moe, num_experts_per_tok=1, renormalise=renormalise)
    model, params = one_device(dataclasses.replace(config, moe=moe))
    options = dataclasses.replace(EXACT, balance=BalanceOptions(loss=0.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = make_train_step(model, optax.sgd(1.0), options)
    said = [w for w in caught if w.category is RouterLearnsNothing]
    assert len(said) == renormalise
    state = init_train_state(model, optax.sgd(1.0), params=params)
    state, _ = step(state, Batch(random_batch(config)[0]))
    for name in ("layers_0", "layers_1"):
        before, after = (tree[name]["mlp"]["gate"]["weight"] for tree in (params, state.params))
        gradient = np.abs(np.asarray(before) - np.asarray(after)).max()
        # Not 0: what is divided by itself is 1 to rounding.
        assert gradient < 1e-6 if renormalise else gradient > 1e-3
    if renormalise:
        assert "num_experts_per_tok = 1 with renormalise" in str(said[0].message)
        assert said[0].filename == __file__
