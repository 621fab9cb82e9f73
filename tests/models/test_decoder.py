"""Logits, hidden states and caches against transformers, live."""

import jax
import numpy as np
import pytest
import torch

import qwen_jax
from qwen_jax.checkpoint.names import leaf_at, regions
from qwen_jax.checkpoint.reader import StoredTensor
from qwen_jax.checkpoint.regions import to_stored
from qwen_jax.nn.cache import init_cache
from tests.models.passes import (
    check_cached_pieces,
    check_hidden_states,
    check_padded_logits,
    check_ragged_decode,
    draw_scaling,
    padding,
    random_ids,
)
from tests.reference import random_reference, save_reference

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CASES = {
    "qwen2": ("qwen2", {}),
    "qwen2 heads of other size": ("qwen2", {"head_dim": 40}),
    "qwen2 ratio 7, tied": (
        "qwen2",
        {"num_attention_heads": 14, "hidden_size": 112, "tie_word_embeddings": True},
    ),
    "qwen2 without groups": ("qwen2", {"num_key_value_heads": 4, "rope_theta": 7777.7}),
    "qwen2 sliding upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True, "rope_theta": 123.4}),
    "qwen3 single kv head": ("qwen3", {"num_attention_heads": 7, "num_key_value_heads": 1}),
    "qwen3 sliding by layer": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "linear": ("qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "dynamic": (
        "qwen3",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.5}, "max_position_embeddings": 16},
    ),
    "yarn": ("qwen3", {"rope_scaling": YARN}),
    "yarn attention_factor": ("qwen2", {"rope_scaling": {**YARN, "attention_factor": 0.7}}),
    "yarn betas": ("qwen3", {"rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 0.25}}),
    "yarn mscale": ("qwen3", {"rope_scaling": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.6}}),
    "yarn not truncated": ("qwen3", {"rope_scaling": {**YARN, "truncate": False}}),
}


def draw_case(seed):
    """A checkpoint's family and fields, drawn from everything that config.json can ask for."""
    rng = np.random.default_rng(seed)
    family = rng.choice(["qwen2", "qwen3"])
    kv_heads, group = rng.integers(1, 4), rng.choice([1, 2, 3, 7])
    length = int(rng.integers(16, 64))
    fields = {
        "num_key_value_heads": int(kv_heads),
        "num_attention_heads": int(kv_heads * group),
        "head_dim": int(2 * rng.integers(4, 20)),
        "hidden_size": int(rng.integers(20, 90)),
        "intermediate_size": int(rng.integers(20, 90)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "rope_theta": float(10 ** rng.uniform(2, 7)),
        "rms_norm_eps": float(10 ** rng.uniform(-7, -2)),
        "max_position_embeddings": length,
        "rope_scaling": draw_scaling(rng, length),
        "use_sliding_window": bool(rng.integers(2)),
        "sliding_window": int(rng.integers(1, 20)),
        "max_window_layers": int(rng.integers(0, 4)),
    }
    if family == "qwen3":
        fields["attention_bias"] = bool(rng.integers(2))
    return str(family), fields


@pytest.mark.parametrize("seed", range(12))
def test_drawn_checkpoints_equal_the_reference(seed, tmp_path):
    family, fields = draw_case(seed)
    reference = random_reference(family, seed, **fields)
    model, params = qwen_jax.load_pretrained(save_reference(reference, tmp_path / "model"))
    mask = padding([70, 41], 70, "left" if seed % 2 else "right")
    check_padded_logits(reference, model, params, mask, seed)


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request, tmp_path_factory):
    family, fields = CASES[request.param]
    reference = random_reference(family, seed=len(request.param), **fields)
    directory = save_reference(reference, tmp_path_factory.mktemp("model"))
    model, params = qwen_jax.load_pretrained(directory)
    return reference, model, params


def test_logits_and_hidden_states_equal_the_reference(case):
    check_hidden_states(*case, (2, 45))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_the_reference(case, side):
    check_padded_logits(*case, padding([30, 11, 23], 30, side))


def test_cached_decode_equals_one_full_pass(case):
    _, model, params = case
    checked = range(5) if model.config.rope.depends_on_length else (1, 4)
    check_cached_pieces(model, params, [17, 7, 1, 1, 1], 24, checked)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_cached_decode_equals_each_row_alone(case, side):
    _, model, params = case
    check_ragged_decode(model, params, [20, 9], side)


def test_a_step_reads_no_slots_that_are_not_filled(small):
    """A step after 9 tokens, of 4096 slots with NaN in most of those that are not filled."""
    model, params = small
    rests = np.array([[True], [False]])

    def logits(capacity):
        cache = init_cache(model.config, 2, capacity, "float32")
        ids = random_ids(model, (2, 9))
        cache = model.apply({"params": params}, ids, None, None, cache, "last").cache
        if capacity > 512:
            layers = jax.tree.map(lambda x: x.at[:, 600:].set(np.nan), cache.layers)
            cache = cache.replace(layers=layers)
        return model.apply({"params": params}, ids[:, :1], rests, cache=cache).logits[0]

    np.testing.assert_allclose(logits(4096), logits(32), atol=1e-5)


