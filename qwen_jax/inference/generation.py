"""Prompts of token ids -> new token ids, all at once."""

from collections.abc import Iterable, Sequence
from typing import Any

from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.drafting import Drafter
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.inference.speculation import SpeculativeStream
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import CacheDtype


def generate(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
    cache_dtype: CacheDtype | None = None,
    speculate: Drafter | None = None,
) -> list[list[int]]:
    """New token ids for each prompt, its stop id included where it met one.

    Args:
      model, params: as `load_pretrained` returns them.
      prompts: token ids, a row each, of any lengths.
      max_new_tokens: of each row.
      temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty:
        see `SamplingOptions`.
      seed: of the draws.
      stop_ids: ids that end a row; None takes the model's `eos_token_ids`.
      cache_dtype: "int8" keeps keys and values so, in less memory; None as they are computed.
      speculate: guesses tokens that the model then verifies several at a time, see
        `inference.drafting`; None for one token a pass.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, an option outside its range, a
        drafter that cannot draft for the model.
    """
    options = SamplingOptions(
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty
    )
    rows: list[list[int]] = [[] for _ in prompts]
    if not rows:
        return rows
    arguments = model, params, prompts, max_new_tokens
    if speculate is None:
        stream = TokenStream(*arguments, options, stop_ids, seed, cache_dtype=cache_dtype)
    else:
        stream = SpeculativeStream(
            *arguments, speculate, options, stop_ids, seed, cache_dtype=cache_dtype
        )
    for step in stream:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows
