"""Batches of similar length: every text once and whole, of few sizes, with the least padding."""

import itertools

import numpy as np
import pytest

from configs.models import get_preset
from qwen_jax.inference.decoding import bucket
from qwen_jax.inference.padding import padded_batches
from qwen_jax.rope_scaling import with_rope_scaling

CONFIG = get_preset("qwen3-0.6b")
DYNAMIC = with_rope_scaling(CONFIG, {"rope_type": "dynamic", "factor": 2.0})
# Sizes that batches are padded to, written out.
SIZES = (16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160)


def texts(lengths):
    rng = np.random.default_rng(0)
    # No zeros, which padding has.
    return [rng.integers(1, 1000, length) for length in lengths]


@pytest.mark.parametrize(
    ("config", "batch_size", "B"), [(CONFIG, 4, 4), (CONFIG, 50, 11), (DYNAMIC, 4, 1)]
)
def test_every_text_is_in_one_batch_whole_and_behind_shorter_ones(config, batch_size, B):
    rows = texts([33, 1, 150, 17, 16, 99, 33, 2, 64, 65, 16])
    batches = list(padded_batches(config, rows, batch_size))
    order = [number for batch in batches for number in batch.numbers]
    lengths = [len(rows[number]) for number in order]
    assert sorted(order) == list(range(11))
    assert lengths == sorted(lengths)
    assert [len(batch.numbers) for batch in batches[:-1]] == [B] * (len(batches) - 1)
    for batch in batches:
        T = next(size for size in SIZES if size >= max(len(rows[i]) for i in batch.numbers))
        assert batch.ids.shape == batch.mask.shape == batch.positions.shape == (B, T)
        # Rows behind the last text repeat it.
        numbers = [*batch.numbers, *[batch.numbers[-1]] * (B - len(batch.numbers))]
        for row, number in enumerate(numbers):
            n = len(rows[number])
            assert batch.ids[row].tolist() == [*rows[number], *[0] * (T - n)]
            assert batch.mask[row].tolist() == [True] * n + [False] * (T - n)
            assert batch.positions[row].tolist() == [*range(n), *[0] * (T - n)]


@pytest.mark.parametrize("seed", range(3))
def test_no_other_order_has_less_padding(seed):
    lengths = np.random.default_rng(seed).integers(1, 120, 6).tolist()
    places = [batch.ids.size for batch in padded_batches(CONFIG, texts(lengths), 2)]
    least = min(
        sum(2 * bucket(max(order[i : i + 2])) for i in (0, 2, 4))
        for order in itertools.permutations(lengths)
    )
    assert sum(places) == least


def test_without_texts_there_is_no_batch():
    assert list(padded_batches(CONFIG, [], 4)) == []
