"""Dual Chunk Attention in the decoder, from config.json on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import qwen_jax
from qwen_jax.config import DualChunkSpec
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import init_cache
from tests.reference import random_reference, reference_logits, save_reference

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def plain(request, tmp_path_factory):
    reference = random_reference(request.param, num_hidden_layers=2)
    directory = save_reference(reference, tmp_path_factory.mktemp("plain"))
    return reference, directory, *qwen_jax.load_pretrained(directory)


def with_chunks(model, *sizes):
    return Decoder(dataclasses.replace(model.config, dual_chunk=DualChunkSpec(*sizes)))


def random_ids(model, shape):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, shape)


def test_inside_a_chunk_the_reference_s_plain_attention(plain):
    reference, _, model, params = plain
    ids = random_ids(model, (2, 40))
    out = with_chunks(model, 50, 10, 64).apply({"params": params}, ids)
    expected = reference_logits(reference, ids)
    np.testing.assert_allclose(out.logits, expected, rtol=0, atol=TOLERANCE)


def test_beyond_a_chunk_the_first_chunk_is_the_reference_s_and_the_rest_is_not(plain):
    reference, _, model, params = plain
    ids = random_ids(model, (2, 60))
    out = np.asarray(with_chunks(model, 24, 4).apply({"params": params}, ids).logits)
    expected = reference_logits(reference, ids)
    np.testing.assert_allclose(out[:, :20], expected[:, :20], rtol=0, atol=TOLERANCE)
    # Neighbours across the edge of a chunk keep their distance, up to local_size; others do not.
    assert np.abs(out[:, 30:] - expected[:, 30:]).max() > 0.1


@pytest.mark.parametrize("sizes", [(24, 4, 0), (12, 0, 0), (30, 10, 0)])
def test_cached_decode_equals_one_full_pass(plain, sizes):
    _, _, model, params = plain
    model = with_chunks(model, *sizes)
    ids = random_ids(model, (2, 60))
    full = model.apply({"params": params}, ids).logits
    cache = init_cache(model.config, 2, 64, np.float32)
    apply = jax.jit(model.apply)
    begin = 0
    for end in (17, 41, *range(42, 61)):
        out = apply({"params": params}, ids[:, begin:end], cache=cache)
        np.testing.assert_allclose(out.logits, full[:, begin:end], rtol=0, atol=TOLERANCE)
        cache, begin = out.cache, end


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_each_row_alone(plain, side):
    """Past the trained length the scale of each row follows its own length."""
    _, _, model, params = plain
    model = with_chunks(model, 24, 4, 16)
    lengths = [40, 27]
    rows = [random_ids(model, (1, 40))[:, :n] for n in lengths]
    ids, mask = np.zeros((2, 40), int), np.zeros((2, 40), int)
    for row, text in enumerate(rows):
        place = slice(40 - text.shape[1], None) if side == "left" else slice(text.shape[1])
        ids[row, place], mask[row, place] = text[0], 1
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    out = model.apply({"params": params}, ids, mask, positions)
    cache = init_cache(model.config, 2, 48, np.float32)
    cached = model.apply({"params": params}, ids, mask, positions, cache)
    for row, text in enumerate(rows):
        alone = model.apply({"params": params}, text).logits[0]
        for logits in (out.logits, cached.logits):
            kept = logits[row][mask[row].astype(bool)]
            np.testing.assert_allclose(kept, alone, rtol=0, atol=TOLERANCE)


def test_longer_texts_sharpen_the_scores(plain):
    _, _, model, params = plain
    ids = random_ids(model, (1, 40))
    logits = [
        np.asarray(with_chunks(model, 24, 4, trained).apply({"params": params}, ids).logits)
        for trained in (0, 40, 39, 10)
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert 0 < np.abs(logits[2] - logits[0]).max() < np.abs(logits[3] - logits[0]).max()


def test_config_json_says_it_and_sparse_prefill_is_dense_with_a_notice(plain, tmp_path):
    _, directory, model, params = plain
    raw = json.loads((directory / "config.json").read_text())
    raw["dual_chunk_attention_config"] = {
        "chunk_size": 24,
        "local_size": 4,
        "original_max_position_embeddings": 32,
        "sparse_attention_enabled": True,
        "sparse_attention_threshold": 16,
        "sparse_attention_last_q": 8,
        "sparse_attention_config": [{"0": ["vertical_and_slash", 30, 800, 0.9]}],
    }
    target = tmp_path / "model"
    target.mkdir()
    (target / "model.safetensors").symlink_to(directory / "model.safetensors")
    (target / "config.json").write_text(json.dumps(raw))
    with pytest.warns(UserWarning, match="sparse_attention_enabled.*attention is exact here"):
        loaded, loaded_params = qwen_jax.load_pretrained(target)
    assert loaded.config.dual_chunk == DualChunkSpec(24, 4, 32)
    ids = random_ids(model, (1, 50))
    expected = with_chunks(model, 24, 4, 32).apply({"params": params}, ids).logits
    np.testing.assert_array_equal(loaded.apply({"params": loaded_params}, ids).logits, expected)
    qwen_jax.save_pretrained(tmp_path / "again", loaded.config, loaded_params)
    assert qwen_jax.load_pretrained(tmp_path / "again")[0].config == loaded.config
