"""Small models: their regime, what they are trained on, and that training learns and goes on."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from experiments.initial import draw_params
from experiments.long_context.frequencies import scalings
from experiments.long_context.small_model import (
    SmallModel,
    TrainingTexts,
    curriculum,
    fine_tune,
    recall,
    same_regime_base,
    same_regime_beta_fast,
    train_from_scratch,
    training_text,
)
from experiments.long_context.tokens import Language, TokenRenderer
from qwen_jax.models.decoder import Decoder

LANGUAGE = Language()
TINY = SmallModel(trained=64, head_dim=16, layers=1, steps=18)


@pytest.mark.parametrize("trained", (128, 256))
@pytest.mark.parametrize("head_dim", (32, 64))
def test_as_many_pairs_turn_as_in_qwen3(trained, head_dim):
    """Of Qwen3's 64 pairs, with its base 1e6 and 32,768 tokens, 24 never turn once: 37.5%."""
    model = SmallModel(trained, head_dim=head_dim)
    (found,) = scalings(model.config(LANGUAGE), ["none"], trained, trained)
    pairs = head_dim // 2
    assert (pairs - found.turning) / pairs == 0.375


def test_the_regime_s_formulas_give_back_qwen3():
    assert same_regime_base(32_768) == pytest.approx(1e6)
    assert same_regime_beta_fast(32_768, 1e6) == pytest.approx(32)
    # As the reference's notes have them for 128 tokens.
    assert same_regime_base(128) == pytest.approx(128, rel=0.02)
    assert same_regime_beta_fast(128, same_regime_base(128)) == pytest.approx(3.4, rel=0.01)


def test_lengths_grow_and_fill_the_steps():
    lengths = curriculum(SmallModel())
    assert lengths == (32,) * 400 + (64,) * 100 + (128,) * 400


def test_matrices_are_drawn_by_their_inputs_and_each_by_itself():
    config = SmallModel(layers=2).config(LANGUAGE)
    params = draw_params(config, jax.random.key(0))
    q = [params[f"layers_{i}"]["self_attn"]["q_proj"]["weight"] for i in range(2)]
    assert np.std(q[0]) == pytest.approx(1 / 8, rel=0.05) and abs(np.corrcoef(
        q[0].ravel(), q[1].ravel())[0, 1]) < 0.05  # fmt: skip
    down = params["layers_0"]["mlp"]["down_proj"]["weight"]
    assert np.std(down) == pytest.approx(0.7 / math.sqrt(128), rel=0.05)
    assert (params["norm"]["weight"] == 1).all()


@pytest.mark.parametrize("kind", ("recall", "pass_key", "plain", "copy"))
@pytest.mark.parametrize("length", (32, 128))
def test_training_texts_weigh_what_can_be_predicted(kind, length):
    rng = np.random.default_rng(3)
    for _ in range(20):
        example = training_text(TokenRenderer(LANGUAGE), LANGUAGE, kind, length, rng)
        ids = example.ids
        assert len(ids) == length
        answers = [i for begin, end in example.answers for i in range(begin, end)]
        drawn = [i for begin, end in example.drawn for i in range(begin, end)]
        assert not set(answers) & set(drawn)
        others = set(range(1, length)) - set(answers) - set(drawn)
        assert all(ids[i] < LANGUAGE.first_key for i in others)
        if kind == "copy":
            ((begin, end),) = example.answers
            size = end - begin + 1
            first = example.drawn[0][0]
            assert ids[begin - 1 : end] == ids[first : first + size] and first + size < begin


def test_batches_are_of_their_number_and_seed():
    texts = TrainingTexts(LANGUAGE, 5, (16, 32), 128)
    batch, longer = texts[0], texts[1]
    assert batch["input_ids"].shape == (8, 16) and longer["input_ids"].shape == (4, 32)
    assert len(texts) == 2
    again = TrainingTexts(LANGUAGE, 5, (16, 32), 128)[0]
    np.testing.assert_array_equal(batch["loss_weights"], again["loss_weights"])
    other = dataclasses.replace(texts, seed=6)[0]
    assert (other["input_ids"] != batch["input_ids"]).any()
    assert set(np.unique(batch["loss_weights"])) <= {np.float32(0.1), 1.0, 5.0}


def test_training_goes_on_where_it_was(tmp_path):
    """In two parts as in one."""
    whole = train_from_scratch(TINY, LANGUAGE, 1, tmp_path / "whole")
    train_from_scratch(TINY, LANGUAGE, 1, tmp_path / "parts", 8)
    parts = train_from_scratch(TINY, LANGUAGE, 1, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    again = train_from_scratch(TINY, LANGUAGE, 1, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_fine_tuning_is_measured_on_its_way(tmp_path):
    decoder = Decoder(TINY.config(LANGUAGE))
    params = draw_params(decoder.config, jax.random.key(0))
    seen = []

    def measure(params):
        seen.append(params["norm"]["weight"])
        return {"eval_recall": recall(decoder, params, LANGUAGE, 32, 2, 0)}

    texts = TrainingTexts(LANGUAGE, 0, (64,) * 4, 256)
    tuned = fine_tune(decoder, params, texts, tmp_path, measure, 2)
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[-1], tuned["norm"]["weight"])
    assert (tuned["norm"]["weight"] != params["norm"]["weight"]).any()
