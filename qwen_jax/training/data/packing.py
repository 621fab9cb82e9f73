"""Examples of any length -> rows of one length, packed by Grain's algorithms.

On the way an example is two arrays: its ids, and a byte a token of `LEARNED`, `BEGINS` and
`TRUNCATED`, so that what becomes of each record can be counted where rows leave.
"""

import dataclasses
import functools

import grain
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.training.data.options import TooLong
from qwen_jax.training.data.tokenise import Example

# Whether a token is learned; begins a record; begins one whose end is missing.
LEARNED, BEGINS, TRUNCATED = 1, 2, 4

Arrays = dict[str, np.ndarray]


def fit(example: Example, length: int, too_long: TooLong) -> Arrays:
    """An example's `ids` and `marks`, [n] each; only those that are to be cut exceed `length`.

    Raises:
      UserError: it is longer, and that is refused.
    """
    n = len(example.ids)
    marks = example.learned.astype(np.uint8) * LEARNED
    marks[0] |= BEGINS
    if n > length and too_long == "refuse":
        raise UserError(
            f"{example.name}: has {n} tokens, rows have {length}; raise length, or set too_long of "
            "its source to truncate or cut"
        )
    if n > length and too_long == "truncate":
        marks[0] |= TRUNCATED
        return {"ids": example.ids[:length], "marks": marks[:length]}
    return {"ids": example.ids, "marks": marks}


def pack(
    examples: grain.IterDataset, length: int, cut: bool, rows: int, seed: int | None
) -> grain.IterDataset:
    """Rows of several examples each, as `finish` makes them.

    Args:
      examples: from `fit`.
      length: of a row.
      cut: whether examples follow each other without a gap and are split where a row ends; else
        each is whole in its row, but for those that are longer, of which each piece is.
      rows: that are filled together where examples stay whole, by best fit.
      seed: to shuffle those with; None to leave them in the order that they were begun in.
    """
    lengths = {"ids": length, "marks": length}
    if cut:
        rows_ = grain.experimental.ConcatThenSplitIterDataset(examples, length_struct=lengths)
    else:
        rows_ = grain.experimental.BestFitPackIterDataset(
            grain.experimental.FlatMapIterDataset(examples, _Cut(length)),
            length_struct=lengths,
            num_packing_bins=rows,
            shuffle_bins=seed is not None,
            seed=seed or 0,
        )
    return rows_.map(finish)


def pad(examples: grain.IterDataset, length: int) -> grain.IterDataset:
    """Rows of one example each, or of a piece of one that is longer, as `finish` makes them."""
    pieces = grain.experimental.FlatMapIterDataset(examples, _Cut(length))
    return pieces.map(functools.partial(padded, length=length)).map(finish)


def finish(row: Arrays) -> Arrays:
    """What training takes of a packed row.

    Returns:
      int32 `input_ids`, `positions` and `segment_ids`, bool `attention_mask`, float32
      `loss_weights` and uint8 `marks`, [length] each. Segments count up from 1, and padding behind
      them has the last one's number: the model wants them in order. The first token of a segment
      has weight 0, since there is nothing that could predict it.
    """
    segments = row["ids_segment_ids"]
    positions = row["ids_positions"]
    real = segments > 0
    learned = (row["marks"] & LEARNED > 0) & (positions > 0)
    return {
        "input_ids": row["ids"],
        "loss_weights": learned.astype(np.float32),
        "attention_mask": real,
        "positions": positions,
        "segment_ids": np.where(real, segments, segments.max()),
        "marks": row["marks"],
    }


@dataclasses.dataclass(frozen=True)
class _Cut(grain.experimental.FlatMapTransform):
    """Cuts examples into pieces of at most so many tokens."""

    length: int

    def flat_map(self, element: Arrays) -> list[Arrays]:
        starts = range(0, len(element["ids"]), self.length)
        return [{k: v[i : i + self.length] for k, v in element.items()} for i in starts]


def padded(element: Arrays, length: int) -> Arrays:
    """A row for `finish` of one example of at most `length` tokens."""
    n = len(element["ids"])
    row = {name: np.pad(values, (0, length - n)) for name, values in element.items()}
    places = np.arange(length, dtype=np.int32)
    real = places < n
    return {
        **row,
        "ids_segment_ids": real.astype(np.int32),
        "ids_positions": np.where(real, places, 0),
    }
