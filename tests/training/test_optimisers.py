"""Optimisers and schedules against torch, closed forms and linear algebra."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from qwen_jax.errors import UserError
from qwen_jax.training.optimisers import OptimiserOptions, make_optimiser, make_schedule

CONSTANT = OptimiserOptions(schedule="constant", clip_norm=None)


def tree(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "embed_tokens": {"weight": (9, 4)},
        "layers_0": {
            "mlp": {"experts": {"up_proj": {"weight": (3, 6, 4)}}},
            "self_attn": {"q_proj": {"weight": (8, 4), "bias": (8,)}},
            "linear_attn": {"q_conv": {"weight": (8, 4)}},
        },
        "norm": {"weight": (4,)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def updates(options, steps=3, num_steps=10):
    params = tree()
    optimiser = make_optimiser(options, num_steps, params)
    state, history = optimiser.init(params), []
    for step in range(steps):
        change, state = optimiser.update(tree(step + 1), state, params)
        history.append(change)
        params = optax.apply_updates(params, change)
    return history, params


@pytest.mark.parametrize("clip", [None, 0.7])
def test_adamw_is_torch_s_with_vectors_undecayed(clip):
    options = dataclasses.replace(
        OptimiserOptions(learning_rate=0.1, warmup_steps=2, weight_decay=0.3),
        clip_norm=clip,
        decay_except=("embed_tokens",),
    )
    leaves, structure = jax.tree.flatten(tree())
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree())]
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in leaves]
    groups = [
        {"params": [p], "weight_decay": 0.3 if p.ndim > 1 and "embed" not in path else 0.0}
        for p, path in zip(theirs, paths, strict=True)
    ]
    adamw = torch.optim.AdamW(groups, 0.1, betas=(0.9, 0.95), eps=1e-8)
    schedule = make_schedule(options, 10)
    for step in range(3):
        for p, gradient in zip(theirs, jax.tree.leaves(tree(step + 1)), strict=True):
            p.grad = torch.tensor(np.asarray(gradient))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs, clip)
        for group in adamw.param_groups:
            group["lr"] = float(schedule(step))
        adamw.step()
    expected = jax.tree.unflatten(structure, [p.detach().numpy() for p in theirs])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
        updates(options)[1],
        expected,
    )


def test_muon_s_matrices_are_orthogonal_and_of_adamw_s_size_and_the_rest_is_adamw():
    options = dataclasses.replace(CONSTANT, name="muon", learning_rate=1.0, weight_decay=0.0)
    first = updates(options, 1)[0][0]
    adamw = updates(dataclasses.replace(options, name="adamw"), 1)[0][0]
    for path in (("embed_tokens",), ("norm",), ("layers_0", "linear_attn", "q_conv")):
        ours, theirs = first, adamw
        for key in path:
            ours, theirs = ours[key], theirs[key]
        np.testing.assert_array_equal(ours["weight"], theirs["weight"])
    layer = first["layers_0"]
    np.testing.assert_array_equal(
        layer["self_attn"]["q_proj"]["bias"], adamw["layers_0"]["self_attn"]["q_proj"]["bias"]
    )
    matrices = [
        layer["self_attn"]["q_proj"]["weight"],
        *layer["mlp"]["experts"]["up_proj"]["weight"],
    ]
    # Nesterov's first direction is that of the gradient.
    gradients = tree(1)["layers_0"]
    directions = [
        gradients["self_attn"]["q_proj"]["weight"],
        *gradients["mlp"]["experts"]["up_proj"]["weight"],
    ]
    for matrix, gradient in zip(matrices, directions, strict=True):
        u, singular, vt = np.linalg.svd(-matrix, full_matrices=False)
        scale = 0.2 * max(matrix.shape) ** 0.5
        # Five iterations bring singular values to between 0.7 and 1.2.
        assert (np.abs(singular / scale - 1) < 0.35).all()
        gu, _, gvt = np.linalg.svd(gradient, full_matrices=False)
        np.testing.assert_allclose(u @ vt, gu @ gvt, atol=0.02)
        rms = np.sqrt(np.mean(np.square(matrix)))
        assert 0.1 < rms < 0.3


def test_muon_decays_matrices_and_not_vectors():
    with_decay, without = (
        updates(dataclasses.replace(CONSTANT, name="muon", weight_decay=decay), 1)[0][0]
        for decay in (0.5, 0.0)
    )
    rate = CONSTANT.learning_rate
    change = jax.tree.map(lambda a, b: a - b, with_decay, without)
    expected = jax.tree.map(lambda p: -0.5 * rate * p * (p.ndim > 1), tree())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), change, expected)


def test_adafactor_factors_matrices_and_follows_the_schedule():
    options = OptimiserOptions(
        name="adafactor", learning_rate=0.1, schedule="constant", warmup_steps=4, clip_norm=None
    )
    wide = {"up_proj": {"weight": jnp.ones((256, 128))}}
    state = make_optimiser(options, 10, wide).init(wide)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 1000
    decayed = dataclasses.replace(options, weight_decay=0.5)
    plain = dataclasses.replace(options, weight_decay=0.0)
    change = jax.tree.map(lambda a, b: a - b, updates(decayed, 1)[0][0], updates(plain, 1)[0][0])
    expected = jax.tree.map(lambda p: -0.5 * 0.1 / 4 * p * (p.ndim > 1), tree())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), change, expected)


def test_adafactor_s_updates_are_those_of_transformers():
    """A matrix with factored moments, a vector with whole ones and smaller than the least scale."""
    rng = np.random.default_rng(3)
    shapes = {"up_proj": (256, 128), "norm": (40,)}
    scales = {"up_proj": 0.3, "norm": 1e-4}
    params = {n: scales[n] * rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    # Rows of unlike size; gradients that grow, so that the second update is clipped.
    sizes = {n: np.exp(rng.standard_normal(s[0])).astype(np.float32) for n, s in shapes.items()}
    gradients = [
        {n: grow * (rng.standard_normal(s, np.float32).T * sizes[n]).T for n, s in shapes.items()}
        for grow in (1.0, 5.0, 0.1)
    ]
    theirs = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in params.items()}
    adafactor = transformers.Adafactor(
        theirs.values(), lr=0.1, relative_step=False, warmup_init=False, scale_parameter=True
    )
    options = dataclasses.replace(CONSTANT, name="adafactor", learning_rate=0.1, weight_decay=0.0)
    optimiser = make_optimiser(options, 10, params)
    state = optimiser.init(params)
    for gradient in gradients:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        adafactor.step()
        change, state = optimiser.update(gradient, state, params)
        params = optax.apply_updates(params, change)
        for name, parameter in theirs.items():
            np.testing.assert_allclose(
                params[name], parameter.detach(), rtol=0, atol=1e-5 * scales[name]
            )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"schedule": "constant"}, [8] * 10),
        ({"schedule": "constant", "warmup_steps": 4}, [2, 4, 6, 8, 8, 8, 8, 8, 8, 8]),
        (
            {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 4, "final_learning_rate": 0.5},
            [4, 8, 8, 8, 8, 8, 8, 7, 6, 5],
        ),
        (
            {"schedule": "cosine", "warmup_steps": 2, "final_learning_rate": 0.25},
            [4] + [2 + 6 * (1 + np.cos(np.pi * max(t - 2, 0) / 8)) / 2 for t in range(1, 10)],
        ),
    ],
)
def test_schedules_by_hand(fields, expected):
    schedule = make_schedule(OptimiserOptions(learning_rate=8.0, **fields), 10)
    np.testing.assert_allclose([schedule(step) for step in range(10)], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "lion"}, "name = lion is not supported; known: adamw, muon, adafactor"),
        ({"schedule": "linear"}, "schedule = linear is not supported; known: constant"),
        ({"b2": 1.0}, "b2 = 1.0 must be at least 0 and below 1"),
        ({"b1": 1.0}, "b1 = 1.0 must be at least 0 and below 1"),
        ({"momentum": 1.0}, "momentum = 1.0 must be at least 0 and below 1"),
        ({"eps": 0.0}, "eps = 0.0 must be above 0"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0 must be above 0"),
        ({"clip_norm": np.inf}, "clip_norm = inf must be finite, above 0"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0 must be at least 0"),
        ({"learning_rate": np.inf}, "learning_rate = inf must be finite, at least 0"),
        ({"weight_decay": np.nan}, "weight_decay = nan must be finite, at least 0"),
        ({"final_learning_rate": 1.5}, "final_learning_rate = 1.5 must be at least 0 and at most"),
        ({"decay_steps": 3}, "decay_steps = 3 is of schedule wsd, not of cosine"),
        (
            {"schedule": "constant", "final_learning_rate": 0.1},
            "final_learning_rate = 0.1 is of schedules that decay, not of constant; leave it out",
        ),
        ({"schedule": "wsd"}, "decay_steps = 0: schedule wsd needs steps to decay over"),
        ({"warmup_steps": 11}, "warmup_steps = 11 are more than the run's 10 steps"),
        ({"decay_except": ("embd",)}, "decay_except: no parameter's path has embd"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        make_optimiser(OptimiserOptions(**fields), 10, tree())