def test_logits_at_picks_positions(case):
    _, model, params = case
    ids = random_ids(model, (2, 12))
    mask = padding([12, 7], 12, "right")
    logits = model.apply({"params": params}, ids, mask).logits
    last = model.apply({"params": params}, ids, mask, logits_at="last").logits
    np.testing.assert_array_equal(last[:, 0], logits[np.arange(2), [11, 6]])
    some = model.apply({"params": params}, ids, mask, logits_at=np.array([1, 5, 3])).logits
    np.testing.assert_array_equal(some, logits[:, [1, 5, 3]])
    own = model.apply({"params": params}, ids, mask, logits_at=np.array([[1, 5], [0, 6]])).logits
    np.testing.assert_array_equal(own, logits[np.arange(2)[:, None], [[1, 5], [0, 6]]])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = save_reference(random_reference("qwen3"), tmp_path_factory.mktemp("small"))
    return qwen_jax.load_pretrained(directory)


@pytest.mark.parametrize("bad", [-1, -100, 320, 10**6])
def test_ids_outside_the_vocabulary_give_no_numbers(small, bad):
    model, params = small
    logits = np.asarray(model.apply({"params": params}, [[1, bad, 2], [1, 3, 2]]).logits)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


def test_logits_beyond_the_call_are_no_numbers(small):
    model, params = small
    for where in (np.array([1, 4, -1]), np.array([[1, 4, -1]])):
        logits = np.asarray(model.apply({"params": params}, [[1, 2, 3, 4]], logits_at=where).logits)
        assert np.isfinite(logits[0, 0]).all()
        assert np.isnan(logits[0, 1:]).all()
    with pytest.raises(ValueError, match="axes"):
        model.apply({"params": params}, [[1, 2]], logits_at=1)
    with pytest.raises(ValueError, match=r"shape \(2,\); give token ids"):
        model.apply({"params": params}, [1, 2])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1.7, 2.0]], "input_ids are float32; give integers"),
        ([[True]], "input_ids are bool; give integers"),
        ([[1, 2], [3]], "rows of different lengths; pad them"),
        (np.zeros((1, 0), int), r"shape \(1, 0\); give token ids"),
    ],
)
def test_ids_that_are_none_are_refused(small, ids, message):
    model, params = small
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, ids)


def test_masks_and_positions_of_another_shape_are_refused(small):
    model, params = small
    ids = [[1, 2, 3], [4, 5, 6]]
    for name in ("attention_mask", "positions"):
        for value in (np.ones((1, 3), int), np.ones((2, 4), int), np.ones(3, int)):
            with pytest.raises(ValueError, match=f"{name} has shape .*, the token ids "):
                model.apply({"params": params}, ids, **{name: value})


def test_a_model_without_the_head_for_the_token_after_says_so(small):
    model, params = small
    with pytest.raises(ValueError, match=r"no head for the token after the next"):
        model.apply({"params": params}, np.zeros((1, 2, 64)), [[1, 2]], method="predict_next")


def test_a_row_that_outgrows_its_cache_gives_no_numbers(small):
    model, params = small
    cache = init_cache(model.config, 2, 4, np.float32)
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    out = model.apply({"params": params}, [[1, 2, 3], [4, 0, 0]], mask, cache=cache)
    assert np.isfinite(out.logits).all()
    out = model.apply({"params": params}, [[5, 6, 7], [8, 9, 3]], cache=out.cache)
    assert np.isnan(out.logits[0]).all()
    assert np.isfinite(out.logits[1]).all()


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen2_moe", {"mlp_only_layers": [0]}),
        ("qwen3_next", {}),
        ("qwen3_5_text", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gradients_equal_the_reference(family, fields, tmp_path):
    reference = random_reference(family, **fields)
    model, params = qwen_jax.load_pretrained(save_reference(reference, tmp_path))
    ids = random_ids(model, (2, 20))
    torch.nn.functional.cross_entropy(
        reference(torch.as_tensor(ids)).logits[:, :-1].flatten(0, 1),
        torch.as_tensor(ids[:, 1:]).flatten(),
    ).backward()

    def loss(params):
        logits = jax.nn.log_softmax(model.apply({"params": params}, ids).logits[:, :-1])
        return -jax.numpy.take_along_axis(logits, ids[:, 1:, None], -1).mean()

    ours = jax.grad(loss)(params)
    sparse = model.config.moe.layers if model.config.moe else ()
    table = regions(model.config, {f"model.layers.{i}." for i in sparse})
    paths = {region.path for region in table}
    gradients = {path: as_stored(np.asarray(leaf_at(ours, path))) for path in paths}
    gradients = to_stored(table, gradients)
    theirs = dict(reference.named_parameters())
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        expected = theirs[name].grad.numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(gradient.read(), expected, rtol=0, atol=1e-4 * scale)


def as_stored(values):
    return StoredTensor("", None, values.shape, values.dtype, lambda: values)
