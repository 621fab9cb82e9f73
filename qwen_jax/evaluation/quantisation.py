"""How far quantising a checkpoint has moved what it predicts."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.evaluation.language_model import check_language_model
from qwen_jax.pretrained import Weights, load_pretrained, load_tokenizer

# Prose, numbers, code and another script, so that no one kind of token decides.
TEXT = """\
The river rises in the hills above the town, where snow lies until the end of April, and runs for
about 240 kilometres before it meets the sea. Two weirs and a mill were built on it in 1783; the
mill ground barley and oats until the railway came, and then stood empty for sixty years. "Nobody
wanted it," said the woman who runs the museum there now, "so nobody pulled it down either."

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

河水从山上流下来。它经过小镇和两座石桥。最后流入大海。春天的时候孩子们在桥边等着看第一批回来的燕子。

If a train leaves at 9:40 and travels 150 kilometres at 60 kilometres an hour, it arrives at 12:10.
Water boils at 100 degrees at sea level, but at 2,000 metres it boils at about 93, which is why
potatoes take longer to cook in the mountains.
"""


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How two models differ on the same tokens.

    Attributes:
      mean_kl: KL(original || quantised) of the next token's distribution, in nats a token.
      top1_agreement: fraction of positions whose likeliest next token is the same.
      num_tokens: how many positions.
      is_text: whether the tokens are those of a text, else random ones.
    """

    mean_kl: float
    top1_agreement: float
    num_tokens: int
    is_text: bool


def measure_divergence(original: Path, quantised: Path) -> Divergence:
    """Runs the tokens of `TEXT` through a checkpoint and its quantised copy, in float32.

    They run one after the other, on as many tokens as the model has positions for. Without a
    tokenizer in `original` the tokens are 256 random ones, the same in every call.

    Raises:
      UserError: one of them is not a language model, or whatever else is wrong with it.
    """
    for directory in (original, quantised):
        check_language_model(directory, "are what is compared")
    ids = _token_ids(original)
    expected = _log_probabilities(original, ids, "dense")
    found = _log_probabilities(quantised, ids, "packed")
    # Row by row, since all rows in float64 would be the largest thing in memory.
    kl = [
        np.sum(np.exp(p, dtype=np.float64) * (p.astype(np.float64) - q))
        for p, q in zip(expected, found, strict=True)
    ]
    agreement = np.mean(expected.argmax(-1) == found.argmax(-1))
    return Divergence(float(np.mean(kl)), float(agreement), len(kl), ids is not None)


def _token_ids(directory: Path) -> list[int] | None:
    try:
        return load_tokenizer(directory).encode(TEXT)
    except UserError:
        return None


def _log_probabilities(directory: Path, ids: list[int] | None, weights: Weights) -> np.ndarray:
    """float32 [T, V]."""
    model, params = load_pretrained(directory, dtype="float32", weights=weights)
    if ids is None:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 256)
    ids = np.asarray(ids)[: model.config.max_position_embeddings]
    logits = model.apply({"params": params}, ids[None]).logits[0]
    return np.asarray(jax.nn.log_softmax(logits))
