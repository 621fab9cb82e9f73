"""Balancing losses of tokens that are counted in groups, against loops and the papers' numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from qwen_jax.config import MoeSpec
from qwen_jax.errors import UserError
from qwen_jax.nn.router import Assignment, RouterOptions, limit_capacity, route
from qwen_jax.sharding.axes import Layout, as_mesh
from qwen_jax.training.balancing import (
    BalanceOptions,
    balance_loss,
    grouping_of,
    make_grouping,
    similarity_loss,
)
from qwen_jax.training.forward import as_computed, forward, with_groups
from qwen_jax.training.objective import Batch, TrainOptions, router_loss
from qwen_jax.training.routing_sums import ALL_TOKENS, sum_routing
from qwen_jax.training.stacking import stack_layers
from qwen_jax.training.train_step import init_train_state, make_evaluation, make_train_step
from tests.sharding.models import CONFIGS, one_device, random_batch

GROUPS = ["sequence", "micro", "device", "global", "shuffled", "buffer"]
L, B, T, E, K = 3, 7, 5, 6, 2
SPEC = MoeSpec((0, 1, 2), E, K, intermediate_size=8, renormalise=True)
DEVICES = 3
# Neither the rows of a micro-batch nor the devices divide the rows.
OPTIONS = BalanceOptions(microbatch_rows=2)
KEY = jax.random.key(3)
EXACT = TrainOptions(dtype="float32", scan=False, remat="none", block_size=16)


def draw():
    """Logits of rows that differ in kind, and which tokens are real: of one row none is."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1, (L, B, T, E)) + rng.normal(0, 1.5, (L, B, 1, E))
    return logits.astype(np.float32), np.arange(T) < np.array([5, 3, 5, 0, 4, 5, 1])[:, None]


def groups_by_hand(group, shape=(B, T), rows=2, devices=DEVICES):
    """int [B, T], the group of each token; what is drawn, as it was drawn."""
    found = np.zeros(shape, int)
    for b in range(shape[0]):
        found[b] = {
            "sequence": b,
            "micro": b // rows,
            "buffer": b // rows,
            "device": b // -(-shape[0] // devices),
        }.get(group, 0)
    if group == "shuffled":
        found = np.asarray(make_grouping(group, shape, OPTIONS, devices, KEY).ids)
    return found


def rendering(logits, real, groups, k=K, form="all", pooling="layer", buffer=False):
    """The loss of torch's logits [L, B, T, E]: a loop over layers, groups and tokens."""
    L, *_, E = logits.shape
    tokens = np.tile(np.flatnonzero(real), (L, 1))
    layers, groups = logits.flatten(1, 2), np.asarray(groups).reshape(-1)
    layers = [(layer[own], groups[own]) for layer, own in zip(layers, tokens, strict=True)]
    if pooling == "model":
        logits, numbers = zip(*layers, strict=True)
        layers = [(torch.cat(logits), np.concatenate(numbers))]
    losses = []
    for logits, numbers in layers:
        p, total = torch.softmax(logits, -1), 0.0
        chosen = np.argsort(-p.detach().numpy(), -1, kind="stable")[:, :k]
        counts, seen = np.zeros(E), 0
        for g in range(groups.max() + 1):
            own = np.flatnonzero(numbers == g)
            if not buffer:
                counts, seen = np.zeros(E), 0
            if not len(own):
                continue
            for t in own:
                seen += 1
                for e in chosen[t][:1] if form == "first" else chosen[t]:
                    counts[e] += 1
            even = seen * (1 if form == "first" else k) / E
            f = torch.as_tensor(counts / even)
            total = total + len(own) * (f * p[own].mean(0)).sum()
        losses.append(total / len(numbers))
    return sum(losses) / len(losses) * (k if pooling == "model" else 1)


