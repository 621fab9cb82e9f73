"""Losses, gradients and updates against transformers and torch.optim."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import qwen_jax
from qwen_jax.config import HeadKind
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.objective import Batch, TrainOptions, metrics_of, objective
from qwen_jax.training.train_step import (
    abstract_train_state,
    init_train_state,
    make_train_step,
)
from tests.models.passes import padding, random_ids
from tests.reference import random_reference, save_reference
from tests.sharding.models import make_config
from tests.training.published import published
from tests.training.test_loss import largest_array

CASES = {
    "dense": ("qwen3", {}),
    "dense tied": ("qwen3", {"tie_word_embeddings": True}),
    "experts": ("qwen3_moe", {"router_aux_loss_coef": 0.7}),
    "hybrid": ("qwen3_next", {"router_aux_loss_coef": 0.3}),
}
EXACT = TrainOptions(dtype="float32", balance=BalanceOptions(pooling="model"), block_size=16)
LENGTHS = {"whole": None, "right": ([19, 12], "right"), "left": ([19, 12], "left")}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request, tmp_path_factory):
    return load(tmp_path_factory, *CASES[request.param])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load(tmp_path_factory, "qwen3_moe", {"num_hidden_layers": 2})


def load(tmp_path_factory, family, fields):
    reference = random_reference(family, **fields)
    directory = save_reference(reference, tmp_path_factory.mktemp(family))
    return reference, *qwen_jax.load_pretrained(directory)


def masked(model, kind):
    """Ids, their mask, and the labels that transformers takes for the same loss."""
    ids = random_ids(model, (2, 19))
    if LENGTHS[kind] is None:
        return ids, None, ids
    mask = padding(LENGTHS[kind][0], 19, LENGTHS[kind][1])
    labels = np.where(mask, ids, -100)
    # From padding there is nothing to predict with.
    labels[:, 1:][mask[:, :-1] == 0] = -100
    return ids, mask, labels


def reference_loss(reference, ids, mask, labels):
    sparse = {"output_router_logits": True} if hasattr(reference, "router_aux_loss_coef") else {}
    mask = None if mask is None else torch.as_tensor(mask)
    ids, labels = torch.as_tensor(ids), torch.as_tensor(labels)
    return reference(ids, attention_mask=mask, labels=labels, use_cache=False, **sparse).loss


@pytest.mark.parametrize("kind", LENGTHS)
def test_loss_and_gradients_equal_the_reference(case, kind):
    reference, model, params = case
    ids, mask, labels = masked(model, kind)
    reference.zero_grad()
    expected = reference_loss(reference, ids, mask, labels)
    expected.backward()
    batch = Batch(ids, attention_mask=mask)

    @jax.jit
    def run(params):
        return jax.value_and_grad(lambda p: objective(model, p, batch, EXACT)[0])(params)

    loss, gradients = run(params)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    ours, theirs = published(model.config, gradients), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        grad = theirs[name].grad.numpy()
        atol = 1e-4 * np.abs(grad).max()
        np.testing.assert_allclose(gradient, grad, rtol=0, atol=atol, err_msg=name)


def test_steps_of_adamw_equal_torch(case):
    reference, model, params = case
    ids, mask, labels = masked(model, "right")
    # An epsilon of the gradients' size: without, noise in gradients near zero decides on signs.
    rate, decay, eps = 1e-3, 0.3, 1e-3
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    theirs = torch.optim.AdamW(
        reference.parameters(), rate, betas=(0.8, 0.95), eps=eps, weight_decay=decay
    )
    optimiser = optax.adamw(rate, b1=0.8, b2=0.95, eps=eps, weight_decay=decay)
    state = init_train_state(model, optimiser, params=params)
    step = make_train_step(model, optimiser, EXACT)
    try:
        for number in range(3):
            reference.zero_grad()
            loss = reference_loss(reference, ids, mask, labels)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
            theirs.step()
            state, metrics = step(state, Batch(ids, attention_mask=mask))
            assert state.step == number + 1
            np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-4)
            assert metrics["tokens"] == (labels[:, 1:] != -100).sum()
            aux = 0.0
            if model.config.moe:
                aux = model.config.moe.aux_loss_coef * metrics["balance_loss"]
            np.testing.assert_allclose(metrics["loss"] + aux, loss.item(), rtol=1e-5)
        for name, ours in published(model.config, state.params).items():
            expected = dict(reference.named_parameters())[name].detach()
            moved = (expected - before[name]).abs().max().item()
            assert moved > rate / 2
            np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-3 * moved, err_msg=name)
    finally:
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.copy_(before[name])


def value(model, params, batch, **options):
    options = dataclasses.replace(EXACT, **options)

    @jax.jit
    def run(params, batch):
        loss, sums = objective(model, params, batch, options)
        return loss, metrics_of(model, sums, options)

    return run(params, batch)


def test_losses_are_weighted_and_summed_with_their_coefficients(small):
    reference, model, params = small
    ids = random_ids(model, (2, 13))
    weights = np.random.default_rng(5).uniform(0, 2, ids.shape).astype(np.float32)
    with torch.no_grad():
        out = reference(torch.as_tensor(ids), output_router_logits=True)
    logits, targets = out.logits[:, :-1].flatten(0, 1), torch.as_tensor(ids[:, 1:]).flatten()
    entropy = torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()
    squares = torch.logsumexp(logits, -1).numpy() ** 2
    routers = torch.stack(out.router_logits)
    router_z = (torch.logsumexp(routers, -1) ** 2).mean().item()
    own = weights[:, 1:].flatten()

    coefficients = {"z_loss": 0.2, "balance_loss": 0.5, "router_z_loss": 0.1}
    balance = BalanceOptions(
        loss=coefficients["balance_loss"],
        pooling="model",
        z_loss=coefficients["router_z_loss"],
    )
    options = {"z_loss": coefficients["z_loss"], "balance": balance}
    loss, metrics = value(model, params, Batch(ids, loss_weights=weights), **options)
    expected = {
        "loss": (own * entropy).sum() / own.sum(),
        "tokens": own.sum(),
        "z_loss": (own * squares).sum() / own.sum(),
        "balance_loss": out.aux_loss.item(),
        "router_z_loss": router_z,
    }
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-5, err_msg=name)
    total = expected["loss"] + sum(c * expected[name] for name, c in coefficients.items())
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    chosen = routers.topk(model.config.moe.num_experts_per_tok, -1).indices.numpy()
    counts = [np.bincount(layer.ravel(), minlength=6) for layer in chosen]
    np.testing.assert_array_equal(metrics["expert_counts"], counts)


def test_targets_that_are_given_are_those_that_are_derived(small):
    _, model, params = small
    ids = random_ids(model, (2, 13))
    given = Batch(
        ids, targets=np.roll(ids, -1, 1), loss_weights=np.ones(ids.shape) * (np.arange(13) < 12)
    )
    for ours, derived in zip(
        value(model, params, given), value(model, params, Batch(ids)), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, derived)


@pytest.mark.parametrize("scan", [False, True])
def test_packed_texts_are_learned_as_texts_by_themselves(case, scan):
    _, model, params = case
    ids, mask, _ = masked(model, "right")
    lengths = mask.sum(1)
    texts = [ids[i, : lengths[i]] for i in range(2)]
    packed = Batch(
        np.concatenate(texts)[None],
        positions=np.concatenate([np.arange(n) for n in lengths])[None],
        segment_ids=np.repeat([1, 2], lengths)[None],
    )
    options = dataclasses.replace(EXACT, scan=scan, remat="full" if scan else "none")

    @jax.jit
    def run(params, batch):
        grad = jax.value_and_grad(lambda p: objective(model, p, batch, options), has_aux=True)
        (loss, sums), gradients = grad(params)
        return (loss, metrics_of(model, sums, options)), gradients

    (loss, metrics), gradients = run(params, packed)
    (expected, expected_metrics), wanted = run(params, Batch(ids, attention_mask=mask))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["tokens"] == expected_metrics["tokens"] == lengths.sum() - 2
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_a_batch_with_nothing_to_learn_moves_nothing(small):
    _, model, params = small
    ids = random_ids(model, (2, 13))
    batch = Batch(ids, loss_weights=np.zeros(ids.shape))
    options = dataclasses.replace(EXACT, balance=BalanceOptions(loss=0.0), z_loss=0.1)
    state = init_train_state(model, optax.sgd(1.0), params=params)
    state, metrics = make_train_step(model, optax.sgd(1.0), options)(state, batch)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["tokens"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


@pytest.mark.parametrize("optimiser", [optax.adamw(1e-2), optax.sgd(1.0, momentum=0.9)])
def test_an_update_that_is_not_finite_is_not_made(small, optimiser):
    _, model, params = small
    ids = random_ids(model, (2, 8))
    step = make_train_step(model, optimiser, EXACT)
    state, metrics = step(init_train_state(model, optimiser, params=params), Batch(ids))
    assert metrics["finite"]
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, Batch(ids, loss_weights=np.full(ids.shape, np.inf)))
    assert not metrics["finite"]
    assert state.step == 2
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)
    state, metrics = step(state, Batch(ids))
    assert metrics["finite"]
    assert (state.params["norm"]["weight"] != before.params["norm"]["weight"]).any()


def test_a_step_does_not_take_the_parameters_it_was_begun_with(small):
    _, model, params = small
    copies = jax.tree.map(np.array, params)
    optimiser = optax.adamw(1e-2)
    state = init_train_state(model, optimiser, params=params)
    first = state.params["norm"]["weight"]
    make_train_step(model, optimiser, EXACT)(state, Batch(random_ids(model, (2, 8))))
    jax.tree.map(np.testing.assert_array_equal, params, copies)
    assert first.is_deleted()


def test_a_state_from_a_key_has_the_parameters_of_a_fresh_model(small):
    _, model, _ = small
    optimiser = optax.adamw(1e-2)
    state = init_train_state(model, optimiser, key=jax.random.key(4))
    fresh = jax.jit(Decoder(model.config).init)(jax.random.key(4), jnp.zeros((1, 1), int))
    jax.tree.map(np.testing.assert_array_equal, state.params, fresh["params"])
    abstract = abstract_train_state(model, optimiser)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract
    )


def test_masters_collect_what_bfloat16_would_lose(small):
    _, model, params = small
    options = dataclasses.replace(EXACT, dtype="bfloat16")
    optimiser = optax.sgd(1e-5)
    state = init_train_state(model, optimiser, params=params)
    batch = Batch(random_ids(model, (2, 13)))
    exact = make_train_step(model, optimiser, EXACT)(state, batch)[1]
    state = init_train_state(model, optimiser, params=params)
    state, metrics = make_train_step(model, optimiser, options)(state, batch)
    for name in ("loss", "grad_norm"):
        assert metrics[name] != exact[name]
        np.testing.assert_allclose(metrics[name], exact[name], rtol=0.1)
    for ours, before in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        assert ours.dtype == jnp.float32
        assert (ours != before).any()
        assert (ours.astype(jnp.bfloat16) == before.astype(jnp.bfloat16)).mean() > 0.95


def test_no_array_of_a_whole_step_has_the_size_of_all_logits():
    B, T, V = 4, 64, 4096
    model, optimiser = Decoder(make_config(vocab_size=V)), optax.adamw(1e-3)
    state = abstract_train_state(model, optimiser)
    batch = Batch(jax.ShapeDtypeStruct((B, T), jnp.int32))

    def largest(block_size):
        options = dataclasses.replace(EXACT, block_size=block_size)
        step = make_train_step(model, optimiser, options)
        return largest_array(step.trace(state, batch).lower().compile())

    assert largest(B * T) >= B * T * V
    # A block of logits, the head, and a layer's attention are less than a quarter of that.
    assert largest(32) < B * T * V / 4


def test_what_cannot_be_trained_is_refused(small):
    _, model, params = small
    optimiser = optax.sgd(1.0)
    scorer = Decoder(dataclasses.replace(model.config, head=HeadKind.SCORE, num_labels=2))
    with pytest.raises(UserError, match="has a score head, which predicts no tokens"):
        make_train_step(scorer, optimiser)
    packed = {**params, "norm": {"weight": params["norm"]["weight"].astype(jnp.int8)}}
    with pytest.raises(UserError, match="parameter norm/weight is int8, which has no gradient"):
        init_train_state(model, optimiser, params=packed)
    for sources in ({}, {"key": jax.random.key(0), "params": params}):
        with pytest.raises(ValueError, match="give a key to draw parameters from, or parameters"):
            init_train_state(model, optimiser, **sources)


@pytest.mark.parametrize(
    ("field", "setting", "message"),
    [
        ("dtype", "float16", "dtype = float16 is not supported; known: float32, bfloat16"),
        ("remat", "all", "remat = all is not supported; known: none, dots, full"),
        ("z_loss", -1.0, "z_loss = -1.0 must be at least 0"),
        ("block_size", 0, "block_size = 0 must be at least 1"),
        ("microbatches", 0, "microbatches = 0 must be at least 1"),
    ],
)
def test_options_that_are_none_are_refused(field, setting, message):
    with pytest.raises(UserError, match=message):
        TrainOptions(**{field: setting})
