"""GRPO's loss against a rendering in PyTorch, in parts and on a mesh; advantages by hand."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch

from qwen_jax.errors import UserError
from qwen_jax.sharding.axes import as_mesh
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.batch import Batch
from qwen_jax.training.grpo import Answers, GrpoOptions, advantages_of, grpo
from qwen_jax.training.log_probs import score
from qwen_jax.training.train_step import init_train_state, make_train_step
from tests.sharding.models import CONFIGS, one_device
from tests.training.prompts import EXACT, VOWELS
from tests.training.published import published

B, T = 6, 14


def answers_batch(vocab_size):
    """Prompts and answers of unlike lengths; a row of which nothing is learned, one that is none.

    Weights stand where the answers do, mask and weights as `to_learn` makes them.
    """
    rng = np.random.default_rng(4)
    ids = rng.integers(0, vocab_size, (B, T)).astype(np.int32)
    begins, ends = rng.integers(2, 6, (B, 1)), rng.integers(8, T + 1, (B, 1))
    ends[-1] = 0
    places = np.arange(T)
    mask = places < ends
    weights = (mask & (places >= begins)).astype(np.float32)
    weights[2] = 0
    advantages = np.array([1.2, -0.9, 0.7, -1.5, 0.4, 0.0], np.float32)
    return Batch(ids, loss_weights=weights, attention_mask=mask), advantages


def torch_logs(model, batch, temperature):
    """Log-probabilities [B, T-1] of each token's successor."""
    ids = torch.as_tensor(batch.input_ids).long()
    mask = torch.as_tensor(batch.attention_mask).long()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits / temperature, -1).gather(-1, ids[:, 1:, None])[..., 0]


def torch_grpo(logs, old, reference, batch, advantages, options):
    """Equation 3 of DeepSeekMath with two clips, and the three ways of adding up."""
    mask = torch.as_tensor(batch.loss_weights)[:, 1:]
    advantage = torch.as_tensor(advantages)[:, None]
    ratio = torch.exp(logs - old)
    low, high = 1 - options.clip_low, 1 + options.clip_high
    losses = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    difference = reference - logs
    kl = torch.exp(difference) - difference - 1
    losses = (losses + options.kl * kl) * mask
    counts = mask.sum(-1)
    match options.aggregation:
        case "sequence":
            loss = (losses.sum(-1) / counts.clamp(min=1)).sum() / (counts > 0).sum()
        case "token":
            loss = losses.sum() / mask.sum()
        case "fixed":
            loss = losses.sum() / ((counts > 0).sum() * options.max_new_tokens)
    up = (ratio > high) & (advantage > 0) & (mask > 0)
    down = (ratio < low) & (advantage < 0) & (mask > 0)
    metrics = {
        "loss": loss,
        "clip_share": (up | down).sum() / mask.sum(),
        "entropy": -(logs * mask).sum() / mask.sum(),
        "kl": (kl * mask).sum() / mask.sum(),
        "tokens": mask.sum(),
    }
    return loss, {k: v.item() for k, v in metrics.items()}, (up.sum().item(), down.sum().item())


