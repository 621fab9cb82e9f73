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
import tqdm

from qwen_jax.config import HeadKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.inference.decoding import bucket, read_ids
from qwen_jax.models.decoder import Decoder, warn_if_longer

Texts = Sequence[Sequence[int]]
_What = Literal["pooled", "last", "all"]

_SCORING = (HeadKind.SCORE, HeadKind.SCORE_WITH_BIAS, HeadKind.TWO_LAYER_SCORE)


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
        vectors that are not numbers.
    """
    D = model.config.hidden_size
    if dimensions is not None and not 1 <= dimensions <= D:
        raise UserError(f"dimensions = {dimensions} should be from 1 to hidden_size = {D}")
    rows = _run(model, params, texts, batch_size, "pooled")
    vectors = np.array([row[:dimensions] for row in rows], np.float32).reshape(
        len(rows), dimensions or D
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
    _check_head(model.config, _SCORING)
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
    _check_head(model.config, _SCORING)
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
    if model.config.num_labels != 2:
        raise UserError(
            f"the model has {model.config.num_labels} labels, where step rewards need two; take a "
            "process reward model"
        )
    scores = token_scores(model, params, texts, batch_size)
    return [
        _second_of_two(row[np.asarray(text) == step_id])
        for row, text in zip(scores, texts, strict=True)
    ]


def rerank_scores(
    model: Decoder, params: Any, prompts: Texts, no_id: int, yes_id: int, batch_size: int = 8
) -> np.ndarray:
    """The probability of "yes" against "no" as the token after each prompt.

    Args:
      model, params, batch_size: as for `embed`, with a vocabulary head.
      prompts: token ids that ask whether a document answers a query; see
        `text.scoring_prompts`.
      no_id, yes_id: the tokens of the two answers.

    Returns:
      float32 [N], from 0 to 1.

    Raises:
      UserError: no vocabulary head, or as `embed`.
    """
    _check_head(model.config, (HeadKind.VOCABULARY,))
    answers = read_ids(model.config, "no_id and yes_id", [no_id, yes_id])
    rows = _run(model, params, prompts, batch_size, "last", answers)
    return _second_of_two(np.array(rows, np.float32).reshape(len(rows), 2))


def _check_head(config: ModelConfig, wanted: tuple[HeadKind, ...]) -> None:
    if config.head not in wanted:
        kinds = ", ".join(kind.value for kind in wanted)
        raise UserError(
            f"the model's head is {config.head.value}, where this needs one of: {kinds}; see "
            "architectures in config.json"
        )


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
    rows = [read_ids(config, f"text {i}", text) for i, text in enumerate(texts)]
    if not rows:
        return []
    warn_if_longer(config, max(map(len, rows)))
    if config.rope.depends_on_length:
        # The longest row would set the frequencies of the whole batch.
        batch_size = 1
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    starts = range(0, len(rows), batch_size)
    results: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for start in tqdm.tqdm(starts, "scoring", unit="batch", disable=None):
        batch = order[start : start + batch_size]
        lengths = np.array([len(rows[i]) for i in batch])
        at = np.arange(bucket(int(lengths.max())))
        mask = at < lengths[:, None]
        ids = np.zeros(mask.shape, np.int32)
        ids[mask] = np.concatenate([rows[i] for i in batch])
        read = _forward(model, params, ids, mask, np.where(mask, at, 0), what, columns)
        for i, row in zip(batch, np.asarray(read), strict=True):
            results[i] = row[: len(rows[i])] if what == "all" else row[0]
            if not np.isfinite(results[i]).all():
                raise UserError(
                    f"text {i}: its scores are NaN or infinite in {_dtype(params)}; download the "
                    "checkpoint again, or load it in a wider dtype"
                )
    return results


def _dtype(params: Any) -> jnp.dtype:
    return params["embed_tokens"]["weight"].dtype


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
