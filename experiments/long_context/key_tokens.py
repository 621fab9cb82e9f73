"""Which tokens of a text need what stands far before them (LongPPL, arXiv 2410.23771).

Most tokens are as well predicted from the last few thousand, so that perplexity says little of how
long texts are read. Tokens are taken that a judge predicts well from the whole text, and worse from
its end alone.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_jax.inference.likelihood import token_likelihoods
from qwen_jax.models.decoder import Decoder

# As published: tokens of the end alone, of which the last are scored, and both thresholds.
_WINDOW, _SCORED = 4096, 1024
_GAIN, _LIKELY = 2.0, -2.0


def short_window(length: int) -> tuple[int, int]:
    """Tokens that are seen from the end alone, and how many of them are scored at a time.

    As published, of texts shorter than four such windows a quarter.
    """
    window = min(_WINDOW, length // 4)
    return window, max(window * _SCORED // _WINDOW, 1)


def key_spans(
    judge: Decoder, params: Any, ids: Sequence[int], batch_size: int
) -> tuple[tuple[int, int], ...]:
    """Where the tokens begin and end that need distant ones; neighbours are one span.

    Args:
      judge: tells how well each token is predicted.
      params: of the judge.
      ids: of the text.
      batch_size: windows that run together.
    """
    (whole,) = token_likelihoods(judge, params, [ids])
    window, scored = short_window(len(ids))
    short = whole.log_probs.copy()
    ends = [*range(window, len(ids), scored), len(ids)]
    texts, starts = [], []
    for begin, end in itertools.pairwise(ends):
        first = max(end - window, 0)
        texts.append(ids[first:end])
        starts.append(begin - first)
    found = token_likelihoods(judge, params, texts, starts, batch_size)
    for (begin, end), likelihood in zip(itertools.pairwise(ends), found, strict=True):
        # The first token of the text has no number.
        short[begin - 1 : end - 1] = likelihood.log_probs
    keys = (whole.log_probs - short > _GAIN) & (whole.log_probs > _LIKELY)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keys, [False]]).astype(int)))
    return tuple((int(a) + 1, int(b) + 1) for a, b in edges.reshape(-1, 2))
