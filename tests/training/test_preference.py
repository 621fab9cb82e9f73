"""DPO against a rendering in PyTorch: loss, metrics and gradients, in parts and on a mesh."""

import contextlib
import dataclasses

import jax
import numpy as np
import optax
import peft
import pytest
import torch

import qwen_jax
from qwen_jax.checkpoint.peft_reader import load_adapter
from qwen_jax.errors import UserError
from qwen_jax.nn.low_rank import attach, low_rank_weights
from qwen_jax.sharding.axes import as_mesh
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.batch import Batch
from qwen_jax.training.lora import is_adapter
from qwen_jax.training.partition import combine, partition
from qwen_jax.training.preference import PreferenceOptions, preference
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.train_step import init_train_state, make_evaluation, make_train_step
from tests.reference import random_reference, save_reference
from tests.sharding.models import CONFIGS, make_config, one_device, random_params
from tests.training.published import published
from tests.training.test_lora import gradients_of

EXACT = TrainOptions(dtype="float32", scan=False, remat="none", block_size=16)
OPTIONS = PreferenceOptions(beta=0.3, label_smoothing=0.1, sft=0.2)
SMALL = {"num_hidden_layers": 2}


def pairs(vocab_size, count=5, length=15):
    """Prompts of unlike lengths with two answers each, the last of other lengths than the rest."""
    rng = np.random.default_rng(2)
    ids = rng.integers(0, vocab_size, (count, 2, length))
    ids[:, 1, :4] = ids[:, 0, :4]
    ends = rng.integers(9, length + 1, (count, 2, 1))
    begins = rng.integers(4, 8, (count, 1, 1))
    places = np.arange(length)
    mask = places < ends
    weights = (mask & (places >= begins)).astype(np.float32)
    return Batch(ids, attention_mask=mask, loss_weights=weights)


def torch_log_probs(model, batch):
    """Of each row's answer the sum, and of the chosen ones' tokens the mean cross entropy."""
    ids, mask, weights = (
        torch.as_tensor(a).flatten(0, 1)
        for a in (batch.input_ids, batch.attention_mask, batch.loss_weights)
    )
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
    logs = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0] * weights[:, 1:]
    sums = logs.sum(-1).unflatten(0, (-1, 2))
    chosen = weights[:, 1:].unflatten(0, (-1, 2))[:, 0]
    return sums, -logs.unflatten(0, (-1, 2))[:, 0].sum() / chosen.sum()


def torch_dpo(model, reference, batch):
    """Equation 7 of the paper with both answers' labels smoothed, and the metrics."""
    sums, entropy = torch_log_probs(model, batch)
    with torch.no_grad(), reference() as other:
        before, _ = torch_log_probs(other, batch)
    rewards = OPTIONS.beta * (sums - before)
    margin = rewards[:, 0] - rewards[:, 1]
    log = torch.nn.functional.logsigmoid
    s = OPTIONS.label_smoothing
    loss = (-(1 - s) * log(margin) - s * log(-margin)).mean()
    metrics = {
        "loss": loss,
        "accuracy": (margin > 0).float().mean(),
        "margin": margin.mean(),
        "chosen_reward": rewards[:, 0].mean(),
        "rejected_reward": rewards[:, 1].mean(),
        "sft_loss": entropy,
    }
    return loss + OPTIONS.sft * entropy, {k: v.item() for k, v in metrics.items()}


