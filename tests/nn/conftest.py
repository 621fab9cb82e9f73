"""The paged kernel without a TPU."""

from unittest import mock

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged

from qwen_jax.nn import cache
from qwen_jax.nn.kernels import paged


class Loaded:
    """What a kernel reads of a buffer, where the interpreter has no reshaped buffers."""

    def __init__(self, values):
        self.values, self.dtype, self.shape = values, values.dtype, values.shape

    def reshape(self, *shape):
        return Loaded(self.values.reshape(*shape))

    def bitcast(self, dtype):
        return Loaded(pltpu.bitcast(self.values, dtype))

    def __getitem__(self, index):
        return self.values[index]


@pytest.fixture
def interpreter():
    """Runs the paged kernel without a TPU, around two things that the interpreter has not.

    They are reading a buffer in another shape, and storing a part of one under a mask.
    """
    copy = ragged.MultiPageAsyncCopyDescriptor
    wait = copy.wait

    def store(ref, values, mask):
        ref[...] = jnp.where(mask, values, ref[...])

    with (
        mock.patch.object(copy, "wait", lambda self: Loaded(wait(self)[...])),
        mock.patch.object(ragged.pltpu, "store", store),
        pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()),
    ):
        yield


@pytest.fixture
def small_pages(monkeypatch):
    for module in (paged, cache):
        monkeypatch.setattr(module, "PAGE", 8)
    monkeypatch.setattr(paged, "_KEYS", 16)
    monkeypatch.setattr(paged, "_QUERIES", 4)
