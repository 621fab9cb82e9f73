"""How far keeping keys and values in fewer bits moves what a model predicts."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.evaluation.perplexity import cut_windows
from qwen_jax.inference.padding import padded_batches
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import Cache, CacheDtype, init_cache

# Tokens, over all rows, of whose logits there are two at once: 300 MB for 151,936 ids.
_BLOCK = 256
# Nats by which a token may become likelier, whose exponential is still a number.
_MOST = 80.0


@dataclasses.dataclass(frozen=True)
class CacheDivergence:
    """How predictions differ that go through two caches of the same tokens.

    Attributes:
      kl: float64 [n], KL(full || other) of the next token's distribution at each token, in nats.
      agrees: bool [n], whether the likeliest next token is the same.
      full_bytes, other_bytes: of the two caches' layers, for as many rows and slots.
    """

    kl: np.ndarray
    agrees: np.ndarray
    full_bytes: int
    other_bytes: int


def measure_cache_divergence(
    model: Decoder,
    params: Any,
    ids: Sequence[int],
    length: int,
    stride: int,
    cache_dtype: CacheDtype,
    batch_size: int = 8,
) -> CacheDivergence:
    """Reads a text through a cache as it is computed and through one in `cache_dtype`.

    What is cached does not depend on how a text comes in, so that a window that is read at once
    predicts what decoding predicts that is given the text's own tokens, up to the rounding of sums.

    Args:
      model, params: as `load_pretrained` returns them, with a vocabulary head.
      ids: of the text, at least 2.
      length, stride, batch_size: as for `measure_perplexity`; the same tokens are compared.
      cache_dtype: as for `init_cache`.

    Raises:
      UserError: as `measure_perplexity`, or logits that are not numbers.
    """
    windows = cut_windows(len(ids), length, stride)
    ids = np.asarray(ids)
    # The last token of a window predicts nothing that is compared.
    rows = [ids[window.begin : window.end - 1] for window in windows]
    dtype = params["embed_tokens"]["weight"].dtype
    kl, agrees = ([np.zeros(0)] * len(rows) for _ in range(2))
    sizes = (0, 0)
    for batch in padded_batches(model.config, rows, batch_size):
        B, T = batch.ids.shape
        caches = tuple(
            init_cache(model.config, B, T, dtype, model.mesh, each) for each in (None, cache_dtype)
        )
        found = _compare(model, params, batch.ids, batch.mask, batch.positions, caches)
        sizes = tuple(max(size, _bytes(cache)) for size, cache in zip(sizes, caches, strict=True))
        # Rows behind the last text repeat it.
        for i, *both in zip(batch.numbers, *jax.device_get(found), strict=False):
            first = windows[i].start - 1 - windows[i].begin
            kl[i], agrees[i] = (x[first : len(rows[i])] for x in both)
    if np.isnan(np.concatenate(kl)).any():
        raise UserError(f"the logits are NaN or infinite in {dtype}; download the checkpoint again")
    return CacheDivergence(np.concatenate(kl), np.concatenate(agrees).astype(bool), *sizes)


def _bytes(cache: Cache) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(cache.layers))


@functools.partial(jax.jit, static_argnames="model")
def _compare(model, params, ids, mask, positions, caches) -> tuple[jax.Array, jax.Array]:
    """KL and agreement [B, T] of what the tokens predict through the second cache."""
    variables = {"params": params}
    x = jnp.stack(
        [
            model.apply(variables, ids, mask, positions, cache, "last").hidden_states[-1]
            for cache in caches
        ],
        axis=2,
    )
    B, T = ids.shape
    size = min(T, max(1, _BLOCK // B))

    def read(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        full, other = (model.apply(variables, x[:, :, i], method="read") for i in range(2))
        p, q = jax.nn.log_softmax(full), jax.nn.log_softmax(other)
        # With what cancels in the sum, the probabilities' difference, no term is below 0.
        more = jnp.minimum(q - p, _MOST)
        kl = jnp.sum(jnp.exp(p) * (jnp.expm1(more) - more), axis=-1)
        return kl, full.argmax(axis=-1) == other.argmax(axis=-1)

    x = jnp.pad(x, ((0, 0), (0, -T % size), (0, 0), (0, 0)))
    x = jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)
    found = jax.lax.map(read, x)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :T], found)
