"""Texts of token ids -> how likely each of their tokens was, given those before it.

The output head reads a few tokens of every row at a time, and none of the parts in which nothing is
asked for, so that the logits of a whole text are never held.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import HeadKind
from qwen_jax.errors import UserError
from qwen_jax.inference.checks import check_head, check_integer
from qwen_jax.inference.decoding import read_ids
from qwen_jax.inference.padding import padded_batches
from qwen_jax.inference.scoring import NonfiniteScoresError, Texts, not_numbers
from qwen_jax.models.decoder import Decoder

# Tokens, over all rows, whose logits are held at once: 150 MB for 151,936 ids.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of the tokens of one text that were asked for.

    Attributes:
      log_probs: float32 [n], the natural logarithm of each token's probability.
      greedy: bool [n], whether it is the likeliest of the vocabulary; of several that are equally
        likely the first.
    """

    log_probs: np.ndarray
    greedy: np.ndarray


def token_likelihoods(
    model: Decoder,
    params: Any,
    texts: Texts,
    starts: Sequence[int] | None = None,
    batch_size: int = 8,
) -> list[Likelihood]:
    """How likely the tokens of each text are, from a given one on.

    Args:
      model, params: as `load_pretrained` returns them, with a vocabulary head.
      texts: token ids, a row each, of any lengths from 2 on.
      starts: for each text the first token that is asked for, from 1: the first token of a text has
        nothing before it that could predict it. None for 1.
      batch_size: texts that run together.

    Returns:
      For each text what is asked for, `len(text) - start` tokens.

    Raises:
      UserError: no vocabulary head, a text of one token, an id outside the vocabulary, a start that
        the text does not have, or numbers that are none (a `NonfiniteScoresError`).
    """
    check_head(model.config, (HeadKind.VOCABULARY,), "makes no predictions of the next token")
    check_integer("batch_size", batch_size, 1)
    rows = [read_ids(model.config, f"texts[{i}]", text) for i, text in enumerate(texts)]
    starts = [1] * len(rows) if starts is None else starts
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        if len(row) == 1:
            raise UserError(f"texts[{i}] is one token, which nothing before it predicts; give more")
        check_integer(f"starts[{i}]", start, 1, len(row) - 1)
    found: list[Likelihood | None] = [None] * len(rows)
    # The last token is predicted, and predicts nothing that is asked for.
    for batch in padded_batches(model.config, [row[:-1] for row in rows], batch_size):
        targets, wanted = np.zeros_like(batch.ids), np.zeros_like(batch.mask)
        for row, i in enumerate(batch.numbers):
            targets[row, : len(rows[i]) - 1] = rows[i][1:]
            wanted[row, starts[i] - 1 : len(rows[i]) - 1] = True
        log_probs, greedy = jax.device_get(
            _forward(model, params, batch.ids, batch.mask, batch.positions, targets, wanted)
        )
        for row, i in enumerate(batch.numbers):
            found[i] = Likelihood(log_probs[row][wanted[row]], greedy[row][wanted[row]])
            if np.isnan(found[i].log_probs).any():
                raise NonfiniteScoresError(i, not_numbers(params["embed_tokens"]["weight"].dtype))
    return found


@functools.partial(jax.jit, static_argnames="model")
def _forward(model, params, ids, mask, positions, targets, wanted) -> tuple[jax.Array, jax.Array]:
    """Log probability and greediness of `targets` [B, T] where they are `wanted`."""
    variables = {"params": params}
    out = model.apply(variables, ids, mask, positions, logits_at="last")
    x = out.hidden_states[-1]
    B, T = ids.shape
    size = min(T, max(1, _BLOCK // B))

    def cut(a: jax.Array) -> jax.Array:
        """[B, T, ...] -> [blocks, B, size, ...]."""
        a = jnp.pad(a, ((0, 0), (0, -T % size), *[(0, 0)] * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(B, -1, size, *a.shape[2:]), 1, 0)

    def read(x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(variables, x, method="read")
        # Not a gather: the vocabulary may lie along a mesh.
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.where(hit, logits, 0).sum(axis=-1)
        log_probs = chosen - jax.nn.logsumexp(logits, axis=-1)
        return log_probs, logits.argmax(axis=-1) == targets

    def skip(x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        del x
        return jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)

    def block(parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, targets, wanted = parts
        return jax.lax.cond(wanted.any(), read, skip, x, targets)

    parts = jax.lax.map(block, (cut(x), cut(targets), cut(wanted)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :T], parts)
