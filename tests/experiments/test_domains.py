"""Domains of texts: against their own tables, right sums, closed brackets, and shares of texts."""

import itertools
import re

import grain
import numpy as np
import pytest

from experiments.moe_balance import domains
from experiments.moe_balance.domains import (
    DOMAINS,
    LOW_ENTROPY,
    VOCAB_SIZE,
    Domains,
    TrainingBatches,
    entropy_rate,
    held_out_batches,
    real_text,
    texts_digest,
)

MARKOV = ("markov_a", "markov_b", "markov_c")
CHAINS = ("dna", *MARKOV)
TEXTS = ("python", "english")
PAIRS = {")": "(", "]": "[", "}": "{"}


def draw(name, count=4, length=32, seed=0, held_out=False):
    return Domains(seed).rows(name, count, length, np.random.default_rng(1), held_out)


def strings(rows):
    return ["".join(map(chr, row)) for row in rows.tolist()]


def same(first, second):
    assert first.keys() == second.keys() == {"input_ids", "domains"}
    return all(np.array_equal(first[name], second[name]) for name in first)


def sums(batches):
    number = DOMAINS.index("arithmetic")
    return np.concatenate([batch["input_ids"][batch["domains"] == number] for batch in batches])


def positions_in_symbols(source, rows):
    """Rows of symbols as their places in the source's table."""
    place = {int(symbol): i for i, symbol in enumerate(source.symbols)}
    return [[place[token] for token in row] for row in rows.tolist()]


def chain_of_contexts(source):
    """The source as a chain of order 1, its states tuples of symbols."""
    symbols = range(len(source.symbols))
    states = list(itertools.product(symbols, repeat=source.order))
    step = np.zeros((len(states), len(states)))
    for i, state in enumerate(states):
        for new in symbols:
            step[i, states.index((*state[1:], new))] += source.transitions[i, new]
    return states, step


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("length", (1, 2, 32, 70))
def test_rows_have_the_asked_for_shape_and_ids_of_the_vocabulary(name, length):
    rows = draw(name, 50, length)
    assert rows.shape == (50, length) and rows.dtype == np.int32
    assert rows.min() >= 0 and rows.max() < VOCAB_SIZE


@pytest.mark.parametrize("name", DOMAINS)
def test_rows_are_those_of_the_generator_of_random_numbers(name):
    first, second = draw(name), draw(name)
    assert np.array_equal(first, second)
    other = Domains(0).rows(name, 4, 32, np.random.default_rng(2))
    assert not np.array_equal(first, other)


def test_the_first_domains_are_those_of_few_symbols():
    symbols = {name: len(np.unique(draw(name, 100))) for name in DOMAINS}
    assert LOW_ENTROPY == ("dna", "arithmetic", "brackets")
    assert [symbols[name] for name in (*LOW_ENTROPY, *MARKOV)] == [4, 13, 6, 24, 24, 24]
    assert min(symbols[name] for name in TEXTS) > 40


@pytest.mark.parametrize("name", CHAINS)
def test_sources_are_those_of_the_seed(name):
    first, again, other = (Domains(seed).source(name) for seed in (0, 0, 1))
    assert np.array_equal(first.transitions, again.transitions)
    assert np.array_equal(first.symbols, again.symbols)
    assert not np.array_equal(first.transitions, other.transitions)


@pytest.mark.parametrize("seed", range(3))
def test_markov_alphabets_overlap_without_being_equal(seed):
    sources = [Domains(seed).source(name) for name in MARKOV]
    for one, other in itertools.combinations(sources, 2):
        assert 12 <= len({*one.symbols} & {*other.symbols}) < 24
        assert not np.array_equal(one.transitions, other.transitions)


@pytest.mark.parametrize("name", CHAINS)
def test_tokens_follow_each_other_as_often_as_the_table_says(name):
    source = Domains(0).source(name)
    states, _ = chain_of_contexts(source)
    rows = positions_in_symbols(source, draw(name, 3000))
    counts = np.zeros(source.transitions.shape)
    starts = np.zeros(len(states))
    index = {state: i for i, state in enumerate(states)}
    for row in rows:
        starts[index[tuple(row[: source.order])]] += 1
        for end in range(source.order, len(row)):
            counts[index[tuple(row[end - source.order : end])], row[end]] += 1
    visits = counts.sum(axis=1, keepdims=True)
    assert np.median(visits) > 500

    def close(found, total, p):
        return np.abs(found - total * p) <= 5 * np.sqrt(total * p * (1 - p)) + 2

    assert close(counts, visits, source.transitions).all()
    assert close(starts, len(rows), source.stationary).all()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CHAINS)
