"""Rows that take one prompt after another, against each prompt by itself."""

import re

import jax
import numpy as np
import pytest

import qwen_jax
from qwen_jax.errors import UserError
from qwen_jax.inference import slots
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.generation import generate
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.inference.slots import SlotStream
from qwen_jax.nn.cache import init_cache
from tests.inference.random_models import FAMILIES, rows_of
from tests.reference import random_reference, save_reference


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    family, fields = FAMILIES[request.param]
    reference = random_reference(family, max_position_embeddings=512, **fields)
    return qwen_jax.load_pretrained(save_reference(reference, tmp_path_factory.mktemp(family)))


def prompts(model, lengths, seed=0, shared=0):
    rng = np.random.default_rng(seed)
    common = rng.integers(0, model.config.vocab_size, shared)
    draw = [rng.integers(0, model.config.vocab_size, n) for n in lengths]
    return [[*common.tolist(), *own.tolist()] for own in draw]


@pytest.mark.parametrize("shared", [0, 40])
def test_greedy_texts_are_those_of_each_prompt_by_itself(loaded, shared):
    """Prompts of less than a piece, of several, and of one to the token; answers of all lengths."""
    model, params = loaded
    asked = prompts(model, [3, 16, 37, 90, 1, 64, 17], shared=shared)
    most = [9, 1, 14, 5, 22, 2, 11]
    stream = SlotStream(model, params, asked, most, stop_ids=(), slots=3)
    found = rows_of(stream, len(asked))
    assert [len(text) for text in found] == most
    for prompt, text, limit in zip(asked, found, most, strict=True):
        assert text == generate(model, params, [prompt], max_new_tokens=limit, stop_ids=())[0]
    assert 0.8 < stream.occupancy <= 1


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=1.0, top_k=20),
        SamplingOptions(1.0, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1),
    ],
    ids=["plain", "penalties"],
)
def test_draws_are_those_of_each_prompt_by_itself(loaded, options):
    model, params = loaded
    asked = prompts(model, [3, 20, 37, 9], seed=1)
    found = rows_of(SlotStream(model, params, asked, 8, options, (), seed=5, slots=2), 4)
    for i, prompt in enumerate(asked):
        stream = TokenStream(model, params, [prompt], 8, options, (), seed=5, first_row=i)
        assert found[i] == [token for (token,) in stream]


def test_stop_ids_stops_and_forced_tokens(loaded):
    model, params = loaded
    asked = prompts(model, [5, 6, 7], seed=2)
    free = rows_of(SlotStream(model, params, asked, 12, stop_ids=(), slots=2), 3)
    stop = free[0][4]
    stream = SlotStream(model, params, asked, 12, stop_ids=(stop,), slots=2)
    stream.force(1, [11, 12])
    found = [[] for _ in asked]
    for step in stream:
        for row, token in enumerate(step):
            if token is not None:
                found[row].append(token)
        if len(found[2]) == 3:
            stream.stop(2)
    assert found[0] == free[0][: free[0].index(stop) + 1]
    assert found[1][:2] == [11, 12]
    by_itself = TokenStream(model, params, asked[1:2], 12, stop_ids=(stop,))
    by_itself.force(0, [11, 12])
    assert found[1] == [token for (token,) in by_itself]
    assert len(found[2]) == 3 or stop in found[2]


def test_rows_are_dropped_once_no_prompt_waits(loaded, monkeypatch):
    """Of rows that move to others' places, draws, penalties and caches move with them."""
    model, params = loaded
    monkeypatch.setattr(slots, "_LEAST_ROWS", 1)
    asked = prompts(model, [5, 20, 9, 17, 3], seed=4)
    most = [3, 6, 14, 2, 9]
    options = SamplingOptions(1.0, repetition_penalty=1.3, presence_penalty=0.2)
    stream = SlotStream(model, params, asked, most, options, (), seed=5, slots=4)
    found, rows = [[] for _ in asked], []
    for step in stream:
        rows.append(len(stream._slots))
        for own, token in zip(found, step, strict=True):
            if token is not None:
                own.append(token)
    assert list(dict.fromkeys(rows)) == [4, 2, 1]
    for i, prompt in enumerate(asked):
        alone = TokenStream(model, params, [prompt], most[i], options, (), seed=5, first_row=i)
        assert found[i] == [token for (token,) in alone]


