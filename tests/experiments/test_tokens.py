"""Texts of a vocabulary without words: where everything stands, and what follows what."""

import numpy as np
import pytest

from experiments.long_context.tasks import TASKS, LossTask, RecallTask
from experiments.long_context.tokens import Language, TokenRenderer
from qwen_jax.errors import UserError

LANGUAGE = Language()
KEYS = range(LANGUAGE.first_key, LANGUAGE.first_value)
VALUES = range(LANGUAGE.first_value, LANGUAGE.first_value + LANGUAGE.num_values)
FILLER = range(LANGUAGE.first_filler, LANGUAGE.first_key)
WITH_TOKENS = [
    name
    for name in TASKS
    if name not in ("cwe", "fwe") and not name.endswith(("multikey_2", "multikey_3"))
]


def render(task, length, seed=0, depth=None):
    rng = np.random.default_rng(seed)
    return TokenRenderer(LANGUAGE).render(task.draw(rng, depth), length, rng)


@pytest.mark.parametrize("name", WITH_TOKENS)
@pytest.mark.parametrize("length", (40, 128))
def test_texts_have_the_length_that_was_asked_for(name, length):
    example = render(TASKS[name], length)
    assert len(example.ids) == length and example.ids[0] == LANGUAGE.begin
    assert max(example.ids) < LANGUAGE.vocab_size
    spans = [*example.answers, *example.drawn]
    covered = [i for begin, end in spans for i in range(begin, end)]
    assert len(covered) == len(set(covered)) and min(covered) > 0 and max(covered) < length


@pytest.mark.parametrize("seed", range(5))
def test_each_key_of_recall_is_said_before_it_is_asked_for(seed):
    example = render(RecallTask(8), 128, seed)
    ids, said = example.ids, {}
    answers = dict(example.answers)
    asked = 0
    for i, token in enumerate(ids):
        if token in KEYS and i + 1 not in answers:
            assert token not in said
            said[token] = ids[i + 1]
        elif token in KEYS:
            assert said[token] == ids[i + 1] and ids[i + 1] in VALUES
            asked += 1
    assert (len(said), asked) == (8, 8)
    # What a model could not know: the facts, and which key is asked for next.
    drawn = [i for begin, end in example.drawn for i in range(begin, end)]
    assert len(drawn) == 3 * 8


def test_distances_of_recall_are_spread_evenly():
    shares = []
    for seed in range(150):
        example = render(RecallTask(4), 400, seed)
        for begin, _ in example.answers:
            key = example.ids[begin - 1]
            shares.append((begin - 1 - example.ids.index(key)) / 400)
    counts, _ = np.histogram(shares, bins=5, range=(0, 1))
    # 120 each; a draw of both places would leave 24 in the last fifth.
    assert counts.min() > 85


def test_a_needle_stands_at_its_depth_and_is_asked_for_at_the_end():
    for depth, place in ((0.0, 1), (0.5, 99), (1.0, 196)):
        example = render(TASKS["niah_single_2"], 200, depth=depth)
        ids = example.ids
        assert example.answers == ((199, 200),)
        assert ids.index(ids[198]) == pytest.approx(place, abs=1) and ids[198] in KEYS
        assert ids[ids.index(ids[198]) + 1] == ids[199]


def test_a_pass_key_is_four_values_behind_a_marker():
    ids = render(TASKS["passkey"], 60, depth=0.3).ids
    first = ids.index(LANGUAGE.marker)
    assert ids[-5:] == ids[first : first + 5] and set(ids[-4:]) <= set(VALUES)


def test_variables_are_set_before_the_next_is_set_to_them():
    example = render(TASKS["vt"], 100)
    ids, names = example.ids, [example.ids[begin] for begin, _ in example.answers]
    assert ids[-6] in VALUES and len(set(names)) == 5
    pairs = [(ids[i], ids[i + 1]) for i in range(93)]
    sources = [ids[-6], *names[:-1]]
    places = [pairs.index(pair) for pair in zip(names, sources, strict=True)]
    assert places == sorted(places)


def test_facts_as_filler_are_of_other_keys():
    example = render(TASKS["niah_multikey_2"], 101)
    ids = example.ids
    assert len(ids) == 101 and ids[:-2].count(ids[-2]) == 1
    assert sum(token in KEYS for token in ids) >= 48


def test_filler_follows_its_table():
    """Counts of what follows pairs of tokens against the mean of the two distributions."""
    language = Language(num_filler=3)
    ids = np.array(language.filler(np.random.default_rng(0), 60_000)) - language.first_filler
    last, before = language.followers
    for a in range(3):
        for b in range(3):
            here = (ids[:-2] == a) & (ids[1:-1] == b)
            found = np.bincount(ids[2:][here], minlength=3) / here.sum()
            expected = (last[b] + before[a]) / 2
            assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / here.sum())


def test_losses_are_of_all_or_of_the_end():
    example = render(LossTask(), 128)
    assert example.answers[0] == (1, 8) and example.answers[-1] == (120, 128)
    assert len(example.answers) == 16
    assert render(LossTask(last=256), 128).answers == ((96, 128),)
    assert LossTask(last=256).draw(None, None).spans(4096) == ((3840, 4096),)


@pytest.mark.parametrize(
    ("name", "length", "message"),
    (
        ("cwe", 400, "questions of the kind common need words; leave the task out of --tasks"),
        ("passkey", 8, "a text of 8 tokens is too short"),
        ("loss", 20, "a text of 20 tokens is too short for 16 parts"),
    ),
)
def test_what_it_cannot_say_is_refused(name, length, message):
    with pytest.raises(UserError, match=message):
        render(TASKS[name], length)


def test_more_keys_than_tokens_are_refused():
    with pytest.raises(UserError, match="31 different keys or values, where the vocabulary has 30"):
        render(RecallTask(31), 400)
