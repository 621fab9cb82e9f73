"""Whoever drafts, what is drawn has the distribution of the model, by Pearson's test."""

import itertools

import jax
import numpy as np
import pytest
import scipy.stats

from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.drafting import DraftModel, MtpDraft
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.inference.speculation import SpeculativeStream
from tests.inference.random_models import HYBRID, disturbed, load_random, rows_of, with_head

VOCAB, ROWS = 12, 4096
PROMPT = [3, 1, 4, 1, 5]
OPTIONS = {
    "plain": SamplingOptions(temperature=1.0),
    "filtered": SamplingOptions(temperature=0.8, top_k=8, top_p=0.95, min_p=0.02),
    "top-k": SamplingOptions(temperature=1.3, top_k=5),
    "penalised": SamplingOptions(1.0, 0, 1.0, 0.0, 1.5, 0.4, 0.3),
}


@pytest.fixture(scope="module")
def dice(tmp_path_factory):
    """A model of twelve tokens, hybrid and with a head."""
    fields = {**HYBRID, "vocab_size": VOCAB, "hidden_size": 16, "bos_token_id": 0}
    return with_head(*load_random(tmp_path_factory.mktemp("dice"), "qwen3_next", **fields))


def exact(logits, text, options):
    """The probabilities of the next token by the definition of each option, one after another."""
    logits = np.asarray(logits, np.float64)
    new = text[len(PROMPT) :]
    for token in range(VOCAB):
        if token in text:
            factor = options.repetition_penalty
            logits[token] *= factor if logits[token] < 0 else 1 / factor
        logits[token] -= options.presence_penalty * (token in new)
        logits[token] -= options.frequency_penalty * new.count(token)
    p = np.exp(logits / options.temperature)
    order = np.argsort(-p)
    if options.top_k:
        p[order[options.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= options.top_p]] = 0
    p[p < options.min_p * p.max()] = 0
    return p / p.sum()


def exact_joint(model, params, options):
    """The probabilities [V, V, V] of the first three new tokens."""
    logits = jax.jit(lambda ids: model.apply({"params": params}, ids, logits_at="last").logits)

    def following(texts):
        found = logits(np.array(texts))[:, 0]
        rows = [exact(row, text, options) for row, text in zip(found, texts, strict=True)]
        return np.array(rows)

    tokens = range(VOCAB)
    first = following([PROMPT])[0]
    second = following([[*PROMPT, a] for a in tokens])
    third = following([[*PROMPT, a, b] for a in tokens for b in tokens])
    third = third.reshape(VOCAB, VOCAB, VOCAB)
    return first[:, None, None] * second[:, :, None] * third


def p_value(counts, probabilities):
    """Of Pearson's test, cells of fewer than five expected draws together in one."""
    counts, expected = counts.ravel(), probabilities.ravel() * counts.sum()
    assert counts[expected == 0].sum() == 0
    few = expected < 5
    counts, expected = (np.append(x[~few], x[few].sum()) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return scipy.stats.chisquare(counts, expected).pvalue


class Constant:
    """Always drafts the same, whether it is likely or not."""

    tokens = 2

    def __init__(self, drafts):
        self.drafts = drafts

    def find(self, text):
        return self.drafts


@pytest.mark.parametrize(
    ("drafter", "name"),
    [
        *itertools.product(["constant", "model"], OPTIONS),
        ("short", "filtered"),
        ("mtp", "plain"),
        ("mtp", "penalised"),
    ],
)
def test_draws_have_the_distribution_of_the_model(dice, drafter, name):
    """Pairs of the first three tokens by Pearson's test, on exact probabilities."""
    model, params = dice
    options = OPTIONS[name]
    joint = exact_joint(model, params, options)
    best = np.unravel_index(joint.argmax(), joint.shape)
    drafters = {
        "constant": Constant([int(best[0]), int(best[1])]),
        "short": Constant([int(joint.sum((1, 2)).argsort()[-2])]),
        "model": DraftModel(disturbed(params, 0.5), model, 2),
        "mtp": MtpDraft(2),
    }
    prompts = [PROMPT] * ROWS
    stream = SpeculativeStream(
        model, params, prompts, 3, drafters[drafter], options, stop_ids=[], seed=11
    )
    rows = np.array(rows_of(stream, ROWS))
    assert stream.counts.accepted > 100
    assert stream.counts.accepted < stream.counts.drafted - 100
    counts = np.zeros((VOCAB,) * 3)
    np.add.at(counts, tuple(rows.T), 1)
    for axis in (0, 1, 2):
        assert p_value(counts.sum(axis), joint.sum(axis)) > 1e-4, axis


def test_the_test_of_distributions_tells_a_little_off(dice):
    """A temperature of 0.8 for 1 is found out."""
    model, params = dice
    joint = exact_joint(model, params, OPTIONS["plain"])
    stream = TokenStream(
        model, params, [PROMPT] * ROWS, 3, SamplingOptions(0.8), stop_ids=[], seed=11
    )
    counts = np.zeros((VOCAB,) * 3)
    np.add.at(counts, tuple(zip(*rows_of(stream, ROWS), strict=True)), 1)
    assert p_value(counts.sum(0), joint.sum(0)) < 1e-4
