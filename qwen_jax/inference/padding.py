"""Texts of any lengths -> batches of one size and few lengths: few programs are compiled."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from qwen_jax.config import ModelConfig
from qwen_jax.inference.decoding import bucket
from qwen_jax.models.decoder import warn_if_longer


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
    """Texts of similar length, padded on the right; rows behind the last text repeat it.

    Attributes:
      numbers: of the texts, row by row, among all that run.
      ids, positions: int32 [B, T].
      mask: bool [B, T], where there are tokens.
    """

    numbers: list[int]
    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray


def padded_batches(
    config: ModelConfig, rows: Sequence[np.ndarray], batch_size: int
) -> Iterator[PaddedBatch]:
    """All texts in batches of one size and few lengths, shortest first, with a progress bar.

    Args:
      config: of the model.
      rows: token ids, none empty.
      batch_size: of each batch, if there are so many texts; 1 where lengths change frequencies.
    """
    if not rows:
        return
    warn_if_longer(config, max(map(len, rows)))
    # The longest row would set the frequencies of the whole batch.
    B = 1 if config.rope.depends_on_length else min(batch_size, len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in tqdm.tqdm(range(0, len(rows), B), "scoring", unit="batch", disable=None):
        numbers = order[start : start + B]
        texts = [rows[numbers[min(row, len(numbers) - 1)]] for row in range(B)]
        lengths = np.array([len(text) for text in texts])
        at = np.arange(bucket(int(lengths.max())))
        mask = at < lengths[:, None]
        ids = np.zeros(mask.shape, np.int32)
        ids[mask] = np.concatenate(texts)
        yield PaddedBatch(numbers, ids, mask, np.where(mask, at, 0).astype(np.int32))
