"""Dual Chunk Attention in the decoder, from config.json on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import qwen_jax
from qwen_jax.checkpoint.conversion import convert
from qwen_jax.config import DualChunkSpec
from qwen_jax.hf_config import load_config
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import init_cache
from tests.reference import random_reference, reference_logits, save_reference
from tests.renderings.dual_chunk import DualChunkModel

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def plain(request, tmp_path_factory):
    reference = random_reference(request.param, num_hidden_layers=2)
    directory = save_reference(reference, tmp_path_factory.mktemp("plain"))
    return reference, directory, *qwen_jax.load_pretrained(directory)


def with_chunks(model, *sizes):
    return Decoder(dataclasses.replace(model.config, dual_chunk=DualChunkSpec(*sizes)))


def rendering(reference, *sizes):
    return DualChunkModel(reference.state_dict(), reference.config.to_dict(), *sizes)


def random_ids(model, shape):
    return np.random.default_rng(0).integers(0, model.config.vocab_size, shape)


def test_inside_a_chunk_the_reference_s_plain_attention(plain):
    reference, _, model, params = plain
    ids = random_ids(model, (2, 40))
    out = with_chunks(model, 50, 10, 64).apply({"params": params}, ids)
    expected = reference_logits(reference, ids)
    np.testing.assert_allclose(out.logits, expected, rtol=0, atol=TOLERANCE)
    # So is the rendering that is the measure of longer texts.
    alone = rendering(reference, 50, 10, 64)(ids[0], [40])
    np.testing.assert_allclose(alone, expected[0], rtol=0, atol=TOLERANCE)


# Also: nothing exact across the edge of a chunk, and chunks shorter than that.
@pytest.mark.parametrize("sizes", [(24, 4, 16), (24, 4, 0), (12, 0, 16), (12, 9, 16)])
def test_a_full_pass_over_many_chunks_equals_the_formulas(plain, sizes):
    reference, _, model, params = plain
    ids = random_ids(model, (2, 60))
    out = with_chunks(model, *sizes).apply({"params": params}, ids).logits
    by_formulas = rendering(reference, *sizes)
    for row, text in enumerate(ids):
        np.testing.assert_allclose(out[row], by_formulas(text, [60]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_and_cached_decode_equal_the_formulas(plain, side):
    """Past the trained length each row's keys have the factor of the length at which they came.

    The steps lead over an edge of chunks in both rows, in the second with several tokens a call.
    """
    reference, _, model, params = plain
    sizes = 24, 4, 16
    model, by_formulas = with_chunks(model, *sizes), rendering(reference, *sizes)
    lengths, steps = (34, 19), (4, 1, 1, 1, 1, 1)
    texts = [random_ids(model, 34 + sum(steps))[-(n + sum(steps)) :] for n in lengths]
    ids, mask = np.zeros((2, 34), int), np.zeros((2, 34), int)
    for row, n in enumerate(lengths):
        place = slice(34 - n, None) if side == "left" else slice(n)
        ids[row, place], mask[row, place] = texts[row][:n], 1
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    out = model.apply({"params": params}, ids, mask, positions)
    cache = init_cache(model.config, 2, 48, np.float32)
    apply = jax.jit(model.apply)
    cached = apply({"params": params}, ids, mask, positions, cache)
    cache, decoded, done = cached.cache, [], 0
    for step in steps:
        new = np.stack([text[n + done :][:step] for n, text in zip(lengths, texts, strict=True)])
        after = apply({"params": params}, new, cache=cache)
        decoded.append(np.asarray(after.logits))
        cache, done = after.cache, done + step
    for row, n in enumerate(lengths):
        expected = by_formulas(texts[row], [n, *steps])
        real = mask[row].astype(bool)
        for logits in (out.logits, cached.logits):
            np.testing.assert_allclose(logits[row][real], expected[:n], rtol=0, atol=TOLERANCE)
        after_prompt = np.concatenate(decoded, axis=1)[row]
        np.testing.assert_allclose(after_prompt, expected[n:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("beside", [False, True], ids=["in config.json", "beside config.json"])
def test_config_json_says_it_and_sparse_prefill_is_dense_with_a_notice(plain, beside, tmp_path):
    _, directory, model, params = plain
    raw = json.loads((directory / "config.json").read_text())
    sizes = {"chunk_size": 24, "local_size": 4, "original_max_position_embeddings": 32}
    pattern = [{"0": ["vertical_and_slash", 30, 800, 0.9]}] * 2
    inside = {
        "sparse_attention_enabled": True,
        "sparse_attention_threshold": 16,
        "sparse_attention_last_q": 8,
        "sparse_attention_config": pattern,
    }
    raw["dual_chunk_attention_config"] = sizes if beside else sizes | inside
    target = tmp_path / "model"
    target.mkdir()
    if beside:
        (target / "sparse_attention_config.json").write_text(json.dumps(pattern))
    (target / "model.safetensors").symlink_to(directory / "model.safetensors")
    (target / "config.json").write_text(json.dumps(raw))
    notice = "sparse_attention_enabled.*attention is exact here"
    with pytest.warns(UserWarning, match=notice):
        loaded, loaded_params = qwen_jax.load_pretrained(target)
    assert loaded.config.dual_chunk == DualChunkSpec(24, 4, 32)
    ids = random_ids(model, (1, 50))
    expected = with_chunks(model, 24, 4, 32).apply({"params": params}, ids).logits
    np.testing.assert_array_equal(loaded.apply({"params": loaded_params}, ids).logits, expected)
    qwen_jax.save_pretrained(tmp_path / "again", loaded.config, loaded_params)
    assert qwen_jax.load_pretrained(tmp_path / "again")[0].config == loaded.config
    with pytest.warns(UserWarning, match=notice):
        convert(target, tmp_path / "converted", "orbax")
    with pytest.warns(UserWarning, match=notice):
        assert load_config(tmp_path / "converted") == loaded.config
