"""Speculation against decoding token by token: the same ids, the same cache.

Any draft leaves the output as it is, so that what drafters draft is tested by itself, in
test_drafting.py; the distribution of what is drawn in test_verification.py.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import qwen_jax
from qwen_jax.errors import UserError
from qwen_jax.inference import speculation
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.drafting import DraftModel, MtpDraft, PromptLookup
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.inference.speculation import Counts, SpeculativeStream
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import init_cache, open_cache, rewind_cache
from qwen_jax.nn.delta_rule import DeltaState
from qwen_jax.rope_scaling import with_rope_scaling
from tests.inference.random_models import FAMILIES, disturbed, random_prompts, rows_of

NEW = 24


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, load_family):
    return load_family(request.param)


class Oracle:
    """Knows the texts, and drafts as many right tokens as it is told before wrong ones."""

    def __init__(self, prompts, texts, right, tokens=3):
        self.known = list(zip(prompts, texts, strict=True))
        self.right, self.tokens = right, tokens

    def find(self, text):
        text = text.tolist()
        for prompt, continuation in self.known:
            written = len(text) - len(prompt)
            if text == prompt + continuation[:written]:
                coming = continuation[written : written + self.tokens]
                return [t if i < self.right else (t + 1) % 320 for i, t in enumerate(coming)]
        return []


@pytest.mark.parametrize("drafter", ["lookup", "model", "mtp"])
def test_greedy_ids_of_a_ragged_batch_are_those_of_plain_decoding(loaded, drafter):
    model, params = loaded
    if drafter == "mtp" and not model.config.mtp_layers:
        pytest.skip("only hybrids have the head")
    # Repetitions for the look-up.
    prompts = [prompt * 2 for prompt in random_prompts()]
    expected = qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])
    drafters = {
        "lookup": PromptLookup(tokens=4),
        "model": DraftModel(disturbed(params, 0.04), model, 3),
        "mtp": MtpDraft(2),
    }
    stream = SpeculativeStream(model, params, prompts, NEW, drafters[drafter], stop_ids=[])
    assert rows_of(stream, len(prompts)) == expected
    counts = stream.counts
    assert counts.tokens == NEW * len(prompts)
    assert 0 <= counts.accepted <= counts.drafted
    assert counts.drafted > 0
    if drafter == "model":
        assert 0.2 < counts.acceptance < 1
        assert 1.2 < counts.tokens_per_pass < 4


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_as_many_drafts_stand_as_are_right(loaded, right):
    """And in no more passes than that takes: 24 new tokens, 1 + `right` in each."""
    model, params = loaded
    prompts = random_prompts()
    expected = qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])
    oracle = Oracle(prompts, expected, right)
    stream = SpeculativeStream(model, params, prompts, NEW, oracle, stop_ids=[])
    assert rows_of(stream, len(prompts)) == expected
    counts = stream.counts
    assert counts.passes == len(prompts) * NEW // (1 + right)
    assert counts.tokens_per_pass == 1 + right
    last = {0: 3, 1: 1, 2: 2, 3: 0}[right]
    assert counts.accepted == len(prompts) * (NEW - NEW // (1 + right))
    assert last <= counts.drafted


def test_penalties_count_the_drafts_that_stand(dense):
    model, params = dense
    prompts = random_prompts()
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    expected = qwen_jax.generate(model, params, prompts, NEW, stop_ids=[], **penalties)
    assert expected != qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])
    for drafter in (Oracle(prompts, expected, 3), DraftModel(disturbed(params, 0.04), model, 3)):
        found = qwen_jax.generate(
            model, params, prompts, NEW, stop_ids=[], speculate=drafter, **penalties
        )
        assert found == expected


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5])
def test_a_stop_id_among_the_drafts_ends_a_row(loaded, at):
    model, params = loaded
    prompts = random_prompts()
    free = qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])
    stop_ids = [free[0][at]]
    expected = qwen_jax.generate(model, params, prompts, NEW, stop_ids=stop_ids)
    oracle = Oracle(prompts, free, 3)
    stream = SpeculativeStream(model, params, prompts, NEW, oracle, stop_ids=stop_ids)
    assert rows_of(stream, len(prompts)) == expected
    assert not stream.active(0)
    assert stream.finished(0)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_tokens_than_were_asked_for(dense, most):
    model, params = dense
    prompts = random_prompts()
    free = qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])
    stream = SpeculativeStream(model, params, prompts, most, Oracle(prompts, free, 3), stop_ids=[])
    assert rows_of(stream, len(prompts)) == [row[:most] for row in free]
    assert all(stream.active(row) and stream.finished(row) for row in range(len(prompts)))


def one_by_one(model, params, text):
    """The cache of a text that is decoded without drafts."""
    cache = init_cache(model.config, 1, 64, np.float32)
    step = jax.jit(lambda ids, cache: model.apply({"params": params}, ids, cache=cache).cache)
    for token in text:
        cache = step(np.array([[token]]), cache)
    return cache


def assert_same_cache(found, row, expected):
    """Up to the rounding of sums, where there are tokens."""
    n = int(expected.lengths[0])
    assert int(found.lengths[row]) == int(found.next_positions[row]) == n
    np.testing.assert_array_equal(found.ids[row, :n], expected.ids[0, :n])
    np.testing.assert_array_equal(found.positions[row, :n], expected.positions[0, :n])
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert type(ours) is type(theirs)
        cut = slice(None) if isinstance(ours, DeltaState) else slice(n)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a[row][cut], b[0][cut], rtol=0, atol=2e-5)


@pytest.mark.parametrize("right", [0, 1, 3])
def test_the_cache_is_that_of_the_tokens_handed_on(loaded, right):
    """At every step, in the middle of what a pass gave too, and of rows that have ended."""
    model, params = loaded
    prompts = random_prompts()
    free = qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])
    stream = SpeculativeStream(
        model, params, prompts, 9, Oracle(prompts, free, right), stop_ids=[free[0][4]]
    )
    assert stream.cache is None
    texts = [list(prompt) for prompt in prompts]
    for i, step in enumerate(stream):
        for text, token in zip(texts, step, strict=True):
            text += [] if token is None else [token]
        if i in (0, 1, 5, 8):
            found = stream.cache
            for row, text in enumerate(texts):
                assert_same_cache(found, row, one_by_one(model, params, text[:-1]))
    assert len(texts[0]) == len(prompts[0]) + 1 + free[0].index(free[0][4])


def test_a_plain_stream_goes_on_from_the_cache_of_a_speculative_one(loaded):
    model, params = loaded
    prompts = random_prompts([6])
    (free,) = qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])
    stream = SpeculativeStream(model, params, prompts, NEW, Oracle(prompts, [free], 2), stop_ids=[])
    begun = [token for (token,) in itertools.islice(stream, 8)]
    rest = TokenStream(model, params, [begun[-1:]], NEW - 8, stop_ids=[], cache=stream.cache)
    assert begun + [token for (token,) in rest] == free


@pytest.mark.parametrize("drafter", ["oracle", "model", "mtp"])
def test_forced_tokens_come_first_whatever_was_drafted(hybrid, drafter):
    """Before the first step, in the middle of what a pass gave, and twice in a row."""
    model, params = hybrid
    prompts = random_prompts([5, 8])
    free = qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])
    drafters = {
        "oracle": Oracle(prompts, free, 3),
        "model": DraftModel(params, model, 3),
        "mtp": MtpDraft(2),
    }

    def run(stream):
        rows = [[], []]
        stream.force(0, [9, 8, 7, 6, 5, 4])
        for step in stream:
            for row, token in enumerate(step):
                if token is None:
                    continue
                rows[row].append(token)
                if row == 1 and len(rows[1]) == 2:
                    stream.force(1, [11])
                    stream.force(1, [12])
                if row == 0 and len(rows[0]) == 3:
                    stream.force(0, [3])
        return rows

    expected = run(TokenStream(model, params, prompts, NEW, stop_ids=[]))
    assert expected[0][:7] == [9, 8, 7, 6, 5, 4, 3]
    assert expected[1][2:4] == [11, 12]
    stream = SpeculativeStream(model, params, prompts, NEW, drafters[drafter], stop_ids=[])
    assert run(stream) == expected


def test_a_stopped_row_gives_none_and_the_others_go_on(dense):
    model, params = dense
    prompts = random_prompts([5, 8])
    free = qwen_jax.generate(model, params, prompts, 12, stop_ids=[])
    stream = SpeculativeStream(model, params, prompts, 12, Oracle(prompts, free, 3), stop_ids=[])
    rows = [[], []]
    for step in stream:
        for row, token in enumerate(step):
            rows[row] += [] if token is None else [token]
        if len(rows[0]) == 2:
            stream.stop(0)
    assert rows == [free[0][:2], free[1]]


def test_a_cache_that_grows_gives_what_a_large_one_gives(hybrid, monkeypatch):
    model, params = hybrid
    monkeypatch.setattr(speculation, "_FIRST_ROOM", 8)
    prompts = random_prompts([7, 4])
    expected = qwen_jax.generate(model, params, prompts, 60, stop_ids=[])
    capacities = set()
    stream = SpeculativeStream(
        model, params, prompts, 60, DraftModel(params, model, 3), stop_ids=[]
    )
    rows = [[], []]
    for step in stream:
        for row, token in zip(rows, step, strict=True):
            row += [] if token is None else [token]
        capacities.add(stream.cache.capacity)
    assert rows == expected
    assert len(capacities) >= 3
    assert stream.counts.acceptance == 1


def test_a_step_updates_its_caches_in_place(hybrid):
    model, params = hybrid
    stream = SpeculativeStream(model, params, random_prompts([7]), 20, MtpDraft(2), stop_ids=[])
    for _ in range(4):
        next(stream)
    before = stream._state
    caches = (before.cache.layers[1], before.draft_cache.layers[0])
    addresses = [cache.keys.unsafe_buffer_pointer() for cache in caches]
    stream._run()
    after = stream._state
    assert all(cache.keys.is_deleted() for cache in caches)
    caches = (after.cache.layers[1], after.draft_cache.layers[0])
    assert [cache.keys.unsafe_buffer_pointer() for cache in caches] == addresses


def test_steps_with_drafts_and_without_are_two_programs(hybrid):
    model, params = hybrid
    prompts = random_prompts([7])
    free = qwen_jax.generate(model, params, prompts, NEW, stop_ids=[])
    # Of a text that it does not know it has no drafts.
    oracle = Oracle(prompts, [free[0][:8]], 3)
    stream = SpeculativeStream(model, params, prompts, 16, oracle, stop_ids=[])
    step = speculation.speculate("cpu")
    before = step._cache_size()
    assert rows_of(stream, 1) == [free[0][:16]]
    assert step._cache_size() - before == 2
    assert stream.counts.passes == 2 + 8


def test_the_same_seed_gives_the_same_tokens_whatever_the_batch(dense):
    model, params = dense
    prompts = random_prompts()
    options = SamplingOptions(1.0)

    def run(prompts, first_row, seed=5):
        drafter = DraftModel(disturbed(params, 0.04), model, 2)
        stream = SpeculativeStream(model, params, prompts, 8, drafter, options, [], seed, first_row)
        return rows_of(stream, len(prompts))

    together = run(prompts, 0)
    assert together == run(prompts, 0)
    assert together != run(prompts, 0, seed=6)
    assert together[2:] == run(prompts[2:], 2)


def test_logits_that_are_not_numbers_are_told(dense):
    model, params = dense
    broken = {**params, "norm": {"weight": params["norm"]["weight"] * np.nan}}
    stream = SpeculativeStream(model, broken, [[1, 2]], 4, PromptLookup())
    with pytest.raises(UserError, match="the logits of new token 1 are NaN"):
        next(stream)


def test_an_open_cache_gives_its_last_tokens_back(hybrid):
    """Each row another number, and the next call's logits are those without them."""
    model, params = hybrid
    ids = np.array(random_prompts([14, 14, 14]))
    run = jax.jit(lambda ids, cache: model.apply({"params": params}, ids, cache=cache))
    cache = init_cache(model.config, 3, 32, np.float32)
    before = run(ids[:, :6], cache).cache
    opened = run(ids[:, 6:11], open_cache(model.config, before)).cache
    lengths = np.array([6, 9, 11])
    cache = rewind_cache(opened, lengths)
    for row, n in enumerate(lengths):
        assert_same_cache(cache, row, one_by_one(model, params, ids[row, :n]))
    with pytest.raises(ValueError, match="linear-attention states cannot be rewound"):
        rewind_cache(cache, 5)


