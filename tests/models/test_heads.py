"""Scoring heads and bare models against transformers and PyTorch, live, and back into them."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen3_5PreTrainedModel,
    Qwen3_5TextConfig,
)
from transformers.modeling_layers import GenericForTokenClassification

import qwen_jax
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.config import HeadKind
from qwen_jax.hf_config import load_config, read_hf_config, write_hf_config
from tests.models.passes import check_cached_pieces
from tests.reference import forget_lengths, quiet, random_reference, save_reference
from tests.renderings.guard import LEVELS, random_guard, save_guard
from tests.reward_models import ARCHITECTURES, random_reward_model, save_reward_model

TOLERANCE = 1e-4
PAD = 7
FAMILIES = ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen3_next"]
SEQUENCE, TOKEN = AutoModelForSequenceClassification, AutoModelForTokenClassification


def padded_ids(side):
    """Three texts of 21, 13 and 2 tokens, none of them the padding one."""
    rng = np.random.default_rng(3)
    ids, mask = np.full((3, 21), PAD), np.zeros((3, 21), int)
    for row, length in enumerate((21, 13, 2)):
        columns = slice(21 - length, None) if side == "left" else slice(length)
        ids[row, columns] = rng.integers(PAD + 1, 320, length)
        mask[row, columns] = 1
    return ids, mask


def run(reference, ids, mask):
    forget_lengths(reference)
    with torch.no_grad():
        return reference(torch.as_tensor(ids), attention_mask=torch.as_tensor(mask))


def check_exported(config, params, directory, model_class, theirs):
    """transformers reads what we write as what it wrote, bit for bit and tensor for tensor."""
    qwen_jax.save_pretrained(directory, config, params)
    with quiet():
        loaded, info = model_class.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    ours = loaded.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    if config.head is not HeadKind.VOCABULARY:
        # A language model with tied embeddings has a bare model's tensors, and its own name.
        written = json.loads((directory / "config.json").read_text())
        assert written["architectures"] == [type(loaded).__name__]


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen3_5_text"])
def sequence(request, tmp_path_factory):
    reference = random_reference(request.param, 11, SEQUENCE, num_labels=3, pad_token_id=PAD)
    directory = save_reference(reference, tmp_path_factory.mktemp("model"))
    return reference, directory, *qwen_jax.load_pretrained(directory)


@pytest.fixture(scope="module", params=FAMILIES)
def token(request, tmp_path_factory):
    reference = random_reference(request.param, 12, TOKEN, num_labels=5)
    directory = save_reference(reference, tmp_path_factory.mktemp("model"))
    return reference, directory, *qwen_jax.load_pretrained(directory)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_sequence_classifier_reads_the_last_real_token(sequence, side):
    reference, _, model, params = sequence
    assert (model.config.head, model.config.num_labels) == (HeadKind.SCORE, 3)
    ids, mask = padded_ids(side)
    scores = model.apply({"params": params}, ids, mask, logits_at="last").logits
    assert scores.dtype == np.float32
    expected = run(reference, ids, mask).logits
    np.testing.assert_allclose(scores[:, 0], expected, rtol=0, atol=TOLERANCE)


def test_a_token_classifier_reads_every_token(token):
    reference, _, model, params = token
    assert (model.config.head, model.config.num_labels) == (HeadKind.SCORE_WITH_BIAS, 5)
    assert np.asarray(params["score"]["bias"]).all()
    ids, mask = padded_ids("right")
    scores = model.apply({"params": params}, ids, mask).logits
    real = mask.astype(bool)
    expected = run(reference, ids, mask).logits
    np.testing.assert_allclose(scores[real], expected[real], rtol=0, atol=TOLERANCE)


def test_a_sequence_classifier_is_written_as_transformers_reads_it(sequence, tmp_path):
    reference, _, model, params = sequence
    check_exported(model.config, params, tmp_path / "ours", SEQUENCE, reference.state_dict())


def test_a_token_classifier_is_written_as_transformers_reads_it(token, tmp_path):
    reference, _, model, params = token
    check_exported(model.config, params, tmp_path / "ours", TOKEN, reference.state_dict())


class Qwen3_5TextForTokenClassification(  # noqa: N801
    GenericForTokenClassification, Qwen3_5PreTrainedModel
):
    """What transformers does not have, named as it names that of sequences."""

    config: Qwen3_5TextConfig


@pytest.mark.parametrize(
    ("auto_class", "text_class", "logits_at"),
    [(SEQUENCE, SEQUENCE, "last"), (TOKEN, Qwen3_5TextForTokenClassification, "all")],
    ids=["sequence", "token"],
)
def test_a_classifier_that_sees_scores_its_texts(auto_class, text_class, logits_at, tmp_path):
    """Its labels are those of the whole model; its text tower is written as a classifier."""
    tower = random_reference("qwen3_5_text", 18, AutoModel, pad_token_id=PAD)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_position_embeddings"), 16)
    config = AutoConfig.for_model(
        "qwen3_5",
        text_config=tower.config.to_dict(),
        vision_config={"depth": 1, "num_heads": 2, "out_hidden_size": 64, **sizes},
        id2label={0: "bad", 1: "fair", 2: "good"},
    )
    reference = auto_class.from_config(config, dtype=torch.float32).eval()
    reference.model.language_model.load_state_dict(tower.state_dict())
    for parameter in reference.score.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model, params = qwen_jax.load_pretrained(save_reference(reference, tmp_path / "theirs"))
    assert model.config.num_labels == 3
    ids, mask = padded_ids("right")
    scores = model.apply({"params": params}, ids, mask, logits_at=logits_at).logits
    with torch.no_grad():
        expected = reference(torch.as_tensor(ids), attention_mask=torch.as_tensor(mask)).logits
    real = mask.astype(bool) if logits_at == "all" else np.ones((3, 1), bool)
    expected = expected.reshape(scores.shape)
    np.testing.assert_allclose(scores[real], expected[real], rtol=0, atol=TOLERANCE)
    tensors = {f"model.{name}": value for name, value in tower.state_dict().items()}
    tensors |= {f"score.{name}": value for name, value in reference.score.state_dict().items()}
    check_exported(model.config, params, tmp_path / "ours", text_class, tensors)
    assert load_config(tmp_path / "ours") == model.config
    convert(tmp_path / "theirs", tmp_path / "converted", "hf")
    written = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert written["id2label"] == {"0": "bad", "1": "fair", "2": "good"}


def test_converting_a_classifier_keeps_its_names_and_labels(sequence, tmp_path):
    reference, directory, *_ = sequence
    for step, form in (("orbax", "orbax"), ("back", "hf")):
        convert(directory, tmp_path / step, form)
        directory = tmp_path / step
    with quiet():
        loaded, info = SEQUENCE.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.id2label == reference.config.id2label
    ours, theirs = loaded.state_dict(), reference.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.fixture(scope="module", params=[1, 2], ids=["reward", "process reward"])
def reward(request, tmp_path_factory):
    reference = random_reward_model(request.param, 13)
    directory = save_reward_model(reference, tmp_path_factory.mktemp("model"))
    return reference, directory, *qwen_jax.load_pretrained(directory)


def test_the_two_layer_head_equals_linear_relu_linear(reward):
    reference, _, model, params = reward
    labels = reference.score[-1].out_features
    assert (model.config.head, model.config.num_labels) == (HeadKind.TWO_LAYER_SCORE, labels)
    ids, mask = padded_ids("right")
    with torch.no_grad():
        expected = reference(torch.as_tensor(ids), torch.as_tensor(mask))
    scores = model.apply({"params": params}, ids, mask).logits
    real = mask.astype(bool)
    np.testing.assert_allclose(scores[real], expected[real], rtol=0, atol=TOLERANCE)
    last = model.apply({"params": params}, ids, mask, logits_at="last").logits
    expected = [expected[row, length - 1] for row, length in enumerate((21, 13, 2))]
    np.testing.assert_allclose(last[:, 0], torch.stack(expected), rtol=0, atol=TOLERANCE)


def test_a_reward_model_is_written_under_the_published_names(reward, tmp_path):
    reference, _, model, params = reward
    qwen_jax.save_pretrained(tmp_path / "ours", model.config, params)
    written = safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors")
    original = reference.state_dict()
    assert written.keys() == original.keys()
    assert {"score.0.bias", "score.2.weight", "model.norm.weight"} < written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURES[model.config.num_labels]]
    assert load_config(tmp_path / "ours") == dataclasses.replace(model.config, dtype="float32")


def test_a_reward_model_may_come_with_the_head_of_its_language_model(reward, tmp_path):
    reference, _, _, params = reward
    published = tmp_path / "published"
    head = {"lm_head.weight": torch.randn(320, 64)}
    save_reward_model(reference, published, **head)
    _, with_head = qwen_jax.load_pretrained(published)
    assert with_head.keys() == params.keys()
    assert convert(published, tmp_path / "converted", "hf").num_left_out == 1
    written = safetensors.torch.load_file(tmp_path / "converted" / "model.safetensors")
    assert written.keys() == reference.state_dict().keys()


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    reference = random_guard(19)
    directory = save_guard(reference, tmp_path_factory.mktemp("model"))
    return reference, directory, *qwen_jax.load_pretrained(directory)


def test_a_guard_judges_every_token_as_its_formulas_say(guard):
    reference, _, model, params = guard
    assert model.config.guard.widths == (3, 8, 3, 9)
    ids, mask = padded_ids("right")
    with torch.no_grad():
        expected = reference(torch.as_tensor(ids), torch.as_tensor(mask))
    logits = model.apply({"params": params}, ids, mask).logits
    assert logits.dtype == np.float32
    real = mask.astype(bool)
    assert logits[real].std() > 0.5
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=TOLERANCE)


def test_a_guard_decodes_with_a_cache(guard):
    _, _, model, params = guard
    check_cached_pieces(model, params, [5, 1, 3], 6, range(3))


def test_a_guard_is_written_under_the_published_names(guard, tmp_path):
    reference, directory, model, params = guard
    qwen_jax.save_pretrained(tmp_path / "ours", model.config, params)
    convert(directory, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", "hf")
    original = reference.state_dict()
    for name in ("ours", "back"):
        written = safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        assert written.keys() == original.keys()
        assert all(torch.equal(original[name], written[name]) for name in original)
        assert load_config(tmp_path / name) == dataclasses.replace(model.config, dtype="float32")
    kept = json.loads((tmp_path / "back" / "config.json").read_text())
    assert kept["response_risk_level_map"] == LEVELS


def test_a_guard_without_its_sizes_is_refused(guard):
    raw = json.loads((guard[1] / "config.json").read_text())
    del raw["num_query_category"]
    with pytest.raises(qwen_jax.UserError, match="num_query_category is missing and needed"):
        read_hf_config(raw)


def test_a_classifier_with_a_head_of_a_language_model_is_refused(sequence, tmp_path):
    _, directory, *_ = sequence
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(320, 64)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(qwen_jax.UserError, match=r"unknown tensors.*lm_head\.weight"):
        qwen_jax.load_pretrained(tmp_path)


def write_embedder(reference, directory, prefix, architecture):
    """A bare model with its tensors' names and its architecture spelled as asked."""
    directory.mkdir()
    tensors = {prefix + name: value for name, value in reference.state_dict().items()}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {**reference.config.to_dict(), "architectures": [architecture]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("prefix", "architecture"),
    [("", "Qwen3ForCausalLM"), ("", "Qwen3Model"), ("model.", "Qwen3Model")],
    ids=["causal, bare names", "model, bare names", "model, prefixed names"],
)
def test_embedders_load_under_every_published_spelling(prefix, architecture, tied, tmp_path):
    reference = random_reference("qwen3", 14, AutoModel, tie_word_embeddings=tied)
    directory = write_embedder(reference, tmp_path / "model", prefix, architecture)
    model, params = qwen_jax.load_pretrained(directory)
    ids, mask = padded_ids("left")
    out = model.apply({"params": params}, ids, mask)
    has_head = tied and architecture == "Qwen3ForCausalLM"
    assert (out.logits is None) is not has_head
    expected = run(reference, ids, mask).last_hidden_state
    real = mask.astype(bool)
    np.testing.assert_allclose(out.hidden_states[-1][real], expected[real], atol=TOLERANCE, rtol=0)
    check_exported(model.config, params, tmp_path / "ours", AutoModel, reference.state_dict())
    convert(directory, tmp_path / "converted", "hf")
    again, params_again = qwen_jax.load_pretrained(tmp_path / "converted")
    assert again == model
    assert np.array_equal(params["norm"]["weight"], params_again["norm"]["weight"])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_5_text"])
