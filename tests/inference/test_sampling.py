"""Distributions against transformers' processors, penalties against the published formula."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from qwen_jax import UserError
from qwen_jax.inference.sampling import (
    SamplingOptions,
    candidates,
    choose,
    count,
    init_seen,
    penalise,
)

V = 97


def random_logits(rows=4, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (rows, V)).astype(np.float32)


def distribution(logits, options):
    """Probabilities [B, V] of what may be drawn."""
    kept, ids = candidates(jnp.asarray(logits), options.rule())
    probabilities = np.asarray(jax.nn.softmax(kept, axis=-1))
    if ids is None:
        return probabilities
    full = np.zeros_like(logits)
    np.put_along_axis(full, np.asarray(ids), probabilities, axis=1)
    return full


def reference_distribution(logits, options, input_ids=None):
    """The same through transformers, in the order in which its `generate` has them."""
    processors = []
    if options.repetition_penalty != 1.0:
        processors.append(
            logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
        )
    processors.append(logits_process.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(logits_process.TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        processors.append(logits_process.TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(logits_process.MinPLogitsWarper(options.min_p))
    scores = torch.as_tensor(logits)
    for processor in processors:
        scores = processor(None if input_ids is None else torch.as_tensor(input_ids), scores)
    return torch.softmax(scores, dim=-1).numpy()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [*itertools.product([0.6, 2.5], [0, 1, 20], [1.0, 0.8, 0.3], [0.0, 0.1, 0.6])],
)
def test_distribution_equals_the_reference(temperature, top_k, top_p, min_p):
    options = SamplingOptions(temperature, top_k, top_p, min_p)
    logits = random_logits(rows=8, seed=top_k)
    expected = reference_distribution(logits, options)
    found = distribution(logits, options)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("factor", [1.3, 0.5])
def test_repetition_penalty_equals_the_reference_through_all_warpers(factor):
    options = SamplingOptions(0.7, 30, 0.9, 0.02, repetition_penalty=factor)
    rng = np.random.default_rng(1)
    prompt, output = rng.integers(0, V, (4, 25)), rng.integers(0, V, (4, 12))
    logits = random_logits()
    expected = reference_distribution(logits, options, np.hstack([prompt, output]))
    seen = init_seen(jnp.asarray(prompt), jnp.ones_like(prompt), V)
    for tokens in output.T:
        seen = count(seen, jnp.asarray(tokens))
    found = distribution(np.asarray(penalise(jnp.asarray(logits), seen, options.rule())), options)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("factor", "presence", "frequency"), [(1.0, 0.7, 0.0), (1.0, 0.0, 0.4),
                         (1.0, -0.5, -0.3), (1.4, 0.9, 0.25)])  # fmt: skip
def test_presence_and_frequency_penalties_follow_their_definition(factor, presence, frequency):
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting the output alone."""
    options = SamplingOptions(
        repetition_penalty=factor, presence_penalty=presence, frequency_penalty=frequency
    )
    rng = np.random.default_rng(2)
    prompt, output = rng.integers(0, V, (3, 10)), rng.integers(0, 12, (3, 30))
    mask = np.arange(10) < np.array([[10], [4], [7]])
    logits = random_logits(rows=3)
    seen = init_seen(jnp.asarray(prompt), jnp.asarray(mask), V)
    for tokens in output.T:
        seen = count(seen, jnp.asarray(tokens))
    expected = logits.astype(np.float64)
    for row, j in itertools.product(range(3), range(V)):
        times = int((output[row] == j).sum())
        if times or j in prompt[row, mask[row]]:
            expected[row, j] *= factor if expected[row, j] < 0 else 1 / factor
        expected[row, j] -= times * frequency + (times > 0) * presence
    np.testing.assert_allclose(
        penalise(logits, seen, options.rule()), expected, rtol=1e-5, atol=1e-5
    )