def sums_of(logits, real=None, group="global", spec=SPEC, options=OPTIONS, key=KEY):
    """Of layers whose router is the identity."""
    E, name = spec.num_experts, grouping_of(group)
    grouping = make_grouping(name, logits.shape[1:3], options, DEVICES, key)
    layers = [
        sum_routing(route(x, jnp.eye(E), spec, real), real, ALL_TOKENS | {name: grouping})
        for x in logits
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def loss_of(logits, group, real=None, spec=SPEC, **ways):
    return balance_loss(sums_of(logits, real, group, spec, OPTIONS), spec, group, **ways)


@pytest.mark.parametrize("form", ["all", "first"])
@pytest.mark.parametrize("pooling", ["layer", "model"])
@pytest.mark.parametrize("group", GROUPS)
def test_loss_and_gradient_are_those_of_a_loop_over_groups(group, pooling, form):
    logits, real = draw()
    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    groups = groups_by_hand(group)
    expected = rendering(theirs, real, groups, K, form, pooling, group == "buffer")
    expected.backward()
    run = jax.jit(jax.value_and_grad(lambda x: loss_of(x, group, real, form=form, pooling=pooling)))
    loss, gradient = run(logits)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    wanted = theirs.grad.numpy()
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert not np.asarray(gradient)[:, ~real].any()


@pytest.mark.parametrize("group", GROUPS)
def test_the_choices_that_are_counted_have_no_gradient(group):
    """dL/dp of a token is f_i over the number of tokens, by differences with f as it was."""
    logits, real = draw()
    sums = jax.jit(lambda x: sums_of(x, real, group))(logits)
    name = grouping_of(group)

    def loss(probabilities):
        own = dataclasses.replace(sums.groups[name], probabilities=probabilities)
        return balance_loss(sums.replace(groups=sums.groups | {name: own}), SPEC, group)

    ours = jax.grad(loss)(sums.groups[name].probabilities)
    counts, tokens = (np.asarray(a) for a in (sums.groups[name].counts, sums.groups[name].tokens))
    if group == "buffer":
        counts, tokens = counts.cumsum(1), tokens.cumsum(1)
    f = counts * E / (K * np.maximum(tokens, 1)[..., None])
    np.testing.assert_allclose(ours, f / real.sum() / L, rtol=1e-5)


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "buffer"])
def test_pooled_groups_are_transformers_loss_of_each(group):
    logits, real = draw()
    expected = 0.0
    for g in np.unique(groups_by_hand(group)):
        own = real & (groups_by_hand(group) == g)
        if own.any():
            layers = tuple(torch.as_tensor(x[own]) for x in logits)
            expected += own.sum() * load_balancing_loss_func(layers, E, K).item() / real.sum()
    ours = loss_of(logits, group, real, pooling="model")
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_of_one_choice_it_is_switchs_loss():
    logits, _ = draw()
    spec = dataclasses.replace(SPEC, num_experts_per_tok=1)
    p = torch.softmax(torch.as_tensor(logits[:1]), -1).flatten(0, 2).double().numpy()
    f = np.bincount(p.argmax(1), minlength=E) / len(p)
    # Equations 4 to 6 without alpha.
    expected = E * np.sum(f * p.mean(0))
    for form in ("all", "first"):
        ours = loss_of(logits[:1], "global", spec=spec, form=form)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_of_first_choices_it_is_gshards_loss():
    logits, _ = draw()
    gates = torch.softmax(torch.as_tensor(logits[:1]), -1).flatten(0, 2).double().numpy()
    S, counts = len(gates), np.bincount(gates.argmax(1), minlength=E)
    # Algorithm 1, whose mean over experts is 1 / E**2 where use is even.
    auxiliary = np.mean(counts / S * gates.mean(0))
    ours = loss_of(logits[:1], "global", form="first")
    np.testing.assert_allclose(ours, E**2 * auxiliary, rtol=1e-5)


