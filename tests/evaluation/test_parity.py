"""`compare_with_reference` on every head: what it compares, and that it sees a difference."""

import dataclasses

import jax
import numpy as np
import pytest
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from qwen_jax.config import HeadKind
from qwen_jax.errors import UserError
from qwen_jax.evaluation import parity
from qwen_jax.evaluation.parity import compare_with_reference
from tests.models.test_heads import write_embedder
from tests.reference import random_reference, save_reference
from tests.reward_models import random_reward_model, save_reward_model

TOLERANCE = 1e-4
PAD = 7
SMALL = {"num_hidden_layers": 1}
LAYERS = ["embeddings", "final norm"]
# Two rows that end with the token that pads elsewhere.
IDS = np.random.default_rng(0).integers(PAD + 1, 320, (2, 9))
IDS[:, -1] = PAD
EXPECTED = {
    "embedder": (None, None),
    "embedder with a language model's name": (None, None),
    "classifier": ("scores", None),
    "classifier of a mixture": ("scores", None),
    "tagger": ("scores", None),
    "reward": (None, HeadKind.TWO_LAYER_SCORE),
    "process": (None, HeadKind.TWO_LAYER_SCORE),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    labelled = {"num_labels": 3, "pad_token_id": PAD, **SMALL}
    embedder = random_reference("qwen3", 41, AutoModel, **SMALL)
    save_reference(embedder, root / "embedder")
    spelling = ("embedder with a language model's name", "", "Qwen3ForCausalLM")
    write_embedder(embedder, root / spelling[0], *spelling[1:])
    sequence, token = AutoModelForSequenceClassification, AutoModelForTokenClassification
    for name, family, auto_class in (
        ("classifier", "qwen2", sequence),
        ("classifier of a mixture", "qwen2_moe", sequence),
        ("tagger", "qwen3", token),
    ):
        save_reference(random_reference(family, 42, auto_class, **labelled), root / name)
    for name, labels in (("reward", 1), ("process", 2)):
        save_reward_model(random_reward_model(labels, 43, **SMALL), root / name)
    return root


@pytest.mark.parametrize("name", EXPECTED)
def test_what_transformers_has_of_a_head_is_compared(models, name):
    output, uncompared = EXPECTED[name]
    found = compare_with_reference(models / name, IDS)
    names = [row.name for row in found.differences]
    assert names == [*LAYERS, *([] if output is None else [output])]
    assert found.worst.relative < TOLERANCE
    assert (found.top1_agreement, found.uncompared_head) == (None, uncompared)


@pytest.fixture
def change_ours(monkeypatch):
    """Has this package load the model and parameters that a function makes of the right ones."""
    load = parity.load_pretrained

    def use(change):
        monkeypatch.setattr(
            parity, "load_pretrained", lambda *args, **options: change(*load(*args, **options))
        )

    return use


@pytest.mark.parametrize("name", ["classifier", "tagger"])
def test_a_head_that_differs_is_seen(models, change_ours, name):
    def double(model, params):
        return model, {**params, "score": jax.tree.map(lambda x: 2 * x, params["score"])}

    change_ours(double)
    found = compare_with_reference(models / name, IDS)
    assert [row.name for row in found.differences if row.relative > TOLERANCE] == ["scores"]


@pytest.mark.parametrize("name", ["embedder", "reward"])
def test_a_backbone_that_differs_is_seen(models, change_ours, name):
    def double(model, params):
        return model, {**params, "norm": jax.tree.map(lambda x: 2 * x, params["norm"])}

    change_ours(double)
    found = compare_with_reference(models / name, IDS)
    assert [row.name for row in found.differences if row.relative > TOLERANCE] == ["final norm"]


def test_shapes_that_differ_are_no_agreement(models, change_ours):
    def narrow(model, params):
        config = dataclasses.replace(model.config, num_labels=1)
        score = {"weight": params["score"]["weight"][:1]}
        return dataclasses.replace(model, config=config), {**params, "score": score}

    change_ours(narrow)
    with pytest.raises(UserError, match=r"^scores: shape \[2, 1\] here, \[2, 3\] in transformers"):
        compare_with_reference(models / "classifier", IDS)
