"""Sliding windows against the recipe of transformers' documentation, token by token."""

import math

import numpy as np
import pytest
import torch

import qwen_jax
from qwen_jax.errors import UserError
from qwen_jax.evaluation.perplexity import cut_windows, measure_perplexity, read_text_ids
from qwen_jax.inference.likelihood import token_likelihoods
from tests.reference import forget_lengths, random_reference, save_reference
from tests.tools.conftest import write_tokenizer

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    reference = random_reference("qwen3", 61, num_hidden_layers=2)
    directory = save_reference(reference, tmp_path_factory.mktemp("model"))
    write_tokenizer(directory)
    return reference, directory, *qwen_jax.load_pretrained(directory)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(6).integers(0, 320, 101)


def recipe(reference, ids, length, stride):
    """Log probabilities of the scored tokens, by place, as the documentation's loop has them."""
    found, done = {}, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        window = torch.as_tensor(ids[begin:end])[None]
        labels = window.clone()
        labels[:, : -(end - done)] = -100
        forget_lengths(reference)
        with torch.no_grad():
            logits = reference(window).logits[0, :-1]
        for place, label in enumerate(labels[0, 1:].tolist(), begin + 1):
            if label != -100:
                assert place not in found
                found[place] = logits[place - begin - 1].log_softmax(-1)[label].item()
        done = end
        if end == len(ids):
            break
    return found


@pytest.mark.parametrize(
    ("length", "stride"),
    [(40, 13), (40, 40), (40, 1), (25, 19), (101, 50), (300, 7)],
    ids=["ragged", "no overlap", "every token", "short", "one window", "longer than the text"],
)
def test_the_sum_is_that_of_the_documented_recipe(models, ids, length, stride):
    reference, _, model, params = models
    if stride == 1:
        ids = ids[:60]
    expected = recipe(reference, ids, length, stride)
    found = measure_perplexity(model, params, ids, length, stride, batch_size=4)
    assert found.num_scored == len(expected)
    assert found.num_tokens == len(ids)
    assert abs(found.nats - -sum(expected.values())) < TOLERANCE * len(expected) ** 0.5
    assert found.perplexity == pytest.approx(math.exp(found.nats / len(expected)))


@pytest.mark.parametrize("num_tokens", [2, 3, 9, 10, 11, 19, 20, 21, 57])
@pytest.mark.parametrize("stride", range(1, 11))
def test_each_token_is_scored_once_with_enough_before_it(num_tokens, stride):
    length = 10
    windows = cut_windows(num_tokens, length, stride)
    scored = [place for window in windows for place in range(window.start, window.end)]
    unscored = set(range(num_tokens)) - set(scored)
    assert scored == sorted(set(scored))
    # What begins a text, or a window that overlaps with none, has nothing before it.
    assert unscored == (set(range(0, num_tokens, length)) if stride == length else {0})
    for window in windows[1:]:
        assert window.start - window.begin >= max(1, length - stride)
    assert all(window.end - window.begin <= length for window in windows)


def test_a_token_s_likelihood_does_not_depend_on_its_neighbours(models, ids):
    reference, _, model, params = models
    texts = [ids[:n] for n in (2, 40, 17, 33)] + [ids[50:80]]
    starts = [1, 30, 1, 32, 5]
    found = token_likelihoods(model, params, texts, starts, batch_size=3)
    for text, start, row in zip(texts, starts, found, strict=True):
        with torch.no_grad():
            logits = reference(torch.as_tensor(text)[None]).logits[0, start - 1 : -1]
        targets = torch.as_tensor(text[start:])
        expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        np.testing.assert_allclose(row.log_probs, expected, rtol=0, atol=TOLERANCE)
        assert row.greedy.tolist() == (logits.argmax(-1) == targets).tolist()


def test_the_likeliest_token_is_known_as_such(models, ids):
    _, _, model, params = models
    (new,) = qwen_jax.generate(model, params, [ids[:20]], max_new_tokens=8, stop_ids=())
    text = [*ids[:20], *new[:4], (new[4] + 1) % 320, *new[5:]]
    (found,) = token_likelihoods(model, params, [text], [20])
    assert found.greedy[:5].tolist() == [True] * 4 + [False]


def test_on_a_mesh_the_same_numbers(models, ids):
    _, directory, model, params = models
    expected = measure_perplexity(model, params, ids, 40, 13, batch_size=3)
    split, shards = qwen_jax.load_pretrained(directory, mesh="fsdp:2,tensor:2")
    found = measure_perplexity(split, shards, ids, 40, 13, batch_size=3)
    assert found.num_scored == expected.num_scored
    assert abs(found.nats - expected.nats) < TOLERANCE * len(ids) ** 0.5


def test_bytes_are_those_of_what_is_scored(models, tmp_path):
    _, directory, model, params = models
    tokenizer = qwen_jax.load_tokenizer(directory)
    text = "the sea\r\nthe 海<|im_end|>"
    (tmp_path / "text").write_bytes(text.encode())
    ids = read_text_ids(tmp_path / "text", tokenizer)
    assert tokenizer.decode(ids) == text
    assert tokenizer.added_tokens["<|im_end|>"] not in ids
    found = measure_perplexity(model, params, ids, 20, 10, tokenizer=tokenizer)
    first = tokenizer.decode(ids[0])
    assert found.num_bytes == len(text.encode()) - len(first.encode())
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.num_bytes)
    special = read_text_ids(tmp_path / "text", tokenizer, allow_special=True)
    assert special[-1] == tokenizer.added_tokens["<|im_end|>"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 4, 5), "stride = 5 is more than length = 4, which leaves tokens out; give"),
        ((9, 4, 0), "stride = 0 should be an integer, at least 1"),
        ((9, 1, 1), "length = 1 should be an integer, at least 2"),
        ((1, 4, 2), "the text has 1 token; nothing is predicted in fewer than 2"),
    ],
)
def test_windows_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(UserError, match=f"^{message}"):
        cut_windows(*arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"ab\xff", r"is not UTF-8 text \(byte 2\)"), (b"", "holds 0 tokens"), (None, "cannot be")],
)
def test_a_file_that_is_no_text_is_named(models, tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: {message}"):
        read_text_ids(path, qwen_jax.load_tokenizer(models[1]))