@pytest.mark.parametrize("form", ["all", "first"])
@pytest.mark.parametrize("group", GROUPS)
def test_even_use_is_1_and_collapse_the_experts_to_a_choice(group, form):
    t = np.arange(E)
    even = np.zeros((L, B, E, E), np.float32)
    # Token t prefers experts t and t + 1, and has hardly anything for others.
    even[..., t, t], even[..., t, (t + 1) % E] = 30.001, 30
    if group == "shuffled":
        # What is drawn is even as nearly as a router that knows no preference.
        even *= 1e-4
    np.testing.assert_allclose(loss_of(even, group, form=form), 1, rtol=2e-3)
    collapsed = np.zeros((L, B, T, E), np.float32)
    for i, layer in enumerate(collapsed):
        layer[..., K * i], layer[..., K * i + 1] = 30.001, 30
    # Half of the probability is the first choice's.
    wanted = E / K
    np.testing.assert_allclose(loss_of(collapsed, group, form=form), wanted, rtol=2e-3)


@pytest.mark.parametrize("group", GROUPS)
def test_of_padding_alone_there_is_nothing_to_balance(group):
    logits, real = draw()
    run = jax.value_and_grad(lambda x: loss_of(x, group, np.zeros_like(real)))
    loss, gradient = run(logits)
    assert loss == 0 and not gradient.any()


def specialised(num_domains=8, rows=4, T=32):
    """One micro-batch of each domain; the tokens of a domain have two experts to themselves."""
    E = 2 * num_domains
    logits = np.zeros((1, num_domains * rows, T, E), np.float32)
    for d in range(num_domains):
        logits[:, d * rows : (d + 1) * rows, :, 2 * d : 2 * d + 2] = 30
    return logits, MoeSpec((0,), E, 2, intermediate_size=8, renormalise=True)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("global", 1.0),
        ("micro", 8.0),
        ("sequence", 8.0),
        # The first of n micro-batches reads 8, the n-th 8 / n.
        ("buffer", sum(1 / n for n in range(1, 9))),
    ],
)
def test_experts_that_specialise_by_domain_are_even_in_the_whole_alone(group, expected):
    logits, spec = specialised()
    options = BalanceOptions(microbatch_rows=4)
    ours = balance_loss(sums_of(logits, None, group, spec, options), spec, group)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_as_few_tokens_of_all_domains_are_nearly_even():
    logits, spec = specialised()
    options = BalanceOptions(microbatch_rows=4)
    sums = sums_of(logits, None, "shuffled", spec, options)
    # Of n tokens each, the counts' variance adds (domains - 1) / n.
    assert balance_loss(sums, spec, "shuffled") == pytest.approx(1 + 7 / 128, abs=0.03)


def test_shuffled_groups_share_out_all_tokens():
    ids = make_grouping("shuffled", (B, T), OPTIONS, DEVICES, KEY).ids
    assert np.bincount(np.ravel(ids)).tolist() == [10, 10, 10, 5]
    other = make_grouping("shuffled", (B, T), OPTIONS, DEVICES, jax.random.key(4)).ids
    assert (np.asarray(ids) != np.asarray(other)).mean() > 0.5
    many = BalanceOptions(microbatch_rows=4)
    ids = np.asarray(make_grouping("shuffled", (16, 32), many, DEVICES, KEY).ids)
    counts = np.stack([np.bincount(row, minlength=4) for row in ids])
    assert (counts.sum(0) == 128).all()
    # 8 of each group in a row, with a deviation of 2.4.
    assert counts.min() >= 1 and 1 < counts.std() < 4


def test_shuffled_groups_are_drawn_anew_for_other_tokens_and_for_nothing_else():
    model, _ = one_device(CONFIGS["moe"])
    options = dataclasses.replace(EXACT, balance=BalanceOptions(loss=1.0, group="shuffled"))
    ids, mask = random_batch(model.config, 4)
    other = ids.copy()
    other[2, 7] = (other[2, 7] + 1) % model.config.vocab_size

    def groups(batch):
        return np.asarray(with_groups(model, batch, options).groups["shuffled"].ids)

    first = groups(Batch(ids))
    weights = np.random.default_rng(0).uniform(size=ids.shape)
    same = Batch(ids.copy(), attention_mask=mask, loss_weights=weights)
    np.testing.assert_array_equal(groups(same), first)
    assert (groups(Batch(other)) != first).mean() > 0.5
    assert (groups(Batch(ids[::-1])) != first[::-1]).mean() > 0.5