def test_padding_is_not_seen():
    seen = init_seen(jnp.array([[5, 9, 9]]), jnp.array([[1, 0, 0]]), 12)
    assert np.flatnonzero(seen.in_prompt[0]).tolist() == [5]


def test_a_tiny_top_p_keeps_the_best_token_alone():
    logits = random_logits()
    for options in (
        SamplingOptions(1.0, top_p=1e-9),
        SamplingOptions(1.0, top_k=1),
        SamplingOptions(1.0, min_p=1.0),
        SamplingOptions(1e-30),
        SamplingOptions(5e-324, top_k=7, top_p=0.5),
    ):
        probabilities = distribution(logits, options)
        assert (probabilities.argmax(-1) == logits.argmax(-1)).all(), options
        np.testing.assert_array_equal(probabilities.max(-1), 1.0)


def test_a_top_k_above_the_vocabulary_filters_nothing():
    logits = random_logits()
    expected = distribution(logits, SamplingOptions(1.0))
    found = distribution(logits, SamplingOptions(1.0, top_k=10 * V))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (found > 0).all()


def test_ties_at_the_border_keep_the_lower_ids():
    """As `SamplingOptions` documents; transformers keeps all four."""
    logits = np.full((1, 6), -20.0, np.float32)
    logits[0, [1, 2, 4, 5]] = 1.0
    for options in (SamplingOptions(1.0, top_k=2), SamplingOptions(1.0, top_p=0.49)):
        assert np.flatnonzero(distribution(logits, options)[0] > 0).tolist() == [1, 2]
    kept = distribution(logits, SamplingOptions(1.0, min_p=1.0))[0]
    assert np.flatnonzero(kept).tolist() == [1, 2, 4, 5]


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


@pytest.mark.parametrize("options", [SamplingOptions(1.5), SamplingOptions(0.9, 12, 0.85, 0.03)])
def test_draws_follow_the_distribution(options):
    logits, N = random_logits(rows=1, seed=5), 40_000
    expected = distribution(logits, options)[0] * N
    draws = choose(jnp.repeat(logits, N, axis=0), None, keys(N), options.rule())
    counts = np.bincount(draws, minlength=V)
    assert not counts[expected == 0].any()
    common = expected >= 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum()
    # Mean and variance of chi-square are its degrees of freedom and twice that.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_a_greedy_choice_is_the_best_token_whatever_the_filters():
    logits = random_logits()
    tokens = choose(logits, None, keys(4), SamplingOptions(0.0, top_k=3, top_p=0.2).rule())
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(1.0, 5)])
def test_logits_without_a_best_token_are_marked(options):
    logits = random_logits(rows=3)
    logits[1, 40] = np.nan
    logits[2, 7] = np.inf
    tokens = np.asarray(choose(jnp.asarray(logits), None, keys(3), options.rule()))
    assert tokens[0] >= 0
    assert tokens[1:].tolist() == [-1, -1]


REFUSED = {
    "temperature": [-0.1, float("nan"), float("inf"), 1e39, "0.7", True, None],
    "top_k": [-1, 2.0, 1.5, float("inf"), float("nan"), "5"],
    "top_p": [0.0, -0.5, 1.0001, float("nan")],
    "min_p": [-0.01, 1.01, float("nan")],
    "repetition_penalty": [0.0, -1.0, float("inf"), 10**400],
    "presence_penalty": [float("nan"), float("inf"), [0.5]],
    "frequency_penalty": [float("-inf"), 1j],
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_out_of_range_are_refused_by_name_and_value(name):
    for value in REFUSED[name]:
        with pytest.raises(UserError) as refusal:
            SamplingOptions(**{name: value})
        message = str(refusal.value)
        assert message.startswith(f"{name} = {value!r} should be "), message
        assert "\n" not in message


def test_numpy_scalars_are_numbers():
    options = SamplingOptions(np.float32(0.5), np.int64(3), np.float64(0.9))
    assert (options.top_k, options.greedy) == (3, False)
    assert dataclasses.replace(options, temperature=0).greedy
