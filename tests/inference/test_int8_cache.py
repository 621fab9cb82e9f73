"""Writing with an int8 cache: in a batch, in rows that take prompts in turn, in chats."""

import numpy as np
import pytest

import qwen_jax
from qwen_jax.errors import UserError
from qwen_jax.inference import slots
from qwen_jax.inference.conversation import Conversation
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.drafting import PromptLookup
from qwen_jax.inference.generation import generate
from qwen_jax.inference.slots import SlotStream
from qwen_jax.inference.speculation import SpeculativeStream
from tests.inference.random_models import FAMILIES, rows_of
from tests.inference.test_slots import prompts
from tests.reference import random_reference, save_reference


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    family, fields = FAMILIES[request.param]
    reference = random_reference(family, max_position_embeddings=512, **fields)
    return qwen_jax.load_pretrained(save_reference(reference, tmp_path_factory.mktemp(family)))


@pytest.mark.parametrize("shared", [0, 40])
def test_rows_in_turn_write_what_each_prompt_gets_by_itself(loaded, shared, monkeypatch):
    monkeypatch.setattr(slots, "_FIRST_ROOM", 2)
    model, params = loaded
    asked = prompts(model, [3, 37, 20], shared=shared)
    stream = SlotStream(model, params, asked, 8, stop_ids=(), slots=2, cache_dtype="int8")
    found = rows_of(stream, len(asked))
    assert stream._state.cache.is_int8
    for prompt, text in zip(asked, found, strict=True):
        alone = generate(model, params, [prompt], 8, stop_ids=(), cache_dtype="int8")
        assert text == alone[0]


def test_a_batch_writes_what_each_prompt_gets_by_itself_and_its_cache_grows(loaded):
    model, params = loaded
    asked = prompts(model, [3, 20, 9])
    stream = TokenStream(model, params, asked, 12, stop_ids=(), cache_dtype="int8")
    found = rows_of(stream, len(asked))
    assert stream.cache.is_int8
    assert stream.cache.capacity > 20
    for prompt, text in zip(asked, found, strict=True):
        alone = generate(model, params, [prompt], 12, stop_ids=(), cache_dtype="int8")
        assert text == alone[0]


def test_a_given_cache_keeps_its_own_dtype_or_is_refused(loaded):
    model, params = loaded
    stream = TokenStream(model, params, [[1, 2, 3]], 3, stop_ids=(), cache_dtype="int8")
    for _ in stream:
        pass
    following = TokenStream(model, params, [[4]], 3, stop_ids=(), cache=stream.cache)
    for _ in following:
        pass
    assert following.cache.is_int8
    stream = TokenStream(model, params, [[1, 2, 3]], 3, stop_ids=())
    for _ in stream:
        pass
    assert not stream.cache.is_int8
    with pytest.raises(UserError, match="the cache given has other keys and values"):
        TokenStream(model, params, [[4]], 3, cache=stream.cache, cache_dtype="int8")
    for make in (TokenStream, SlotStream):
        with pytest.raises(UserError, match="cache_dtype = 'fp8': give int8, or None"):
            make(model, params, [[4]], 3, cache_dtype="fp8")


def test_drafts_are_verified_against_an_int8_cache(loaded):
    model, params = loaded
    asked = prompts(model, [3, 20])
    drafter = PromptLookup()
    options = {"stop_ids": (), "cache_dtype": "int8"}
    expected = generate(model, params, asked, 10, **options)
    assert generate(model, params, asked, 10, **options, speculate=drafter) == expected
    stream = SpeculativeStream(model, params, asked, 10, drafter, **options)
    next(stream)
    assert stream._state.cache.is_int8


def test_a_chat_keeps_its_int8_cache_between_turns(narrow, tokenizer):
    chat = Conversation(*narrow, tokenizer, cache_dtype="int8")
    answers = [chat.reply(text, 5, stop_ids=())[0].ids for text in ("Hi", "And?")]
    assert chat._cache.is_int8
    asked = chat._render(chat.messages[:2] + chat.messages[2:3], open_turn=True)
    again = generate(*narrow, [asked], 5, stop_ids=(), cache_dtype="int8")
    assert answers[1] == again[0]
    assert np.shape(answers) == (2, 5)
    with pytest.raises(UserError, match="cache_dtype = 'int2'"):
        Conversation(*narrow, tokenizer, cache_dtype="int2")