@pytest.mark.parametrize("rows", [12, 10, 3])
def test_a_devices_group_is_of_the_rows_that_lie_on_it(rows):
    mesh, devices = as_mesh("data:2,expert:2"), 4
    ids = np.asarray(make_grouping("device", (rows, T), OPTIONS, devices, KEY).ids)
    padded = jnp.pad(jnp.arange(rows), (0, -rows % devices), constant_values=-1)
    placed = jax.device_put(padded, Layout(mesh).sharding("batch"))
    shares = [np.asarray(shard.data) for shard in placed.addressable_shards]
    found = [ids[share[share >= 0]] for share in shares]
    assert len(found) == devices
    assert sorted({*own.tolist()} for own in found if len(own)) == [{g} for g in range(ids[-1] + 1)]


def test_choices_that_find_no_room_count_as_well():
    """Else an expert that is wanted too much looks no busier than its capacity."""
    logits, real = draw()
    routing = route(logits[0], jnp.eye(E), SPEC, real)
    limited = limit_capacity(routing, 5, real)
    assert limited.dropped > 10
    sums = [sum_routing(r, real, each=True) for r in (limited, routing)]
    jax.tree.map(np.testing.assert_array_equal, *sums)


# The terms together.


def with_balance(**fields):
    return dataclasses.replace(EXACT, balance=BalanceOptions(figures=False, **fields))


def test_every_term_adds_up_with_its_coefficient():
    model, params = one_device(CONFIGS["moe"])
    spec = model.config.moe
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1.5, (2, B, T, spec.num_experts)).astype(np.float32)
    _, real = draw()
    balance = BalanceOptions(
        loss=0.7, group="micro", complement=0.2, z_loss=0.3, similarity=0.05, microbatch_rows=2
    )
    sums = [sums_of(logits, real, group, spec) for group in ("micro", "sequence")]
    sums = sums[0].replace(groups=sums[0].groups | sums[1].groups)
    options = dataclasses.replace(EXACT, balance=balance)
    ours = router_loss(model, params, sums, options, None)
    theirs, k = torch.tensor(logits, dtype=torch.float64), spec.num_experts_per_tok
    terms = [rendering(theirs, real, groups_by_hand(g), k).item() for g in ("micro", "sequence")]
    z = (torch.logsumexp(theirs, -1) ** 2).numpy()[:, real].mean()
    similarity = np.mean([similarity_by_hand(router) for router in routers_of(params)])
    expected = 0.7 * terms[0] + 0.2 * terms[1] + 0.3 * z + 0.05 * similarity
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Transformers' coefficient is of a loss that is k where ours is 1.
        (BalanceOptions(), 0.001 * K),
        (BalanceOptions(pooling="model"), 0.001),
        (BalanceOptions(loss=0.3), 0.3),
        (BalanceOptions(loss=0.0, pooling="model"), 0.0),
    ],
)
def test_the_configs_coefficient_is_in_transformers_unit(options, expected):
    assert options.coefficient(SPEC) == pytest.approx(expected)


def routers_of(params):
    return [params[f"layers_{i}"]["mlp"]["gate"]["weight"] for i in range(2)]


def similarity_by_hand(router):
    router, total = np.asarray(router, np.float64), 0.0
    for i, one in enumerate(router):
        for j, other in enumerate(router):
            total += abs(np.sum(one * other) - (i == j))
    return total


