"""Models that see distant keys in another way: caches, padding and meshes against full passes."""

import dataclasses

import jax
import numpy as np
import pytest

import qwen_jax
from qwen_jax.config import FarSpec
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn import attend as attend_file
from qwen_jax.nn import ring
from qwen_jax.nn.cache import init_cache
from qwen_jax.sharding.axes import as_mesh
from tests.models.passes import padding, random_ids
from tests.reference import random_reference, save_reference

SPECS = {
    "rerope": FarSpec(6),
    "leaky": FarSpec(6, 2.5),
    "self-extend": FarSpec(6, 3.0, whole=True),
    "sinks": FarSpec(6, sinks=2),
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    reference = random_reference("qwen3", num_hidden_layers=2)
    return qwen_jax.load_pretrained(save_reference(reference, tmp_path_factory.mktemp("plain")))


@pytest.fixture(params=SPECS)
def far(request, plain):
    model, params = plain
    return Decoder(dataclasses.replace(model.config, far=SPECS[request.param])), params


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


def test_within_the_window_it_is_the_model_as_it_is(plain, far):
    model, params = plain
    ids = random_ids(model, (2, 30))
    want = model.apply({"params": params}, ids).logits
    got = far[0].apply({"params": params}, ids).logits
    close(got[:, :6], want[:, :6])
    assert np.abs(got[:, 12:] - want[:, 12:]).max() > 1e-2 * np.abs(want).max()


def test_blocks_that_no_query_sees_are_passed_over(far, monkeypatch):
    model, params = far
    ids = random_ids(model, (1, 40))
    want = model.apply({"params": params}, ids).logits
    monkeypatch.setattr(attend_file, "_BLOCK", 4)
    jax.clear_caches()
    close(model.apply({"params": params}, ids).logits, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_and_cached_decode_equal_each_text_by_itself(far, side):
    model, params = far
    lengths, steps = (17, 5), (4, 1, 1, 5)
    texts = [random_ids(model, n + sum(steps), seed=n) for n in lengths]
    mask = padding(lengths, 17, side).astype(bool)
    ids = np.zeros((2, 17), int)
    for row, text in enumerate(texts):
        ids[row, mask[row]] = text[: lengths[row]]
    whole = [model.apply({"params": params}, text[None]).logits[0] for text in texts]
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    out = model.apply({"params": params}, ids, mask, positions).logits
    cache = init_cache(model.config, 2, 40, np.float32)
    apply = jax.jit(model.apply)
    cached = apply({"params": params}, ids, mask, positions, cache)
    for row, n in enumerate(lengths):
        for logits in (out, cached.logits):
            close(logits[row][mask[row]], whole[row][:n])
    cache, done = cached.cache, np.array(lengths)
    for step in steps:
        new = np.stack([text[n : n + step] for text, n in zip(texts, done, strict=True)])
        after = apply({"params": params}, new, cache=cache)
        cache = after.cache
        for row, n in enumerate(done):
            close(after.logits[row], whole[row][n : n + step])
        done = done + step


def test_keys_of_int8_are_turned_as_well(far):
    model, params = far
    ids = random_ids(model, (1, 20))
    want = model.apply({"params": params}, ids).logits
    cache = init_cache(model.config, 1, 24, np.float32, cache_dtype="int8")
    got = model.apply({"params": params}, ids, cache=cache).logits
    assert 1e-5 < np.abs(got - want).max() / np.abs(want).max() < 0.1


def test_gradients_are_those_of_all_scores_at_once(far, monkeypatch):
    """Block by block, and with all blocks in one, where XLA differentiates other operations."""
    model, params = far
    ids = random_ids(model, (1, 24))

    def gradients():
        jax.clear_caches()
        return jax.grad(lambda p: (model.apply({"params": p}, ids).logits ** 2).mean())(params)

    whole = gradients()
    monkeypatch.setattr(attend_file, "_BLOCK", 8)
    jax.tree.map(close, gradients(), whole)


MESHES = ("data:2,tensor:2", "context:2", "context:4,tensor:2")


@pytest.mark.parametrize("mesh", MESHES)
def test_on_a_mesh(far, mesh):
    model, params = far
    ids = random_ids(model, (2, 22))
    mask = padding((22, 13), 22, "right").astype(bool)
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    arguments = {"params": params}, ids, mask, positions
    want = model.apply(*arguments).logits
    spread = Decoder(model.config, mesh=as_mesh(mesh))
    got = jax.jit(spread.apply)(*arguments).logits
    for row, own in enumerate(mask):
        close(got[row][own], want[row][own])


@pytest.mark.parametrize("most_gathered", [0, 1 << 26])
def test_gradients_where_a_mesh_cuts_the_texts(far, most_gathered, monkeypatch):
    """Keys that travel round, or are gathered, against one device."""
    model, params = far
    monkeypatch.setattr(ring, "_MOST_GATHERED", most_gathered)
    jax.clear_caches()
    ids = random_ids(model, (1, 24))

    def gradients(model):
        def loss(params):
            return (model.apply({"params": params}, ids).logits ** 2).mean()

        return jax.jit(jax.grad(loss))(params)

    spread = Decoder(model.config, mesh=as_mesh("context:4"))
    jax.tree.map(close, gradients(spread), gradients(model))


@pytest.mark.parametrize("prompt", [19, 70])
def test_a_cache_that_a_mesh_cuts(far, prompt):
    """A prompt, long ones shared out as well, and tokens one by one, against one device."""
    model, params = far
    ids = random_ids(model, (2, prompt + 3))
    want = model.apply({"params": params}, ids).logits
    spread = Decoder(model.config, mesh=as_mesh("context:2"))
    cache = init_cache(model.config, 2, prompt + 9, np.float32, mesh=spread.mesh)
    apply = jax.jit(spread.apply)
    out = apply({"params": params}, ids[:, :prompt], cache=cache)
    close(out.logits, want[:, :prompt])
    for i in range(prompt, prompt + 3):
        out = apply({"params": params}, ids[:, i : i + 1], cache=out.cache)
        close(out.logits[:, 0], want[:, i])
