"""Texts of token ids -> vectors and scores: one pass each, nothing is generated.

Texts run in batches of similar length, padded on the right to one of few lengths, so that few
programs are compiled whatever the texts. A text's result depends neither on its neighbours nor on
the padding, up to the rounding of sums. A progress bar is shown on a terminal.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import HeadKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.inference.checks import check_head, check_integer
from qwen_jax.inference.decoding import read_ids
from qwen_jax.inference.padding import padded_batches
from qwen_jax.models.decoder import Decoder

Texts = Sequence[Sequence[int]]
Task = Literal["embed", "rerank", "reward", "step_reward", "classify", "guard"]
_What = Literal["pooled", "last", "all"]

_SCORING = (HeadKind.SCORE, HeadKind.SCORE_WITH_BIAS, HeadKind.TWO_LAYER_SCORE)

# How many labels a task needs, and what to do about another number.
_LABELS = {
    "reward": (1, "a reward is one; take a reward model"),
    "step_reward": (2, "step rewards are of two; take a process reward model"),
}


class NonfiniteScoresError(UserError):
    """A text whose scores are NaN or infinite.

    Attributes:
      index: of the text, from 0.
      reason: the message without the text's name.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(f"texts[{index}]: {reason}")
        self.index, self.reason = index, reason


def check_task(config: ModelConfig, task: Task, dimensions: int | None = None) -> None:
    """Refuses a model that is not for `task`; no weights are needed to tell.

    The functions below check what they need themselves.

    Args:
      config: of the model.
      task: "embed" is for any model, "reward" for one label, "classify" for any number of them.
      dimensions: as `embed` takes it.

    Raises:
      UserError: the head is another, it has other labels, or fewer dimensions than are asked for.
    """
    if dimensions is not None:
        check_integer("dimensions", dimensions, 1, config.hidden_size)
    if task == "rerank":
        check_head(config, (HeadKind.VOCABULARY,), "cannot answer yes or no; take a reranker")
    elif task == "guard":
        check_head(config, (HeadKind.GUARD,), "judges no risks; take a guard")
    elif task != "embed":
        advice = "has no such labels; take a classifier or a reward model"
        check_head(config, _SCORING, advice)
    if task in _LABELS:
        labels, advice = _LABELS[task]
        if config.num_labels != labels:
            plural = "" if config.num_labels == 1 else "s"
            raise UserError(f"the model has {config.num_labels} label{plural}, where {advice}")


def embed(
    model: Decoder,
    params: Any,
    texts: Texts,
    dimensions: int | None = None,
    batch_size: int = 8,
) -> np.ndarray:
    """The unit vector of each text: the last token's hidden state after the final norm.

    Shorter vectors are the beginnings of the long ones, brought to unit length again, as models
    trained with Matryoshka representations allow (arXiv 2205.13147).

    Args:
      model, params: as `load_pretrained` returns them, with any output head or none.
      texts: token ids, a row each, of any lengths, the token that is read included; see
        `text.scoring_prompts`.
      dimensions: of the vectors; None for all of hidden_size.
      batch_size: texts that run together.

    Returns:
      float32 [N, dimensions].

    Raises:
      UserError: an empty text, an id outside the vocabulary, more dimensions than there are, or
        vectors that are not numbers (a `NonfiniteScoresError`).
    """
    check_task(model.config, "embed", dimensions)
    rows = _run(model, params, texts, batch_size, "pooled")
    vectors = np.array([row[:dimensions] for row in rows], np.float32).reshape(
        len(rows), dimensions or model.config.hidden_size
    )
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    # The floor of the published code (torch's `normalize`).
    return vectors / np.maximum(length, 1e-12)


def head_scores(model: Decoder, params: Any, texts: Texts, batch_size: int = 8) -> np.ndarray:
    """What the scoring head says at the last token of each text, before any softmax.

    Sequence classifiers and reward models; the latter have one label, the reward. transformers
    takes the last token that is not the padding one, here it is the last one given: they differ
    where a text itself ends with the padding token.

    Args:
      model, params, texts, batch_size: as for `embed`, with a scoring head.

    Returns:
      float32 [N, labels].

    Raises:
      UserError: no scoring head, or as `embed`.
    """
    check_task(model.config, "classify")
    rows = _run(model, params, texts, batch_size, "last")
    return np.array(rows, np.float32).reshape(len(rows), model.config.num_labels)