def test_similarity_is_the_distance_of_routers_from_orthonormal():
    rng = np.random.default_rng(4)
    stack, single = rng.standard_normal((2, 5, 9)), rng.standard_normal((5, 9))
    expected = np.mean([similarity_by_hand(router) for router in (*stack, single)])
    np.testing.assert_allclose(similarity_loss([*map(jnp.asarray, (stack, single))]), expected)
    even = np.linalg.qr(rng.standard_normal((9, 5)))[0].T
    assert similarity_loss([jnp.asarray(even)]) < 1e-5
    # Twice an orthonormal router is off by 3 on the diagonal.
    np.testing.assert_allclose(similarity_loss([jnp.asarray(2 * even)]), 15, rtol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_similarity_reaches_routers_alone_and_parts_of_a_batch_share_it(stacked):
    model, params = one_device(CONFIGS["moe"])
    options = with_balance(loss=0.0, similarity=2.0)
    spec, (_, real) = model.config.moe, draw()
    logits = np.zeros((2, B, T, spec.num_experts), np.float32)
    whole = sums_of(logits, real, spec=spec)
    split = [sums_of(logits, real & (np.arange(B) % 3 == i)[:, None], spec=spec) for i in range(3)]

    def loss(params, sums, whole):
        params = stack_layers(model.config, params) if stacked else params
        return router_loss(model, params, sums, options, whole)

    found, gradient = jax.value_and_grad(loss)(params, whole, None)
    expected = 2 * np.mean([similarity_by_hand(router) for router in routers_of(params)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    parts = [loss(params, sums, whole) for sums in split]
    assert min(parts) > 0.1 * expected
    np.testing.assert_allclose(sum(parts), expected, rtol=1e-5)
    for i, router in enumerate(routers_of(params)):
        router = np.asarray(router, np.float64)
        signs = np.sign(router @ router.T - np.eye(len(router)))
        # Each product is there twice, and the loss is a mean over two layers.
        gate = gradient[f"layers_{i}"]["mlp"].pop("gate")["weight"]
        np.testing.assert_allclose(gate, 2 * 2 * signs @ router / 2, rtol=1e-5, atol=1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


# A batch in parts, and on a mesh.


def update(model, params, batch, options):
    """By a step of plain gradient descent, whose update is the gradient; and its metrics."""
    state = init_train_state(model, optax.sgd(1.0), params=params)
    state, metrics = make_train_step(model, optax.sgd(1.0), options)(state, batch)
    return jax.tree.map(lambda a, b: np.asarray(a - b), params, state.whole()), metrics


def padded_batch(config, rows):
    rng = np.random.default_rng(5)
    ids, mask = random_batch(config, rows)
    # Rows weigh differently, and so do the groups.
    mask &= rng.uniform(size=mask.shape) < rng.uniform(0.5, 1.2, (rows, 1))
    return Batch(ids, attention_mask=mask)


# Both groups count in one step, with coefficients that make them larger than the cross entropy.
PAIRS = {
    ("sequence", "micro"): ["2 parts", "mesh"],
    ("shuffled", "buffer"): ["3 parts", "mesh"],
    ("device", "global"): ["mesh", "mesh, 3 parts"],
}


def paired(pair, microbatches=1):
    group, complement = pair
    options = with_balance(
        loss=5.0,
        group=group,
        complement=3.0,
        complement_group=complement,
        similarity=0.02,
        microbatch_rows=3,
    )
    return dataclasses.replace(options, scan=True, microbatches=microbatches)


@pytest.fixture(scope="module", params=PAIRS, ids="+".join)
def whole(request):
    """A pair of groups, and a step of one device that takes the batch as a whole."""
    model, params = one_device(CONFIGS["moe"])
    batch = padded_batch(model.config, 12)
    # One device has all rows: those of each of 4 devices are there a micro-batch of 3.
    here = tuple("micro" if group == "device" else group for group in request.param)
    return request.param, (model, params, batch), update(model, params, batch, paired(here))


def test_a_step_reports_the_loss_of_its_groups(whole):
    (group, _), (model, params, batch), (_, metrics) = whole
    outputs = jax.jit(model.apply)({"params": params}, batch.input_ids, batch.attention_mask)
    logits = torch.as_tensor(np.stack([routing.logits for routing in outputs.router])).double()
    shape, k = batch.input_ids.shape, model.config.moe.num_experts_per_tok
    groups = groups_by_hand(group, shape, rows=3, devices=4)
    if group == "shuffled":
        groups = with_groups(model, batch, paired(("shuffled", "micro"))).groups[group].ids
    expected = rendering(logits, batch.attention_mask, groups, k)
    np.testing.assert_allclose(metrics["balance_loss"], expected.item(), rtol=1e-5)


@pytest.mark.parametrize(
    ("whole", "how"),
    [(pair, how) for pair, ways in PAIRS.items() for how in ways],
    ids=str,
    indirect=["whole"],
)
def test_parts_and_devices_make_the_update_of_the_whole(whole, how):
    pair, (model, params, batch), (expected, expected_metrics) = whole
    if how.startswith("mesh"):
        model = model.clone(mesh=as_mesh("data:2,expert:2"))
    parts = int(how.split()[-2]) if how.endswith("parts") else 1
    ours, metrics = update(model, params, batch, paired(pair, parts))
    np.testing.assert_array_equal(metrics["expert_counts"], expected_metrics["expert_counts"])
    for name in ("loss", "balance_loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, err_msg=name)

    def close(path, a, b):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(), err_msg=name)

    jax.tree_util.tree_map_with_path(close, ours, expected)


def test_an_evaluation_reports_the_mean_of_what_its_batches_would():
    model, params = one_device(CONFIGS["moe"])
    rng = np.random.default_rng(6)
    ids = rng.integers(0, model.config.vocab_size, (2, 4, 12))
    options = with_balance(loss=1.0, group="sequence")
    evaluated = make_evaluation(model, options)(params, [Batch(rows) for rows in ids])
    real, expected = np.ones((4, 12), bool), []
    for rows in ids:
        router = model.apply({"params": params}, rows).router
        logits = torch.as_tensor(np.stack([routing.logits for routing in router])).double()
        groups = groups_by_hand("sequence", (4, 12))
        expected.append(rendering(logits, real, groups, model.config.moe.num_experts_per_tok))
    np.testing.assert_allclose(evaluated["eval_balance_loss"], np.mean(expected), rtol=1e-5)


# What cannot be.


@pytest.mark.parametrize("group", ["sequence", "micro", "device", "shuffled", "buffer"])
def test_groups_of_rows_that_an_objective_makes_itself_are_refused(group):
    model, params = one_device(CONFIGS["moe"])
    options, batch = with_balance(loss=1.0, group=group), Batch(np.zeros((2, 3), int))
    with pytest.raises(UserError, match=rf"groups of kind {grouping_of(group)} are of rows"):
        jax.eval_shape(
            lambda params: forward(model, as_computed(model, params, options), batch, options)[2],
            params,
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": -0.1}, "loss = -0.1 must be at least 0"),
        ({"group": "row"}, "group = row is not supported; known: sequence, micro, device, global"),
        ({"complement_group": "all"}, "complement_group = all is not supported"),
        ({"form": "second"}, "form = second is not supported; known: all, first"),
        ({"pooling": "batch"}, "pooling = batch is not supported; known: layer, model"),
        ({"microbatch_rows": 0}, "microbatch_rows = 0 must be at least 1"),
        ({"z_loss": float("nan")}, "z_loss = nan must be finite"),
        ({"bias_update": "square"}, "bias_update = square is not supported"),
    ],
)
def test_options_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=f"^{message}"):
        BalanceOptions(**fields)


def test_where_experts_choose_there_is_no_first_choice():
    router = RouterOptions(Assignment.EXPERT_CHOICE)
    TrainOptions(router=router)
    with pytest.raises(UserError, match="form = first: with router"):
        TrainOptions(router=router, balance=BalanceOptions(form="first"))
