"""Rows that take one prompt after another, against each prompt by itself."""

import numpy as np
import pytest

import qwen_jax
from qwen_jax.errors import UserError
from qwen_jax.inference.decoding import TokenStream, generate
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.inference.slots import SlotStream
from tests.reference import random_reference, save_reference

FAMILIES = {
    "dense": ("qwen3", {"num_hidden_layers": 2}),
    "sparse": ("qwen3_moe", {"num_hidden_layers": 2}),
    "hybrid": (
        "qwen3_next",
        {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
}


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


def texts(stream, count):
    found = [[] for _ in range(count)]
    for step in stream:
        for own, token in zip(found, step, strict=True):
            if token is not None:
                own.append(token)
    return found


@pytest.mark.parametrize("shared", [0, 40])
def test_greedy_texts_are_those_of_each_prompt_by_itself(loaded, shared):
    """Prompts of less than a piece, of several, and of one to the token; answers of all lengths."""
    model, params = loaded
    asked = prompts(model, [3, 16, 37, 90, 1, 64, 17], shared=shared)
    most = [9, 1, 14, 5, 22, 2, 11]
    stream = SlotStream(model, params, asked, most, stop_ids=(), slots=3)
    found = texts(stream, len(asked))
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
    found = texts(SlotStream(model, params, asked, 8, options, (), seed=5, slots=2), 4)
    for i, prompt in enumerate(asked):
        stream = TokenStream(model, params, [prompt], 8, options, (), seed=5, first_row=i)
        assert found[i] == [token for (token,) in stream]


def test_stop_ids_stops_and_forced_tokens(loaded):
    model, params = loaded
    asked = prompts(model, [5, 6, 7], seed=2)
    free = texts(SlotStream(model, params, asked, 12, stop_ids=(), slots=2), 3)
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


def test_a_cache_that_is_too_small_grows(loaded, monkeypatch):
    from qwen_jax.inference import slots

    model, params = loaded
    monkeypatch.setattr(slots, "_FIRST_ROOM", 2)
    asked = prompts(model, [4, 30], seed=3)
    found = texts(SlotStream(model, params, asked, 40, stop_ids=(), slots=2), 2)
    for prompt, text in zip(asked, found, strict=True):
        assert text == generate(model, params, [prompt], max_new_tokens=40, stop_ids=())[0]


def test_bad_input_is_refused(loaded):
    model, params = loaded
    with pytest.raises(UserError, match="prompt 1 is empty"):
        SlotStream(model, params, [[1], []], 3)
    with pytest.raises(UserError, match="max_new_tokens"):
        SlotStream(model, params, [[1], [2]], [3, 0])
    with pytest.raises(UserError, match="on a mesh"):
        SlotStream(model.clone(mesh=qwen_jax.sharding.axes.as_mesh("tensor:2")), params, [[1]], 3)
    assert texts(SlotStream(model, params, [], 3), 0) == []
