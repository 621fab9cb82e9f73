"""Streamed text against a whole decode; stop strings; why a text ended."""

import dataclasses
import itertools

import pytest

import qwen_jax
from qwen_jax import UserError
from qwen_jax.inference.completion import ThinkingBudget, complete
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.sampling import SamplingOptions
from tests.text.real_vocabulary import write_qwen3_tokenizer

SAMPLED = SamplingOptions(temperature=1.0)
PROMPTS = [[9707, 11], [100, 200, 300, 400], [35946]]


class Script:
    """A stream of given ids, for texts that no random model writes."""

    def __init__(self, *rows):
        self.steps = itertools.zip_longest(*rows)
        self.ended = [False] * len(rows)
        self.left = [len(row) for row in rows]

    def __iter__(self):
        for step in self.steps:
            self.left = [left - 1 for left in self.left]
            yield [None if end else token for token, end in zip(step, self.ended, strict=True)]

    def stop(self, row):
        self.ended[row] = True

    def active(self, row):
        return not self.ended[row]

    def finished(self, row):
        return self.ended[row] or self.left[row] <= 0


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


CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="session")
def thinker(tokenizer, tmp_path_factory):
    """Qwen3's tokenizer where the small model has a row for each token."""
    directory = write_qwen3_tokenizer(tmp_path_factory.mktemp("thinker"))
    return dataclasses.replace(
        qwen_jax.load_tokenizer(directory), chat_templates=tokenizer.chat_templates
    )


def open_prompt(thinker, words):
    return thinker.encode(f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n<think>\n")


def budgeted(narrow, thinker, prompts, limit, new=24, **options):
    stream = TokenStream(*narrow, prompts, new, SamplingOptions(**options), [], 1)
    budget = ThinkingBudget(limit, thinker, prompts)
    return complete(stream, len(prompts), thinker, thinking_budget=budget)[0]


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_reasoning_is_closed_at_its_budget_and_the_answer_follows(narrow, thinker, limit):
    prompts = [open_prompt(thinker, "Hi"), thinker.encode("plain"), open_prompt(thinker, "a b c")]
    free = qwen_jax.generate(*narrow, prompts, 24, stop_ids=[])
    closing = thinker.encode("</think>\n\n")
    assert len(closing) == 2
    found = budgeted(narrow, thinker, prompts, limit)
    assert found[1].ids == free[1]
    for row in (0, 2):
        assert found[row].ids[:limit] == free[row][:limit]
        assert found[row].ids[limit : limit + 2] == closing
        prompt = prompts[row] + found[row].ids[: limit + 2]
        rest = qwen_jax.generate(*narrow, [prompt], 24 - limit - 2, stop_ids=[])[0]
        assert found[row].ids[limit + 2 :] == rest


class Recorder(Script):
    """A script that takes forced tokens into its rows, as a stream does."""

    def __init__(self, *rows):
        self.rows, self.ended = [list(row) for row in rows], [False] * len(rows)
        self.forced = [[] for _ in rows]
        self.given = 0

    def force(self, row, ids):
        self.rows[row][self.given : self.given] = ids
        self.forced[row].append((self.given, ids))

    def __iter__(self):
        while self.given < max(map(len, self.rows)):
            step = [row[self.given] if self.given < len(row) else None for row in self.rows]
            self.given += 1
            yield step

    def finished(self, row):
        return self.ended[row] or self.given >= len(self.rows[row])


def scripted(thinker, limit, *rows, prompts=None):
    stream = Recorder(*(thinker.encode(row) for row in rows))
    prompts = [[1]] * len(rows) if prompts is None else prompts
    budget = ThinkingBudget(limit, thinker, prompts)
    completions, _ = complete(stream, len(rows), thinker, thinking_budget=budget)
    return [completion.text for completion in completions], stream.forced


def test_rows_reach_their_budget_at_different_points(thinker):
    texts, forced = scripted(
        thinker,
        3,
        "<think>\none two three four",
        "\n\n<think>\none two three four",
        "one <think> two three four",
        "<think>\none</think>two three four",
        "one two three four five six",
    )
    assert texts == [
        "<think>\none two</think>\n\n three four",
        "\n\n<think>\none two</think>\n\n three four",
        "one <think> two three four",
        "<think>\none</think>two three four",
        "one two three four five six",
    ]
    assert [len(row) for row in forced] == [1, 1, 0, 0, 0]


def test_a_budget_of_nothing_closes_reasoning_at_once(thinker):
    texts, _ = scripted(
        thinker, 0, "<think>\none", "one", prompts=[[1], open_prompt(thinker, "Hi")]
    )
    assert texts == ["<think></think>\n\n\none", "</think>\n\none"]


def test_reasoning_that_closes_by_itself_in_time_is_left_alone(thinker):
    prompts = [open_prompt(thinker, "Hi")]
    texts, forced = scripted(thinker, 3, "one two</think>a b c d e f", prompts=prompts)
    assert texts == ["one two</think>a b c d e f"]
    assert forced == [[]]
    closed = thinker.apply_chat_template(CHAT, add_generation_prompt=True, enable_thinking=False)
    assert scripted(thinker, 1, "a b c d", prompts=[closed])[1] == [[]]


def test_a_forced_end_counts_for_penalties(narrow, thinker):
    """The same ids as a stream whose penalties saw the closing tag among its own tokens."""
    prompts = [open_prompt(thinker, "Hi")]
    found = budgeted(narrow, thinker, prompts, 4, presence_penalty=3.0)[0].ids
    stream = TokenStream(*narrow, prompts, 24, SamplingOptions(presence_penalty=3.0), [], 1)
    stream.force(0, found[:6])
    assert [token for (token,) in stream] == found


def test_a_budget_is_refused_where_it_has_no_meaning(thinker, tokenizer):
    with pytest.raises(UserError, match="thinking_budget = -1 should be at least 0"):
        ThinkingBudget(-1, thinker, [[1]])
    with pytest.raises(UserError, match="thinking_budget: the tokenizer has no token <think>"):
        ThinkingBudget(5, tokenizer, [[1]])