def test_prompts_are_read_alone_until_half_of_the_rows_write(loaded, monkeypatch):
    model, params = loaded
    parts, step = [], slots.slot_step

    def watch(model, params, state, active, *rest):
        parts.append((None if active is None else int(active.sum()), rest[-1] is not None))
        return step(model, params, state, active, *rest)

    monkeypatch.setattr(slots, "slot_step", watch)
    monkeypatch.setattr(slots, "_COUNTS", (1,))
    stream = SlotStream(model, params, prompts(model, [16] * 6), 5, stop_ids=(), slots=4)
    assert [len(text) for text in rows_of(stream, 6)] == [5] * 6
    # Two are read, then two more beside them; of the four, two end and make way, then the others.
    assert parts[:4] == [(None, True), (None, True), (2, True), (3, True)]
    assert all(active is None or active >= 2 for active, has_piece in parts if has_piece)
    assert stream.occupancy == 1
    assert 0.5 < stream.writing < 1


def test_the_end_of_a_prompt_is_one_piece_where_filling_up_is_less_than_a_pass(loaded):
    """A step without a text of its own reads pieces: how many steps a first token takes."""
    model, params = loaded
    for length, passes in ((17, 1), (33, 1), (90, 2), (100, 1)):
        steps = iter(SlotStream(model, params, prompts(model, [length]), 1, stop_ids=()))
        assert next(i for i, (token,) in enumerate(steps, 1) if token is not None) == passes


def cost_by_hand(count, tokens):
    """By trying all, what `slots` says that it takes to read so many tokens of so many prompts."""
    if tokens <= 0:
        return 0
    return min(
        slots._COST_OF_PASS + count * size + cost_by_hand(count, tokens - size)
        for size in slots._SIZES
        if count * size <= slots._LARGEST
    )


@pytest.mark.parametrize("left", [[1], [17], [90], [300], [40] * 8, [16, 300], [90, 20, 33, 60, 8]])
def test_prompts_are_read_in_the_passes_that_cost_the_least_a_token(left):
    count, size = slots.shape_of_pieces(left)
    counts = [n for n in slots._COUNTS if n < 2 * len(left)]
    costs = {n: cost_by_hand(n, max(left[:n])) / sum(left[:n]) for n in counts}
    assert costs[count] == min(costs.values())
    after = cost_by_hand(count, max(left[:count]) - size)
    assert slots._COST_OF_PASS + count * size + after == cost_by_hand(count, max(left[:count]))


def test_a_cache_that_is_too_small_grows(loaded, monkeypatch):
    model, params = loaded
    monkeypatch.setattr(slots, "_FIRST_ROOM", 2)
    asked = prompts(model, [4, 30], seed=3)
    found = rows_of(SlotStream(model, params, asked, 40, stop_ids=(), slots=2), 2)
    for prompt, text in zip(asked, found, strict=True):
        assert text == generate(model, params, [prompt], max_new_tokens=40, stop_ids=())[0]


def test_a_step_with_a_piece_copies_no_cache(loaded):
    model, params = loaded
    B, S, C = 8, 4096, 16
    cache = init_cache(model.config, B, S, np.float32)
    rows = np.zeros(B, np.int32)
    state = slots.SlotState(cache, rows, jax.random.split(jax.random.key(0), B), rows, None)
    ids, mask = np.zeros((1, C), np.int32), np.ones((1, C), bool)
    pieces = slots.Pieces(ids, mask, np.zeros(1, np.int32), np.ones(1, bool))
    rule = SamplingOptions().rule()
    step = slots.slot_step.lower(model, params, state, rows > 0, rows, rule, pieces).compile()
    whole = f"f32[{B},{S},{model.config.num_key_value_heads},{model.config.head_dim}]"
    text = step.as_text()
    assert whole in text
    copies = re.findall(re.escape(whole) + r"\S* copy\(", text)
    assert copies == []


def test_bad_input_is_refused(loaded):
    model, params = loaded
    with pytest.raises(UserError, match="prompt 1 is empty"):
        SlotStream(model, params, [[1], []], 3)
    with pytest.raises(UserError, match="max_new_tokens"):
        SlotStream(model, params, [[1], [2]], [3, 0])
    with pytest.raises(UserError, match="on a mesh"):
        SlotStream(model.clone(mesh=qwen_jax.sharding.axes.as_mesh("tensor:2")), params, [[1]], 3)
    assert rows_of(SlotStream(model, params, [], 3), 0) == []