def run(model, params, batch, beside=None, frozen=None):
    objective = preference(OPTIONS)

    @jax.jit
    def values(params):
        def loss(params):
            whole = combine(params, frozen)
            return objective.loss(model, whole, batch, EXACT, None, beside)

        (found, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return found, objective.metrics(model, sums, EXACT), gradients

    return values(params)


def equal_metrics(ours, theirs, batch):
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert ours["tokens"] == batch.loss_weights.sum()


def test_loss_metrics_and_gradients_equal_the_paper_s_in_torch(tmp_path):
    reference = random_reference("qwen3", seed=1, **SMALL)
    trained = random_reference("qwen3", **SMALL)
    _, before = qwen_jax.load_pretrained(save_reference(reference, tmp_path / "a"))
    model, params = qwen_jax.load_pretrained(save_reference(trained, tmp_path / "b"))
    batch = pairs(model.config.vocab_size)
    loss, metrics = torch_dpo(trained, lambda: contextlib.nullcontext(reference), batch)
    loss.backward()
    ours, our_metrics, gradients = run(model, params, batch, {"reference": before})
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    assert 0 < metrics["accuracy"] < 1
    equal_metrics(our_metrics, metrics, batch)
    theirs = dict(trained.named_parameters())
    for name, gradient in published(model.config, gradients).items():
        grad = theirs[name].grad.numpy()
        atol = 1e-4 * np.abs(grad).max()
        np.testing.assert_allclose(gradient, grad, rtol=0, atol=atol, err_msg=name)


def test_with_adapters_the_reference_is_what_is_below_them(tmp_path):
    base = random_reference("qwen3", **SMALL)
    directory = save_reference(base, tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["q_proj"])
    trained = peft.get_peft_model(base, config)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model, params = qwen_jax.load_pretrained(directory)
    params = attach(params, load_adapter(tmp_path / "adapter", model.config))
    batch = pairs(model.config.vocab_size)

    @contextlib.contextmanager
    def without_adapters():
        with trained.disable_adapter():
            yield trained

    loss, metrics = torch_dpo(trained, without_adapters, batch)
    loss.backward()
    adapters, frozen = partition(params, is_adapter)
    ours, our_metrics, gradients = run(model, adapters, batch, None, frozen)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    assert abs(metrics["margin"]) > 0.01
    equal_metrics(our_metrics, metrics, batch)
    wanted = gradients_of(trained, model, tmp_path / "gradients")
    for path, leaf in low_rank_weights(gradients):
        for part, grad in ((leaf.a, wanted[path].a), (leaf.b, wanted[path].b)):
            grad = np.asarray(grad)
            atol = 1e-4 * np.abs(grad).max()
            np.testing.assert_allclose(part, grad, rtol=0, atol=atol, err_msg=str(path))


def test_parts_of_a_batch_on_a_mesh_give_the_update_of_the_whole_on_one_device():
    model, params = one_device(CONFIGS["moe"])
    reference = random_params(model.config, seed=3)
    batch = pairs(model.config.vocab_size, count=4)
    # The last pair is none: what fills up the last batch of an epoch.
    for field in ("attention_mask", "loss_weights"):
        getattr(batch, field)[3] = 0
    options = dataclasses.replace(EXACT, balance=BalanceOptions(loss=2.1, z_loss=0.1))

    def run(mesh, parts):
        bound = model.clone(mesh=as_mesh(mesh))
        split = dataclasses.replace(options, microbatches=parts)
        state = init_train_state(bound, optax.sgd(1.0), params=params)
        beside = {"reference": init_train_state(bound, optax.sgd(1.0), params=reference).params}
        state = state.replace(beside=beside)
        step = make_train_step(bound, optax.sgd(1.0), split, objective=preference(OPTIONS))
        after, metrics = step(state, batch)
        # Nobody took or copied what is beside.
        assert after.beside is beside
        return jax.tree.map(lambda a, b: np.asarray(a) - b, params, after.params), metrics

    ours, expected = run("fsdp:2,tensor:2", 2), run(None, 1)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), ours[0], expected[0])
    jax.tree.map(lambda a, b: close(a, b, 1e-5), ours[1], expected[1])
    three = jax.tree.map(lambda a: a[:3], batch)
    evaluate = make_evaluation(model, options, preference(OPTIONS))
    figures = evaluate(params, [three], {"reference": reference})
    for name in ("loss", "accuracy", "margin", "tokens", "sft_loss"):
        np.testing.assert_allclose(figures[f"eval_{name}"], expected[1][name], rtol=1e-5)


def close(ours, expected, tolerance):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


def test_what_it_does_not_learn_from_is_refused():
    model, params = one_device(make_config(mtp_layers=1))
    batch, objective = pairs(96), preference(OPTIONS)
    for options, name in ((EXACT, "mtp_loss = 0.1"), ({"z_loss": 0.5}, "z_loss = 0.5")):
        if isinstance(options, dict):
            options = dataclasses.replace(EXACT, mtp_loss=0.0, **options)
        with pytest.raises(UserError, match=f"step.{name} is for next-token training alone"):
            make_train_step(model, optax.sgd(1.0), options, objective=objective)
    with pytest.raises(ValueError, match="give the parameters to compare with"):
        objective.loss(model, params, batch, dataclasses.replace(EXACT, mtp_loss=0.0))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("beta", 0.0, "beta = 0.0 must be above 0"),
        ("label_smoothing", 0.5, "label_smoothing = 0.5 must be at least 0 and below 0.5"),
        ("sft", float("nan"), "sft = nan must be finite, at least 0"),
    ],
)
def test_options_that_are_none_are_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        PreferenceOptions(**{field: value})
