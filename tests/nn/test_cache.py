"""The cache's slots, and what can and cannot be done with them."""

import jax.numpy as jnp
import numpy as np

from qwen_jax.nn.cache import write_slots


def test_writing_past_the_end_is_dropped_and_leaves_the_rest():
    buffer = np.zeros((2, 4, 1), np.float32)
    new = np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1)
    out = write_slots(jnp.asarray(buffer), np.array([[1, 4, 2], [3, 4, 9]]), new)
    np.testing.assert_array_equal(out[..., 0], [[0, 1, 3, 0], [0, 0, 0, 4]])
