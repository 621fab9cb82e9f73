"""Vectors and scores of texts against the published recipes in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import qwen_jax
from qwen_jax.inference import scoring
from tests.reference import forget_lengths, random_reference, save_reference
from tests.reward_models import random_reward_model, save_reward_model

TOLERANCE = 1e-4
PAD = 7
NO, YES, STEP = 31, 32, 33


@pytest.fixture(scope="module")
def texts():
    """Texts of mixed lengths, in no order, without the padding token."""
    rng = np.random.default_rng(4)
    return [rng.integers(PAD + 1, 320, n).tolist() for n in (9, 33, 1, 17, 16, 40, 2)]


def padded(texts, side):
    longest = max(map(len, texts))
    ids, mask = np.full((len(texts), longest), PAD), np.zeros((len(texts), longest), int)
    for row, text in enumerate(texts):
        columns = slice(longest - len(text), None) if side == "left" else slice(len(text))
        ids[row, columns], mask[row, columns] = text, 1
    return torch.as_tensor(ids), torch.as_tensor(mask)


def load(reference, directory):
    return qwen_jax.load_pretrained(save_reference(reference, directory))


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def embedder(request, tmp_path_factory):
    reference = random_reference(request.param, 21, AutoModel)
    return reference, *load(reference, tmp_path_factory.mktemp("model"))


def pooled(reference, texts):
    """The published recipe: padded on the left, the last place of the last hidden states."""
    ids, mask = padded(texts, "left")
    with torch.no_grad():
        return reference(ids, attention_mask=mask).last_hidden_state[:, -1]


@pytest.mark.parametrize("dimensions", [None, 24, 64])
def test_vectors_are_the_last_token_normalised(embedder, texts, dimensions):
    reference, model, params = embedder
    vectors = scoring.embed(model, params, texts, dimensions, batch_size=3)
    assert (vectors.dtype, vectors.shape) == (np.float32, (len(texts), dimensions or 64))
    cut = pooled(reference, texts)[:, :dimensions]
    expected = torch.nn.functional.normalize(cut, p=2, dim=1)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


DYNAMIC = {
    "rope_scaling": {"rope_type": "dynamic", "factor": 2.5},
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(("family", "fields"), [("qwen3", DYNAMIC), ("qwen2_moe", {})])
def test_neighbours_do_not_change_a_vector(family, fields, texts, tmp_path):
    reference = random_reference(family, 22, AutoModel, **fields)
    model, params = load(reference, tmp_path / "model")
    together = scoring.embed(model, params, texts)
    for text, vector in zip(texts, together, strict=True):
        forget_lengths(reference)
        with torch.no_grad():
            alone = reference(torch.as_tensor([text])).last_hidden_state[:, -1]
        expected = torch.nn.functional.normalize(alone, dim=1)
        np.testing.assert_allclose(vector, expected[0], rtol=0, atol=TOLERANCE)


def test_the_head_is_read_at_the_last_token_of_each_text(texts, tmp_path):
    reference = random_reference(
        "qwen2", 23, AutoModelForSequenceClassification, num_labels=3, pad_token_id=PAD
    )
    model, params = load(reference, tmp_path / "model")
    scores = scoring.head_scores(model, params, texts, batch_size=4)
    ids, mask = padded(texts, "right")
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask).logits
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)
    of_tokens = scoring.token_scores(model, params, texts, batch_size=2)
    assert [len(row) for row in of_tokens] == list(map(len, texts))
    last = np.stack([row[-1] for row in of_tokens])
    np.testing.assert_allclose(last, expected, rtol=0, atol=TOLERANCE)


def test_reranking_is_the_softmax_of_yes_and_no(texts, tmp_path):
    reference = random_reference("qwen3", 24, tie_word_embeddings=True)
    model, params = load(reference, tmp_path / "model")
    scores = scoring.rerank_scores(model, params, texts, NO, YES, batch_size=3)
    ids, mask = padded(texts, "left")
    with torch.no_grad():
        last = reference(ids, attention_mask=mask).logits[:, -1]
    both = torch.stack([last[:, NO], last[:, YES]], dim=1)
    expected = torch.nn.functional.log_softmax(both, dim=1)[:, 1].exp()
    assert scores.shape == (len(texts),)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)
    assert np.ptp(scores) > 0.1


def test_steps_are_scored_where_they_end(tmp_path):
    rng = np.random.default_rng(5)
    texts = [rng.integers(40, 320, n).tolist() for n in (30, 12, 19)]
    ends = [[4, 11, 29], [5], []]
    for text, places in zip(texts, ends, strict=True):
        for place in places:
            text[place] = STEP
    reference = random_reward_model(2, 25)
    model, params = qwen_jax.load_pretrained(save_reward_model(reference, tmp_path / "model"))
    rewards = scoring.step_rewards(model, params, texts, STEP, batch_size=2)
    assert [len(row) for row in rewards] == list(map(len, ends))
    for text, row, places in zip(texts, rewards, ends, strict=True):
        with torch.no_grad():
            probabilities = reference(torch.as_tensor([text]))[0].softmax(dim=-1)
        np.testing.assert_allclose(row, probabilities[places, 1], rtol=0, atol=TOLERANCE)


def test_a_reward_is_the_one_label_of_the_last_token(texts, tmp_path):
    reference = random_reward_model(1, 26)
    model, params = qwen_jax.load_pretrained(save_reward_model(reference, tmp_path / "model"))
    rewards = scoring.head_scores(model, params, texts)
    for text, reward in zip(texts, rewards, strict=True):
        with torch.no_grad():
            expected = reference(torch.as_tensor([text]))[0, -1]
        np.testing.assert_allclose(reward, expected, rtol=0, atol=TOLERANCE)


def test_no_texts_have_no_vectors(embedder):
    _, model, params = embedder
    assert scoring.embed(model, params, []).shape == (0, 64)
    assert scoring.embed(model, params, [], 5).shape == (0, 5)


def test_in_half_precision_vectors_are_unit_float32(texts, tmp_path):
    reference = random_reference("qwen3", 27, AutoModel)
    save_reference(reference, tmp_path / "model")
    model, params = qwen_jax.load_pretrained(tmp_path / "model", "bfloat16")
    vectors = scoring.embed(model, params, texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    expected = torch.nn.functional.normalize(pooled(reference, texts), dim=1)
    # The angle that 8 bits of mantissa leave.
    assert ((vectors * expected.numpy()).sum(axis=1) > 0.999).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: scoring.embed(m, p, [[1], []]), r"texts\[1\] is empty"),
        (lambda m, p: scoring.embed(m, p, [[320]]), r"texts\[0\]: token id 320 is outside"),
        (lambda m, p: scoring.embed(m, p, ["words"]), r"texts\[0\] should be a list of token ids"),
        (lambda m, p: scoring.embed(m, p, [[1]], 65), "dimensions = 65 .* from 1 to 64"),
        (lambda m, p: scoring.embed(m, p, [[1]], 0), "dimensions = 0 .* from 1 to 64"),
        (lambda m, p: scoring.embed(m, p, [[1]], 2.5), "dimensions = 2.5 should be an integer"),
        (lambda m, p: scoring.embed(m, p, [], True), "dimensions = True should be an integer"),
        (lambda m, p: scoring.embed(m, p, [[1]], batch_size=0), "batch_size = 0 .* at least 1"),
        (lambda m, p: scoring.embed(m, p, [], batch_size=1.5), "batch_size = 1.5 should be an int"),
        (lambda m, p: scoring.head_scores(m, p, [[1]]), "an embedder .* has no such labels"),
        (lambda m, p: scoring.token_scores(m, p, [[1]]), "an embedder .* has no such labels"),
        (lambda m, p: scoring.step_rewards(m, p, [[1]], 3), "an embedder .* has no such label"),
        (lambda m, p: scoring.rerank_scores(m, p, [[1]], 1, 2), "an embedder .*; take a reranker"),
        (lambda m, p: qwen_jax.generate(m, p, [[1]]), "writes no text; tools.embed makes"),
    ],
    ids=["empty", "outside", "words", "too many", "too few", "half", "boolean", "no batch",
         "half batch", "no head", "no token head", "no steps", "no vocabulary", "generate"],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(embedder, call, message):
    _, model, params = embedder
    with pytest.raises(qwen_jax.UserError, match=message) as caught:
        call(model, params)
    assert "\n" not in str(caught.value)


def test_an_answer_outside_the_vocabulary_is_refused(tmp_path):
    model, params = load(random_reference("qwen3", 24), tmp_path / "model")
    with pytest.raises(qwen_jax.UserError, match="no_id and yes_id: token id 320"):
        scoring.rerank_scores(model, params, [[1]], 1, 320)


def test_steps_need_two_labels(texts, tmp_path):
    reference = random_reward_model(1, 28)
    model, params = qwen_jax.load_pretrained(save_reward_model(reference, tmp_path / "model"))
    with pytest.raises(qwen_jax.UserError, match="has 1 label, where step rewards are of two"):
        scoring.step_rewards(model, params, texts, STEP)


def test_scores_that_are_not_numbers_are_refused(embedder, texts):
    _, model, params = embedder
    broken = {**params, "norm": {"weight": params["norm"]["weight"].at[3].set(np.nan)}}
    with pytest.raises(scoring.NonfiniteScoresError) as caught:
        scoring.embed(model, broken, texts)
    message = f"texts[{caught.value.index}]: its scores are NaN or infinite in float32; download "
    assert str(caught.value) == message + "the checkpoint again"


def test_in_half_precision_a_wider_dtype_may_help(embedder, texts):
    _, model, params = embedder
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    half["norm"]["weight"] = half["norm"]["weight"].at[3].set(np.inf)
    with pytest.raises(scoring.NonfiniteScoresError, match=r"in bfloat16; .*, or load it as fl"):
        scoring.embed(model, half, texts[:1])