def test_counts_add_up():
    counts = Counts(2, 5, 6, 3) + Counts(2, 3, 2, 1)
    assert counts == Counts(4, 8, 8, 4)
    assert (counts.acceptance, counts.tokens_per_pass) == (0.5, 2.0)
    assert (Counts().acceptance, Counts().tokens_per_pass) == (0, 0)


def test_bad_input_is_refused(dense, hybrid):
    model, params = dense
    other = Decoder(dataclasses.replace(model.config, vocab_size=300))
    dynamic = model.clone(
        config=with_rope_scaling(model.config, {"rope_type": "dynamic", "factor": 2.0})
    )
    mesh = model.clone(mesh=qwen_jax.sharding.axes.as_mesh("tensor:2"))
    two = hybrid[0].clone(config=dataclasses.replace(hybrid[0].config, mtp_layers=2))
    lookup = PromptLookup()
    for refused, drafter, message in (
        (model, MtpDraft(), r"no head for the token after the next \(mtp_layers = 0\)"),
        (two, MtpDraft(), "mtp_layers = 2: a head of several layers drafts 1 token, not 2"),
        (model, MtpDraft(0), "tokens = 0 should be an integer"),
        (model, DraftModel(params, other), "the draft model has vocab_size = 300, the model 320"),
        (model, DraftModel(params, model, 0), "tokens = 0 should be an integer"),
        (model, DraftModel(params, dynamic), "the draft model: rope_type = dynamic"),
        (model, DraftModel(params, mesh), "the draft model: there is no speculation on a mesh"),
        (dynamic, lookup, "rope_type = dynamic changes with the length of the text"),
        (mesh, lookup, "there is no speculation on a mesh"),
    ):
        with pytest.raises(UserError, match=message):
            SpeculativeStream(refused, params, [[1]], 3, drafter)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        SpeculativeStream(model, params, [[1], []], 3, lookup)
    with pytest.raises(UserError, match="max_new_tokens = 0"):
        SpeculativeStream(model, params, [[1]], 0, lookup)
    for arguments in ({"max_ngram": 0}, {"tokens": 0}):
        with pytest.raises(UserError, match="= 0 should be an integer, at least 1"):
            PromptLookup(**arguments)
    assert qwen_jax.generate(model, params, [], speculate=lookup) == []
