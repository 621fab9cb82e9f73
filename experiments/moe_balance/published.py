"""What has been published of models many thousand times larger, beside what is measured here."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of a paper's table, and the arm that is its like.

    Attributes:
      source: the table.
      method: as the paper calls it.
      perplexity: of the validation set.
      max_vio: of it; None where the paper has none.
      arm: of the study.
    """

    source: str
    method: str
    perplexity: float
    max_vio: float | None
    arm: str


_LOSS_FREE = "arXiv 2408.15664, table 2, 1B"
_SOFTMAX = "arXiv 2408.15664, table 6, softmax gates"
_DEMONS = "arXiv 2501.11873, table 1, 3.4B of which 0.6B, 120B tokens"

PUBLISHED = (
    Published(_LOSS_FREE, "auxiliary loss, 0.001", 9.56, 0.72, "global 0.01"),
    Published(_LOSS_FREE, "loss-free, sign, 0.001", 9.50, 0.04, "loss-free sign 0.001"),
    Published(_SOFTMAX, "auxiliary loss", 9.604, 0.937, "global 0.01"),
    Published(_SOFTMAX, "loss-free", 9.599, 0.027, "loss-free proportional 0.01"),
    Published(_DEMONS, "balance over 4 texts", 8.167, None, "micro 0.1"),
    Published(_DEMONS, "over 512", 8.038, None, "global 0.1"),
    Published(_DEMONS, "over 4, drawn of all tokens", 8.041, None, "shuffled 0.1"),
    Published(_DEMONS, "loss-free over 4", 8.521, None, "loss-free sign 0.001 by micro counts"),
    Published(_DEMONS, "loss-free over 512", 8.080, None, "loss-free sign 0.001"),
    Published(_DEMONS, "over 4, weight 0.001", 8.159, None, "micro 0.01"),
)

# Perplexity by the step at which groups of 2 texts go over to 512 (the same paper, section 4):
# of 60 thousand steps or so, never done at all last.
SWITCHED = (("from the start", 7.199), ("10k", 7.283), ("30k", 7.297), ("50k", 7.322))