@pytest.mark.parametrize(
    "options",
    [
        GrpoOptions(kl=0.3, clip_low=0.2, clip_high=0.2, aggregation="sequence"),
        GrpoOptions(kl=0.1, clip_low=0.1, clip_high=0.4, aggregation="token", temperature=0.7),
        GrpoOptions(clip_high=0.3, aggregation="fixed", max_new_tokens=9, temperature=1.3),
    ],
    ids=lambda options: options.aggregation,
)
def test_loss_metrics_and_gradients_equal_the_papers_in_torch(pair, options):
    theirs, model, params, _ = pair
    batch, advantages = answers_batch(model.config.vocab_size)
    theirs.zero_grad()
    logs = torch_logs(theirs, batch, options.temperature)
    rng = np.random.default_rng(5)
    # Some tokens are far likelier and some far less likely than they were; others between.
    old, reference = (
        logs.detach() + torch.tensor(rng.normal(0, scale, logs.shape), dtype=torch.float32)
        for scale in (0.8, 0.6)
    )
    loss, metrics, clipped = torch_grpo(logs, old, reference, batch, advantages, options)
    loss.backward()
    assert min(clipped) >= 1
    if not options.kl:
        del metrics["kl"]

    def padded(values):
        return np.pad(values.numpy(), ((0, 0), (0, 1)), constant_values=np.nan)

    answers = Answers(batch, advantages, padded(old), padded(reference) if options.kl else None)
    objective = grpo(options)

    @jax.jit
    def both(params):
        found, sums = objective.loss(model, params, answers, EXACT)
        return found, objective.metrics(model, sums, EXACT)

    (ours, found), gradients = jax.value_and_grad(both, has_aux=True)(params)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5, atol=1e-6)
    assert found.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    wanted = dict(theirs.named_parameters())
    for name, gradient in published(model.config, gradients).items():
        grad = wanted[name].grad.numpy()
        atol = 1e-4 * np.abs(grad).max()
        np.testing.assert_allclose(gradient, grad, rtol=0, atol=atol, err_msg=name)


def test_parts_of_a_batch_on_a_mesh_give_the_update_of_the_whole_on_one_device():
    model, params = one_device(CONFIGS["moe"])
    batch, advantages = answers_batch(model.config.vocab_size)
    rng = np.random.default_rng(6)
    logs = np.asarray(jax.jit(lambda p: score(model, p, batch, EXACT, 0.8).log_probs)(params))
    old, reference = (logs + rng.normal(0, 0.4, logs.shape).astype(np.float32) for _ in range(2))
    answers = jax.tree.map(lambda a: a[:4], Answers(batch, advantages, old, reference))
    options = dataclasses.replace(EXACT, balance=BalanceOptions(loss=2.1, z_loss=0.1))
    objective = grpo(GrpoOptions(kl=0.2, aggregation="sequence", temperature=0.8))

    def update(mesh, parts):
        bound = model.clone(mesh=as_mesh(mesh))
        split = dataclasses.replace(options, microbatches=parts)
        state = init_train_state(bound, optax.sgd(1.0), params=params)
        step = make_train_step(bound, optax.sgd(1.0), split, objective=objective)
        after, metrics = step(state, answers)
        return jax.tree.map(lambda a, b: np.asarray(a) - b, params, after.params), metrics

    ours, expected = update("fsdp:2,tensor:2", 2), update(None, 1)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), ours[0], expected[0])
    jax.tree.map(lambda a, b: close(a, b, 1e-5), ours[1], expected[1])


def close(ours, expected, tolerance):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 3.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    bare = [[0.5, -0.5, -0.5, 0.5], [-0.75, 2.25, -0.75, -0.75], [0, 0, 0, 0]]
    np.testing.assert_array_equal(advantages_of(rewards, normalise=False), bare)
    # The sample's deviations are 1 / sqrt(3), 1.5 and 0.
    stds = np.array([[3**-0.5], [1.5], [0.0]]) + 1e-4
    np.testing.assert_allclose(advantages_of(rewards), bare / stds, rtol=1e-6)
    theirs = torch.as_tensor(rewards).std(dim=1, keepdim=True).numpy() + 1e-4
    np.testing.assert_allclose(advantages_of(rewards), bare / theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size = 1 must be at least 2"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p = 1.5 must be above 0 and at most 1"),
        ({"clip_low": 1.0}, "clip_low = 1.0 must be above 0 and below 1"),
        ({"kl": -0.1}, "kl = -0.1 must be at least 0"),
        ({"updates": 0}, "updates = 0 must be at least 1"),
        ({"aggregation": "mean"}, "aggregation = mean is not supported; known: sequence, token"),
        ({"cut_answers": "drop"}, "cut_answers = drop is not supported; known: zero, judge, mask"),
        ({"rewards": ()}, "rewards is empty"),
        ({"rewards": (VOWELS, VOWELS)}, "give each once"),
    ],
)
def test_options_that_are_none_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        GrpoOptions(**changes)
