"""Streamed text against a whole decode; stop strings; why a text ended."""

import itertools

import pytest

from qwen_jax import UserError
from qwen_jax.inference.completion import complete
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.sampling import SamplingOptions

SAMPLED = SamplingOptions(temperature=1.0)
PROMPTS = [[9707, 11], [100, 200, 300, 400], [35946]]


class Script:
    """A stream of given ids, for texts that no random model writes."""

    def __init__(self, *rows):
        self.steps = itertools.zip_longest(*rows)
        self.ended = [False] * len(rows)

    def __iter__(self):
        for step in self.steps:
            yield [None if end else token for token, end in zip(step, self.ended, strict=True)]

    def stop(self, row):
        self.ended[row] = True

    def active(self, row):
        return not self.ended[row]


def run(stream, rows, tokenizer, stops=()):
    pieces = [[] for _ in range(rows)]
    completions, timing = complete(
        stream, rows, tokenizer, stops, lambda row, text: pieces[row].append(text)
    )
    return completions, pieces, timing


@pytest.mark.parametrize("seed", range(4))
def test_pieces_joined_are_the_decoded_ids(narrow, tokenizer, seed):
    stream = TokenStream(*narrow, PROMPTS, 60, SAMPLED, [], seed)
    completions, pieces, timing = run(stream, 3, tokenizer)
    for completion, row in zip(completions, pieces, strict=True):
        expected = tokenizer.decode(completion.ids, skip_special_tokens=True)
        assert "".join(row) == completion.text == expected
        assert all(row)
        assert len(row) > 30
        assert completion.finish_reason == "length"
        assert len(completion.ids) == 60
    assert timing.first_token_s > 0
    assert timing.tokens_per_s > 0


def test_no_piece_holds_part_of_a_character(tokenizer):
    text = "naïve 𓂀 🫠👩🏽‍🚀 龘龖 ︎ e\u0301 ﷽"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode(token) for token in ids)
    (completion,), (pieces,), _ = run(Script(ids), 1, tokenizer)
    assert completion.text == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 10


def test_a_character_cut_off_by_the_limit_is_replaced(tokenizer):
    ids = tokenizer.encode("a𓂀")
    (completion,), _, _ = run(Script(ids[:-1]), 1, tokenizer)
    assert completion.text == "a\ufffd" == tokenizer.decode(ids[:-1])


def test_special_tokens_are_no_text(tokenizer):
    ids = tokenizer.encode("one<|im_end|>two<|endoftext|>")
    (completion,), _, _ = run(Script(ids), 1, tokenizer)
    assert completion.text == "onetwo"
    assert completion.ids == ids


def test_a_stop_string_across_tokens_ends_its_row_alone(narrow, tokenizer):
    free, _, _ = run(TokenStream(*narrow, PROMPTS, 30, SAMPLED, [], 1), 3, tokenizer)
    border = len(tokenizer.decode(free[1].ids[:12]))
    stop = free[1].text[border - 2 : border + 2]
    assert not any(stop in tokenizer.decode(token) for token in free[1].ids)
    cut = free[1].text.index(stop)
    stream = TokenStream(*narrow, PROMPTS, 30, SAMPLED, [], 1)
    found, pieces, _ = run(stream, 3, tokenizer, ["never written", stop])
    assert found[1].text == "".join(pieces[1]) == free[1].text[:cut]
    assert found[1].finish_reason == "stop"
    assert found[1].ids == free[1].ids[: len(found[1].ids)]
    assert len(found[1].ids) <= 14
    assert (found[0], found[2]) == (free[0], free[2])


def test_what_might_have_become_a_stop_string_is_given_out_in_the_end(tokenizer):
    (completion,), (pieces,), _ = run(
        Script(tokenizer.encode("so it ends with STO")), 1, tokenizer, ["STOP"]
    )
    assert completion.text == "".join(pieces) == "so it ends with STO"
    assert completion.finish_reason == "length"


def test_a_stop_string_that_is_whole_only_at_the_end_counts(tokenizer):
    """The last character is cut off, and its replacement completes the stop string."""
    ids = tokenizer.encode("a𓂀")[:-1]
    (completion,), _, _ = run(Script(ids), 1, tokenizer, ["\ufffd"])
    assert (completion.text, completion.finish_reason) == ("a", "stop")


def test_a_stop_id_is_among_the_ids_and_the_reason(narrow, tokenizer):
    free, _, _ = run(TokenStream(*narrow, PROMPTS, 12, SAMPLED, [], 2), 3, tokenizer)
    stop_id = free[2].ids[11]
    assert stop_id not in free[2].ids[:11]
    found, _, _ = run(TokenStream(*narrow, PROMPTS, 12, SAMPLED, [stop_id], 2), 3, tokenizer)
    assert found[2].ids == free[2].ids
    assert [completion.finish_reason for completion in found] == ["length", "length", "stop"]


def test_an_empty_stop_string_is_refused_before_anything_runs(narrow, tokenizer):
    stream = TokenStream(*narrow, PROMPTS, 5)
    with pytest.raises(UserError, match="non-empty"):
        run(stream, 3, tokenizer, [""])
    assert stream.cache is None