def test_entropy_rate_is_what_an_endless_text_has(seed, name):
    """By the state after very many steps, from wherever, and by texts' own likelihood."""
    source = Domains(seed).source(name)
    _, step = chain_of_contexts(source)
    far = np.linalg.matrix_power(step, 2**16)
    rate = 0.0
    for share, row in zip(far[0], source.transitions, strict=True):
        rate -= share * sum(p * np.log(p) for p in row if p > 0)
    np.testing.assert_allclose(far, np.tile(source.stationary, (len(far), 1)), atol=1e-9)
    assert entropy_rate(seed, name) == pytest.approx(rate, rel=1e-8)
    surprises = []
    for row in positions_in_symbols(source, draw(name, 1000, seed=seed)):
        for end in range(source.order, len(row)):
            context = 0
            for symbol in row[end - source.order : end]:
                context = len(source.symbols) * context + symbol
            surprises.append(-np.log(source.transitions[context, row[end]]))
    assert np.mean(surprises) == pytest.approx(rate, abs=0.03)


def test_dna_needs_all_of_the_three_tokens_before():
    """By how much likelier the table makes a symbol than the two newest alone do."""
    source = Domains(0).source("dna")
    joint = (source.stationary[:, None] * source.transitions).reshape(4, 4, 4, 4)
    of_two = joint.sum(axis=0)
    of_two /= of_two.sum(axis=-1, keepdims=True)
    with_two = -(joint * np.log(of_two)).sum()
    assert source.order == 3
    assert with_two > entropy_rate(0, "dna") + 0.1


def test_the_sums_are_right():
    seen = set()
    for text in strings(draw("arithmetic", 400)):
        *lines, last = text.split("\n")
        assert len(lines) >= 3
        for line in lines:
            a, b, total = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", line).groups())
            assert a + b == total
            seen |= {a, b}
        assert re.fullmatch(r"(\d+(\+(\d+(=\d*)?)?)?)?", last)
    assert seen == set(range(100))


def test_every_bracket_closes_the_one_that_was_opened_last():
    depths = set()
    for text in strings(draw("brackets", 200, 64)):
        due = []
        for token in text:
            if token in PAIRS:
                assert due.pop() == PAIRS[token]
            else:
                due.append(token)
                assert token in PAIRS.values()
            depths.add(len(due))
    assert {0, 1, 2, 3, 4} <= depths and max(depths) <= 8


@pytest.mark.parametrize("name", TEXTS)
def test_held_out_texts_share_no_place_with_those_trained_on(name, monkeypatch):
    """Of a text whose every token is its own place."""
    monkeypatch.setattr(domains, "real_text", lambda name: np.arange(1000, dtype=np.int32))
    trained, held_out = (draw(name, 5000, held_out=held_out) for held_out in (False, True))
    assert set(trained.ravel()) == set(range(900))
    assert set(held_out.ravel()) == set(range(900, 1000))


def test_batches_to_measure_on_are_held_out_and_those_to_train_on_are_not(monkeypatch):
    monkeypatch.setattr(domains, "real_text", lambda name: np.arange(1000, dtype=np.int32))
    numbers = [DOMAINS.index(name) for name in TEXTS]

    def places(batches):
        rows = [batch["input_ids"][np.isin(batch["domains"], numbers)] for batch in batches]
        return np.concatenate(rows)

    assert places(TrainingBatches(0, 50)).max() < 900
    assert places(held_out_batches(0)).min() >= 900


@pytest.mark.parametrize("name", TEXTS)
def test_real_texts_are_long_ascii_that_rows_are_windows_of(name):
    text = real_text(name)
    assert len(text) > 200_000 and text.max() < VOCAB_SIZE
    whole = bytes(text.tolist()).decode("ascii")
    assert ("import sys" if name == "python" else "Assert statements are") in whole
    assert all(row in whole for row in strings(draw(name)))