def token_scores(
    model: Decoder, params: Any, texts: Texts, batch_size: int = 8
) -> list[np.ndarray]:
    """What the scoring head says at every token, before any softmax.

    Args:
      model, params, texts, batch_size: as for `head_scores`.

    Returns:
      float32 [tokens, labels] for each text.

    Raises:
      UserError: as `head_scores`.
    """
    check_task(model.config, "guard" if model.config.head is HeadKind.GUARD else "classify")
    return _run(model, params, texts, batch_size, "all")


def step_rewards(
    model: Decoder, params: Any, texts: Texts, step_id: int, batch_size: int = 8
) -> list[np.ndarray]:
    """The probability that each step of a solution is good (arXiv 2501.07301).

    That is the second of the head's two classes, at each token `step_id`.

    Args:
      model, params, texts, batch_size: as for `head_scores`, with two labels.
      step_id: of the token that ends a step; see `text.scoring_prompts`.

    Returns:
      float32 [steps] for each text, none where it has no such token.

    Raises:
      UserError: other than two labels, or as `head_scores`.
    """
    check_task(model.config, "step_reward")
    scores = token_scores(model, params, texts, batch_size)
    return [
        _second_of_two(row[np.asarray(text) == step_id])
        for row, text in zip(scores, texts, strict=True)
    ]


def rerank_scores(
    model: Decoder, params: Any, texts: Texts, no_id: int, yes_id: int, batch_size: int = 8
) -> np.ndarray:
    """The probability of "yes" against "no" as the token after each text.

    Args:
      model, params, batch_size: as for `embed`, with a vocabulary head.
      texts: token ids that ask whether a document answers a query; see `text.scoring_prompts`.
      no_id, yes_id: the tokens of the two answers.

    Returns:
      float32 [N], from 0 to 1.

    Raises:
      UserError: no vocabulary head, or as `embed`.
    """
    check_task(model.config, "rerank")
    answers = read_ids(model.config, "no_id and yes_id", [no_id, yes_id])
    rows = _run(model, params, texts, batch_size, "last", answers)
    return _second_of_two(np.array(rows, np.float32).reshape(len(rows), 2))


def _second_of_two(logits: np.ndarray) -> np.ndarray:
    """The second entry of the softmax over the last axis, of two."""
    margin = logits[..., 1].astype(np.float64) - logits[..., 0]
    return np.exp(-np.logaddexp(0, -margin)).astype(np.float32)


def _run(
    model: Decoder,
    params: Any,
    texts: Texts,
    batch_size: int,
    what: _What,
    columns: np.ndarray | None = None,
) -> list[np.ndarray]:
    """float32 [D] or [labels], or for "all" [tokens, labels], for each text in the order given."""
    config = model.config
    check_integer("batch_size", batch_size, 1)
    rows = [read_ids(config, f"texts[{i}]", text) for i, text in enumerate(texts)]
    results: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for batch in padded_batches(config, rows, batch_size):
        arrays = (batch.ids, batch.mask, batch.positions)
        read = np.asarray(_forward(model, params, *arrays, what, columns))
        for i, row in zip(batch.numbers, read, strict=False):
            results[i] = row[: len(rows[i])] if what == "all" else row[0]
            if not np.isfinite(results[i]).all():
                raise NonfiniteScoresError(i, not_numbers(params["embed_tokens"]["weight"].dtype))
    return results


def not_numbers(dtype: jnp.dtype) -> str:
    """What is wrong with scores that are NaN or infinite, and what to do."""
    wider = "" if dtype == jnp.float32 else ", or load it as float32"
    return f"its scores are NaN or infinite in {dtype}; download the checkpoint again{wider}"


@functools.partial(jax.jit, static_argnames=("model", "what"))
def _forward(model, params, ids, mask, positions, what: _What, columns) -> jax.Array:
    """float32 [B, P, D or labels]; P is 1, or the padded length."""
    logits_at = "all" if what == "all" else "last"
    out = model.apply({"params": params}, ids, mask, positions, logits_at=logits_at)
    if what == "pooled":
        last = mask.sum(axis=1) - 1
        x = jnp.take_along_axis(out.hidden_states[-1], last[:, None, None], axis=1)
        return x.astype(jnp.float32)
    return out.logits if columns is None else out.logits[..., columns]
