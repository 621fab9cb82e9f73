"""Batches in parts, and the loss of tokens further on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax.errors import UserError
from qwen_jax.sharding.axes import as_mesh
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.objective import Batch, TrainOptions, metrics_of, objective
from qwen_jax.training.train_step import init_train_state, make_train_step
from tests.sharding.models import CONFIGS, one_device, random_batch

EXACT = TrainOptions(dtype="float32", scan=False, remat="none", block_size=16)
AHEAD = {"mtp_layers": 2}


def close(ours, expected, tolerance=1e-5):
    def check(path, a, b):
        atol = tolerance * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, ours, expected)


def weighted_batch(config, rows, length=12):
    """A text a row with padding on either side or nowhere; rows of unlike weight."""
    rng = np.random.default_rng(3)
    ids, mask = random_batch(config, rows, length)
    weights = rng.uniform(0, 2, ids.shape) * np.arange(1, rows + 1)[:, None]
    return Batch(ids, attention_mask=mask, loss_weights=weights.astype(np.float32))


@pytest.mark.parametrize(
    ("mesh", "pooling", "loss"), [(None, "layer", 2.1), ("data:2,expert:2,tensor:2", "model", 0.7)]
)
def test_a_batch_in_parts_gives_the_update_of_the_whole(mesh, pooling, loss):
    model, params = one_device(dataclasses.replace(CONFIGS["moe"], **AHEAD))
    model = model.clone(mesh=as_mesh(mesh))
    batch = weighted_batch(model.config, 12)
    options = dataclasses.replace(
        EXACT,
        z_loss=0.2,
        balance=BalanceOptions(loss=loss, pooling=pooling, z_loss=0.1, microbatch_rows=3),
        mtp_loss=0.4,
    )

    def run(parts):
        # The update is the gradient.
        state = init_train_state(model, optax.sgd(1.0), params=params)
        split = dataclasses.replace(options, microbatches=parts)
        state, metrics = make_train_step(model, optax.sgd(1.0), split)(state, batch)
        return jax.tree.map(lambda a, b: a - b, params, state.params), metrics

    ours, metrics = run(3)
    expected, expected_metrics = run(1)
    counts = metrics.pop("expert_counts")
    np.testing.assert_array_equal(counts, expected_metrics.pop("expert_counts"))
    # What is moved is rounded to the parameters, which are some times larger.
    close(ours, expected, 1e-4)
    assert "max_vio_micro" in metrics["router"]
    close(metrics, expected_metrics)


@pytest.mark.parametrize("loss", [0.0, 2.1])
def test_parts_run_ahead_only_where_a_loss_asks_how_experts_are_used(loss):
    model, params = one_device(CONFIGS["moe"])
    batch = weighted_batch(model.config, 4)
    balance = BalanceOptions(loss=loss, z_loss=0.1)
    options = dataclasses.replace(EXACT, balance=balance, microbatches=2, scan=True)
    step = make_train_step(model, optax.sgd(1.0), options)
    state = init_train_state(model, optax.sgd(1.0), params=params)
    scans = str(jax.make_jaxpr(step)(state, batch)).count("scan[")
    balance = dataclasses.replace(balance, loss=0.0)
    whole = dataclasses.replace(options, balance=balance, microbatches=1)
    step = make_train_step(model, optax.sgd(1.0), whole)
    alone = str(jax.make_jaxpr(step)(state, batch)).count("scan[")
    # One over the parts and one to count them; in that the layers' own.
    assert scans - alone == (3 if loss else 2)


def test_rows_that_do_not_divide_into_parts_are_refused():
    model, params = one_device(CONFIGS["dense"])
    state = init_train_state(model, optax.sgd(1.0), params=params)
    step = make_train_step(model, optax.sgd(1.0), dataclasses.replace(EXACT, microbatches=2))
    with pytest.raises(UserError, match="microbatches = 2 do not divide the batch's 3 rows"):
        step(state, weighted_batch(model.config, 3))


@pytest.mark.parametrize(
    ("name", "given"),
    [("dense", False), ("dense", True), ("moe", True), ("hybrid", False)],
)
def test_tokens_further_on_are_learned_by_the_formula(name, given):
    """Against log-probabilities of `predict_next`, which other tests hold against torch."""
    # Without experts, so that the gradients are those of the tokens alone.
    fewer = {"moe": None} if name == "hybrid" else {}
    model, params = one_device(dataclasses.replace(CONFIGS[name], **AHEAD, **fewer))
    batch = weighted_batch(model.config, 3)
    ids, real, T = batch.input_ids, batch.attention_mask, batch.input_ids.shape[1]
    if given:
        follows = real & np.pad(real[:, 1:], ((0, 0), (0, 1)))
        weights = batch.loss_weights * follows
        batch = batch.replace(targets=np.roll(ids, -1, 1), loss_weights=weights)

    def direct(params):
        variables = {"params": params}
        hidden = model.apply(variables, ids, real).hidden_states[-1]
        means = []
        for step in range(2):
            ahead = np.roll(ids, -step - 1, 1)
            out = model.apply(variables, hidden, ahead, real, step=step, method="predict_next")
            hidden = out.hidden_states[-1]
            log = jax.nn.log_softmax(out.logits)
            total = count = 0.0
            for row in range(len(ids)):
                # Tokens from t to what is predicted are all of the text.
                for t in range(T - step - 2):
                    if real[row, t : t + step + 3].all():
                        place = t + step + 1 if given else t + step + 2
                        weight = batch.loss_weights[row, place]
                        total -= weight * log[row, t, ids[row, t + step + 2]]
                        count += weight
            means.append(total / count)
        return jnp.stack(means).mean()

    expected, wanted = jax.jit(jax.value_and_grad(direct))(params)

    @jax.jit
    def losses(params):
        with_head, sums = objective(model, params, batch, EXACT)
        without, _ = objective(model, params, batch, dataclasses.replace(EXACT, mtp_loss=0.0))
        return (with_head - without) / EXACT.mtp_loss, metrics_of(model, sums, EXACT)["mtp_loss"]

    (ours, metric), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
    np.testing.assert_allclose(metric, expected, rtol=1e-5)
    if name == "moe":
        # The head's experts are balanced with the others.
        return
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    close(gradients, wanted, 1e-4)


def test_a_head_that_is_not_learned_gets_no_gradient():
    model, params = one_device(dataclasses.replace(CONFIGS["dense"], **AHEAD))
    options = dataclasses.replace(EXACT, mtp_loss=0.0)
    batch = weighted_batch(model.config, 3)
    gradients, sums = jax.jit(
        jax.grad(lambda p: objective(model, p, batch, options), has_aux=True)
    )(params)
    assert "mtp_loss" not in metrics_of(model, sums, options)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients["mtp"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(gradients["layers_0"]))


def test_packed_texts_learn_further_tokens_as_by_themselves():
    model, params = one_device(dataclasses.replace(CONFIGS["hybrid"], mtp_layers=1))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (2, 9))
    mask = np.arange(9) < np.array([[9], [6]])
    lengths = mask.sum(1)
    packed = Batch(
        np.concatenate([ids[0], ids[1, :6]])[None],
        positions=np.concatenate([np.arange(n) for n in lengths])[None],
        segment_ids=np.repeat([1, 2], lengths)[None],
    )
    options = dataclasses.replace(EXACT, scan=True, remat="full", mtp_loss=1.0)

    @jax.jit
    def run(params, batch):
        return jax.value_and_grad(lambda p: objective(model, p, batch, options), has_aux=True)(
            params
        )

    (loss, sums), gradients = run(params, packed)
    (expected, expected_sums), wanted = run(params, Batch(ids, attention_mask=mask))
    np.testing.assert_array_equal(sums.weights, [13, 11])
    np.testing.assert_array_equal(sums.weights, expected_sums.weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    close(gradients, wanted, 1e-4)
