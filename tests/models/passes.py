"""What is asked of every model: passes against transformers', and caches against full passes."""

import copy

import jax
import numpy as np
import torch

from qwen_jax.nn.cache import grow_cache, init_cache
from tests.reference import reference_logits

TOLERANCE = 1e-4


def random_ids(model, shape, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, shape)


def padding(lengths, total, side):
    columns = np.arange(total)
    lengths = np.asarray(lengths)[:, None]
    return (columns < lengths if side == "right" else columns >= total - lengths).astype(np.int32)


def divergence_ratio(ours, theirs, truth):
    """How much further from `truth` our logits are than theirs: 1 for as far, 2 for twice.

    The geometric mean over positions of the ratio of two Kullback-Leibler divergences. A mean of
    the divergences would be that of the few positions where rounding is amplified most.
    """
    log_p, log_ours, log_theirs = (
        x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        for x in (np.asarray(logits, np.float64) for logits in (truth, ours, theirs))
    )
    of_ours, of_theirs = ((np.exp(log_p) * (log_p - q)).sum(-1) for q in (log_ours, log_theirs))
    return np.exp(np.log(of_ours / of_theirs).mean())


def draw_scaling(rng, trained):
    """A `rope_scaling` of any kind for a model trained on texts of length `trained`."""
    return {
        "default": None,
        "linear": {"rope_type": "linear", "factor": float(rng.uniform(1, 8))},
        "dynamic": {"rope_type": "dynamic", "factor": float(rng.uniform(1, 8))},
        "yarn": {
            "rope_type": "yarn",
            "factor": float(rng.uniform(1, 16)),
            "original_max_position_embeddings": trained,
            "attention_factor": rng.choice([None, float(rng.uniform(0.5, 2))]),
            "beta_fast": float(rng.uniform(2, 40)),
            "beta_slow": float(rng.uniform(0.1, 2)),
            "mscale": float(rng.uniform(0.1, 2)),
            "mscale_all_dim": float(rng.uniform(0.1, 2)),
            "truncate": bool(rng.integers(2)),
        },
    }[rng.choice(["default", "linear", "dynamic", "yarn"], p=[0.3, 0.1, 0.2, 0.4])]


def check_padded_logits(reference, model, params, mask, seed=0):
    """Logits of the real tokens of a padded batch equal the reference's.

    A model drawn at random may amplify rounding a hundredfold, on one processor and not on another:
    what the reference itself loses to float32 then says how far apart two passes may be.
    """
    ids = random_ids(model, mask.shape, seed)
    expected = reference_logits(reference, ids, mask)
    logits = model.apply({"params": params}, ids, attention_mask=mask).logits
    real = mask.astype(bool)
    tolerance = TOLERANCE
    if np.abs(logits - expected)[real].max() > tolerance:
        truth = reference_logits(copy.deepcopy(reference).double(), ids, mask)
        tolerance = 8 * np.abs(truth - expected)[real].max()
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=tolerance)


def check_hidden_states(reference, model, params, shape):
    """Logits and every layer's output equal the reference's."""
    ids = random_ids(model, shape)
    with torch.no_grad():
        expected = reference(torch.as_tensor(ids), use_cache=False, output_hidden_states=True)
    out = model.apply({"params": params}, ids)
    np.testing.assert_allclose(out.logits, expected.logits, rtol=0, atol=TOLERANCE)
    assert 0.5 < np.asarray(out.logits).std() < 2
    assert len(out.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        scale = max(1.0, theirs.std().item())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * scale)


def check_cached_pieces(model, params, sizes, capacity, checked):
    """A text in pieces of `sizes`, in a cache that grows once, equals full passes.

    Each length of a full pass compiles one, so that only those that end with piece numbers
    `checked` are compared.
    """
    total = sum(sizes)
    ids = random_ids(model, (2, total))
    cache = init_cache(model.config, 2, capacity, np.float32)
    apply = jax.jit(model.apply)
    end = 0
    for number, size in enumerate(sizes):
        piece = ids[:, end : end + size]
        end += size
        if end > cache.capacity:
            cache = grow_cache(cache, total)
        out = apply({"params": params}, piece, cache=cache)
        cache = out.cache
        if number in checked:
            full = model.apply({"params": params}, ids[:, :end]).logits[:, -size:]
            np.testing.assert_allclose(out.logits, full, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(cache.lengths, [total, total])


def check_ragged_decode(model, params, lengths, side, new=4):
    """Rows of a padded batch go on as if each were decoded by itself."""
    if model.config.rope.depends_on_length:
        # There, the longest row sets every row's frequencies.
        lengths = [max(lengths)] * len(lengths)
    total = max(lengths)
    rows = [random_ids(model, (1, n + new), seed=n + i) for i, n in enumerate(lengths)]
    mask = padding(lengths, total, side)
    ids = np.zeros(mask.shape, int)
    for row, text, n in zip(range(len(rows)), rows, lengths, strict=True):
        ids[row, mask[row].astype(bool)] = text[0, :n]
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    cache = init_cache(model.config, len(rows), total + 12, np.float32)
    out = model.apply({"params": params}, ids, mask, positions, cache, "last")
    for step in range(new):
        if step in (0, new - 1):
            for row, n in enumerate(lengths):
                alone = model.apply({"params": params}, rows[row][:, : n + step]).logits[0, -1]
                np.testing.assert_allclose(out.logits[row, -1], alone, rtol=0, atol=TOLERANCE)
        next_ids = np.stack(
            [rows[row][0, n + step : n + step + 1] for row, n in enumerate(lengths)]
        )
        out = model.apply({"params": params}, next_ids, cache=out.cache)
