"""Which tokens need distant ones: against two passes over every prefix, and a copied text."""

import numpy as np
import pytest

import qwen_jax
from experiments.long_context.key_tokens import key_spans, short_window
from tests.reference import random_reference, save_reference


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    reference = random_reference("qwen3", num_hidden_layers=2)
    return qwen_jax.load_pretrained(save_reference(reference, tmp_path_factory.mktemp("model")))


def test_windows_are_those_published_or_a_quarter():
    assert short_window(32_768) == (4096, 1024)
    assert short_window(1024) == (256, 64)


def test_key_tokens_are_those_that_the_whole_text_makes_likelier(loaded, monkeypatch):
    """By the logits of the text, and of every window up to the token before."""
    model, params = loaded
    ids = np.random.default_rng(0).integers(2, 90, 64).tolist()
    window, scored = short_window(64)

    def log_prob(logits, token):
        return float(logits[token] - np.logaddexp.reduce(logits))

    def run(text):
        return np.asarray(model.apply({"params": params}, np.array([text])).logits[0])

    of_text = run(ids)
    gains, likely = [], []
    for i in range(1, 64):
        block = (i - window) // scored
        first = 0 if i < window else min(window + (block + 1) * scored, 64) - window
        whole = log_prob(of_text[i - 1], ids[i])
        short = log_prob(run(ids[first:i])[-1], ids[i]) if first else whole
        gains.append(whole - short)
        likely.append(whole)
    # Thresholds between what a random model's tokens have, so that there are keys and others.
    gain, least = float(np.quantile(gains, 0.8)) + 1e-3, float(np.quantile(likely, 0.3)) + 1e-3
    monkeypatch.setattr("experiments.long_context.key_tokens._GAIN", gain)
    monkeypatch.setattr("experiments.long_context.key_tokens._LIKELY", least)
    expected = [i + 1 for i in range(63) if gains[i] > gain and likely[i] > least]
    spans = key_spans(model, params, ids, 4)
    assert [i for begin, end in spans for i in range(begin, end)] == expected
    assert 3 < len(expected) < 30