def test_a_bare_model_as_transformers_saves_it(family, tmp_path):
    reference = random_reference(family, 15, AutoModel)
    model, params = qwen_jax.load_pretrained(save_reference(reference, tmp_path / "theirs"))
    assert model.config.head is HeadKind.NONE
    check_exported(model.config, params, tmp_path / "ours", AutoModel, reference.state_dict())


def test_a_language_model_with_bare_names_keeps_its_head(tmp_path):
    reference = random_reference("qwen3", 16)
    directory = save_reference(reference, tmp_path / "model")
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    safetensors.torch.save_file(bare, directory / "model.safetensors", {"format": "pt"})
    model, params = qwen_jax.load_pretrained(directory)
    ids, mask = padded_ids("right")
    logits = model.apply({"params": params}, ids, mask).logits
    real = mask.astype(bool)
    expected = run(reference, ids, mask).logits
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=TOLERANCE)
    check_exported(
        model.config, params, tmp_path / "ours", AutoModelForCausalLM, reference.state_dict()
    )


@pytest.fixture
def raw():
    return random_reference("qwen2", 17).config.to_dict()


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"architectures": ["Qwen2ForSequenceClassification"]}, 2),
        ({"architectures": ["Qwen2ForSequenceClassification"],
          "id2label": {"0": "no", "1": "maybe", "2": "yes"}}, 3),
        ({"architectures": ["Qwen2ForTokenClassification"], "num_labels": 4}, 4),
        ({"architectures": ["Qwen2ForRewardModel"], "id2label": {"0": "a", "1": "b"}}, 1),
        ({"architectures": ["Qwen2ForProcessRewardModel"], "num_labels": 1}, 2),
    ],
    ids=["default", "id2label", "num_labels", "reward", "process reward"],
)  # fmt: skip
def test_config_json_tells_the_number_of_labels(raw, fields, labels):
    for name in ("id2label", "label2id", "num_labels"):
        raw.pop(name, None)
    config = read_hf_config({**raw, **fields})
    assert config.num_labels == labels
    assert read_hf_config(write_hf_config(config)) == config


@pytest.mark.parametrize("name", ["Qwen2ForQuestionAnswering", "Qwen2TextModel"])
def test_heads_that_are_not_known_are_refused_by_name(raw, name):
    with pytest.raises(qwen_jax.UserError, match=rf"{name}.*known: Qwen2For"):
        read_hf_config({**raw, "architectures": [name]})


def test_a_head_that_no_architecture_has_cannot_be_written(raw):
    config = read_hf_config({**raw, "architectures": ["Qwen2ForRewardModel"]})
    with pytest.raises(qwen_jax.UserError, match="3 labels of a two_layer_score head"):
        write_hf_config(dataclasses.replace(config, num_labels=3))