def test_the_digest_tells_texts_apart(monkeypatch):
    digest = texts_digest()
    assert re.fullmatch("[0-9a-f]{16}", digest) and texts_digest() == digest
    for changed in TEXTS:
        with monkeypatch.context() as patch:
            patch.setattr(
                domains,
                "real_text",
                lambda name, changed=changed: real_text(name)[int(name == changed) :],
            )
            assert texts_digest() != digest


def looks_like(name, text):
    source = "".join(map(chr, Domains(3).source(name).symbols)) if name in CHAINS else ""
    match name:
        case "arithmetic":
            return set(text) <= set("0123456789+=\n")
        case "brackets":
            return set(text) <= set("()[]{}")
        case "python" | "english":
            return text in bytes(real_text(name).tolist()).decode("ascii")
    return set(text) <= set(source)


@pytest.mark.parametrize("held_out", (False, True))
def test_every_batch_has_one_micro_batch_of_every_domain(held_out):
    batches = held_out_batches(3, 3072, 3) if held_out else list(TrainingBatches(3, 4, 3))
    assert len(batches) == 4
    for batch in batches:
        ids, numbers = batch["input_ids"], batch["domains"]
        assert ids.shape == (24, 32) and numbers.shape == (24,)
        assert ids.dtype == numbers.dtype == np.int32
        micro = numbers.reshape(8, 3)
        assert (micro == micro[:, :1]).all()
        assert sorted(micro[:, 0]) == list(range(8))
        for number, text in zip(numbers, strings(ids), strict=True):
            assert looks_like(DOMAINS[number], text)


def test_the_order_of_domains_is_drawn_anew_for_each_step():
    orders = [tuple(batch["domains"][::4]) for batch in TrainingBatches(0, 60)]
    assert len(set(orders)) > 55
    assert {order[0] for order in orders} == set(range(8))


def test_a_batch_is_that_of_its_seed_and_number_alone():
    batches = TrainingBatches(0, 5)
    backwards = [batches[number] for number in reversed(range(5))][::-1]
    longer = TrainingBatches(0, 1000)
    for number in range(5):
        assert same(batches[number], backwards[number])
        assert same(batches[number], longer[number])
    assert not np.array_equal(sums(batches), sums(TrainingBatches(1, 5)))
    assert not any(same(*pair) for pair in itertools.combinations(batches, 2))


def test_batches_end_where_there_are_no_more():
    assert len(TrainingBatches(0, 3)) == len(list(TrainingBatches(0, 3))) == 3
    with pytest.raises(IndexError, match="batch 3 of 3"):
        TrainingBatches(0, 3)[3]


def test_grain_reads_the_batches_in_order():
    batches = TrainingBatches(0, 3)
    read = list(grain.MapDataset.source(batches).to_iter_dataset())
    assert len(read) == 3
    assert all(same(*pair) for pair in zip(read, batches, strict=True))


def test_held_out_batches_are_the_same_for_all_of_one_seed():
    first, again, other = (held_out_batches(seed) for seed in (0, 0, 1))
    assert sum(batch["input_ids"].size for batch in first) == 16_384
    assert all(same(*pair) for pair in zip(first, again, strict=True))
    # What does not hang on the sources is drawn anew too.
    assert not np.array_equal(sums(first), sums(other))
    assert not any(same(*pair) for pair in itertools.combinations(first, 2))


def test_no_batch_of_training_is_drawn_as_one_that_is_held_out():
    """But for lines of dashes and the like, which come often."""
    drawn = {row for batch in held_out_batches(0) for row in strings(batch["input_ids"])}
    trained = {row for batch in TrainingBatches(0, 100) for row in strings(batch["input_ids"])}
    assert len(drawn & trained) <= 3


def test_little_of_held_out_english_stands_in_what_is_trained_on():
    whole = bytes(real_text("english").tolist())
    windows = [whole[i : i + 32] for i in range(len(whole) - 31)]
    cut = len(whole) * 9 // 10
    trained = set(windows[: cut - 31])
    assert np.mean([window in trained for window in windows[cut:]]) < 0.12
