"""What drafters draft: any draft leaves the output as it is, so that nothing else would tell.

And that draft models which do not fit do no harm.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import qwen_jax
from qwen_jax.inference import speculation
from qwen_jax.inference.drafting import DraftModel, MtpDraft, PromptLookup
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.inference.speculation import SpeculativeStream
from qwen_jax.models.decoder import Decoder
from tests.inference.random_models import disturbed, random_prompts, rows_of


# The longest n-gram of the end that stands earlier, its last place, what follows it.
@pytest.mark.parametrize(
    ("text", "max_ngram", "tokens", "expected"),
    [
        ([1, 2, 3, 9, 2, 3, 5, 1, 2, 3], 3, 3, [9, 2, 3]),
        ([1, 2, 3, 9, 2, 3, 5, 1, 2, 3], 2, 3, [5, 1, 2]),
        ([4, 2, 3, 9, 1, 3, 5, 2, 3], 9, 2, [9, 1]),
        ([1, 2, 3, 4], 3, 3, []),
        ([1], 3, 3, []),
        ([7, 7], 3, 4, [7, 7, 7, 7]),
        ([5, 1, 2, 1, 2], 2, 5, [1, 2, 1, 2, 1]),
    ],
)
def test_a_look_up_repeats_what_followed_last_time(text, max_ngram, tokens, expected):
    assert list(PromptLookup(max_ngram, tokens).find(np.array(text))) == expected


def test_a_look_up_finds_what_a_search_finds():
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = rng.integers(0, 4, rng.integers(1, 30)).tolist()
        expected = []
        for size in range(1, 4):
            places = [
                i for i in range(size, len(text)) if text[i - size : i] == text[len(text) - size :]
            ]
            if places:
                tail = text[places[-1] :]
                expected = list(itertools.islice(itertools.cycle(tail), 5))
        assert list(PromptLookup(3, 5).find(np.array(text))) == expected


@pytest.fixture
def drafted(monkeypatch):
    """What each pass had for drafts, [B, n]."""
    seen, verify = [], speculation.verify

    def recording(logits, drafts, *rest):
        jax.debug.callback(lambda drafts: seen.append(np.asarray(drafts)), drafts, ordered=True)
        return verify(logits, drafts, *rest)

    monkeypatch.setattr(speculation, "verify", recording)
    jax.clear_caches()
    speculation.speculate.cache_clear()
    yield seen
    jax.clear_caches()
    speculation.speculate.cache_clear()


def passes_of(stream, prompts):
    """The texts of both rows at the beginning of each pass."""
    texts, before = [list(prompt) for prompt in prompts], []
    while not all(stream.finished(row) for row in range(len(texts))):
        if not any(stream._waiting):
            before.append([list(text) for text in texts])
        for text, token in zip(texts, next(stream), strict=True):
            text += [] if token is None else [token]
    return before


def check_drafts(stream, prompts, drafted, draft):
    texts = passes_of(stream, prompts)
    jax.effects_barrier()
    assert len(texts) == len(drafted) > 3
    compared = 0
    for before, drafts in zip(texts, drafted, strict=True):
        for prompt, text, own in zip(prompts, before, drafts, strict=True):
            expected = draft(text)
            if expected is not None and len(text) < len(prompt) + stream._most:
                assert own.tolist() == expected
                compared += 1
    assert compared > 6


def test_a_draft_model_drafts_what_it_would_write(hybrid, drafted):
    """A hybrid itself, and right again behind drafts that did not stand."""
    model, params = hybrid
    small = disturbed(params, 0.2)
    prompts = random_prompts([5, 9])
    stream = SpeculativeStream(model, params, prompts, 12, DraftModel(small, model, 3), stop_ids=[])

    def draft(text):
        return qwen_jax.generate(model, small, [text], 3, stop_ids=[])[0]

    check_drafts(stream, prompts, drafted, draft)
    assert 0 < stream.counts.acceptance < 1


@pytest.mark.parametrize("lengths", [[5, 9], [1, 2]])
def test_the_head_drafts_what_it_predicts_of_the_whole_text(hybrid, drafted, lengths):
    model, params = hybrid
    prompts = random_prompts(lengths)
    stream = SpeculativeStream(model, params, prompts, 9, MtpDraft(3), stop_ids=[])

    # Both see the past alone, so that what stands behind a text makes no difference.
    main = jax.jit(lambda ids: model.apply({"params": params}, ids).hidden_states[-1])
    head = jax.jit(
        lambda hidden, next_ids: model.apply(
            {"params": params}, hidden, next_ids, method="predict_next"
        )
    )

    def draft(text):
        n, padded = len(text), np.zeros((1, 24), np.int32)
        if n < 2:
            return None
        padded[0, :n] = text
        hidden, next_ids, drafts = np.array(main(padded)), np.roll(padded, -1), []
        for place in range(n - 2, n + 1):
            out = head(hidden, next_ids)
            drafts.append(int(out.logits[0, place].argmax()))
            # Behind the text it reads its own.
            hidden[0, place + 1] = out.hidden_states[-1][0, place]
            next_ids[0, place + 1] = drafts[-1]
        return drafts

    check_drafts(stream, prompts, drafted, draft)


def test_a_draft_model_without_numbers_does_no_harm(dense):
    model, params = dense
    prompts = random_prompts()
    broken = {**params, "norm": {"weight": params["norm"]["weight"] * np.nan}}
    drafter = DraftModel(broken, model, 2)
    expected = qwen_jax.generate(model, params, prompts, 6, stop_ids=[])
    assert qwen_jax.generate(model, params, prompts, 6, stop_ids=[], speculate=drafter) == expected
    options = SamplingOptions(1.0, top_k=9)
    stream = SpeculativeStream(model, params, prompts, 6, drafter, options, [])
    assert all(len(row) == 6 for row in rows_of(stream, len(prompts)))
    assert stream.counts.accepted == 0


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(1.0)])
@pytest.mark.parametrize("size", [300, 352])
def test_a_draft_model_may_have_a_table_of_another_size(dense, size, options):
    """Padding is never drafted, and what both have is as well as before."""
    model, params = dense
    table = np.asarray(params["embed_tokens"]["weight"])
    head = np.asarray(params["lm_head"]["weight"])

    def resized(x):
        # Padding that would be the likeliest.
        rows = max(size - len(x), 0)
        return np.concatenate([x[:size], np.full((rows, x.shape[1]), 9.0, x.dtype)])

    padded = {
        **params,
        "embed_tokens": {"weight": resized(table)},
        "lm_head": {"weight": resized(head)},
    }
    other = Decoder(dataclasses.replace(model.config, vocab_size=size))
    drafter = DraftModel(padded, other, 3, num_ids=min(size, 320))
    prompts = random_prompts(vocab_size=300)
    stream = SpeculativeStream(model, params, prompts, 12, drafter, options, [])
    found = rows_of(stream, len(prompts))
    assert all(len(row) == 12 and max(row) < 320 for row in found)
    if options.greedy:
        assert found == qwen_jax.generate(model, params, prompts, 12, stop_ids=[])
    if size > 320:
        assert stream.counts.acceptance == 1
