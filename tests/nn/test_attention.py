"""`attend` against a loop over queries and keys in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.nn import attention
from qwen_jax.nn.attention import attend
from qwen_jax.nn.cache import write_slots


def brute_force(q, k, v, slots, key_valid, window):
    B, T, H, d = q.shape
    group = H // k.shape[2]
    out = np.zeros((B, T, H, d))
    for b, t, h in np.ndindex(B, T, H):
        seen = [
            s
            for s in range(k.shape[1])
            if s <= slots[b, t]
            and (window is None or slots[b, t] - s < window)
            and (key_valid is None or key_valid[b, s])
        ]
        if not seen:
            continue
        scores = k[b, seen, h // group].astype(np.float64) @ q[b, t, h] / np.sqrt(d)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (7, 1)])
def test_equals_brute_force(heads, padded, window, monkeypatch):
    # Blocks smaller than the text, the last one not full.
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 4)
    H, K = heads
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 11, H, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, 16, K, 8)).astype(np.float32)
    slots = np.stack([np.arange(11), np.arange(5, 16)])
    key_valid = rng.random((2, 16)) < 0.7 if padded else None
    expected = brute_force(q, k, v, slots, key_valid, window)
    out = np.asarray(attend(q, k, v, slots, key_valid, window))
    sees_something = np.abs(expected).sum((2, 3)) > 0
    np.testing.assert_allclose(out[sees_something], expected[sees_something], atol=2e-6)
    assert np.isfinite(out).all()


def test_writing_past_the_end_is_dropped_and_leaves_the_rest():
    buffer = np.zeros((2, 4, 1), np.float32)
    new = np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1)
    out = write_slots(jnp.asarray(buffer), np.array([[1, 4, 2], [3, 4, 9]]), new)
    np.testing.assert_array_equal(out[..., 0], [[0, 1, 3, 0], [0, 0, 0, 4]])
