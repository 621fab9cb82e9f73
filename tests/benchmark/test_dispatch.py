"""`measure_dispatch`: what it runs, what it leaves out, and what its rows say."""

import pytest

from qwen_jax.benchmark.dispatch import measure_dispatch
from qwen_jax.config import MoeSpec
from qwen_jax.nn.moe import Dispatch

SPEC = MoeSpec((0,), 8, 2, 16, True)


@pytest.mark.parametrize("gradient", [False, True])
def test_every_method_is_measured_at_every_number_of_tokens(gradient):
    rows = measure_dispatch(SPEC, 32, (1, 12), repeats=3, gradient=gradient)
    assert [(row.num_tokens, row.method) for row in rows] == [
        (num_tokens, method) for num_tokens in (1, 12) for method in Dispatch
    ]
    for row in rows:
        assert len(row.seconds) == 3
        assert min(row.seconds) <= row.median <= max(row.seconds)
    for start in (0, len(Dispatch)):
        some = rows[start : start + len(Dispatch)]
        best = min(row.median for row in some)
        assert best > 0
        assert [row.ratio for row in some] == [row.median / best for row in some]


def test_what_takes_too_much_memory_is_reported_and_not_run():
    methods = (Dispatch.DENSE, Dispatch.SORTED)
    dense, by_blocks = measure_dispatch(SPEC, 32, (512,), methods, repeats=1)
    # One copy of the tokens for each expert.
    assert dense.temporaries > 8 * 512 * 32 * 4 > by_blocks.temporaries
    limit = (dense.temporaries + by_blocks.temporaries) / 2
    dense, by_blocks = measure_dispatch(SPEC, 32, (512,), methods, 1, memory_limit=limit)
    assert (dense.seconds, dense.median, dense.ratio) == ((), None, None)
    assert dense.temporaries > limit
    assert (len(by_blocks.seconds), by_blocks.ratio) == (1, 1.0)
    (nothing,) = measure_dispatch(SPEC, 32, (512,), methods[:1], 1, memory_limit=0)
    assert (nothing.seconds, nothing.ratio) == ((), None)
