"""Many prompts -> finished texts, rows of the cache taking one after another where they can."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tqdm

from qwen_jax.inference.checks import check_integer
from qwen_jax.inference.completion import Completion, ThinkingBudget, finished_texts
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.drafting import Drafter
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.inference.slots import SlotStream, why_not_slots
from qwen_jax.inference.speculation import Counts, SpeculativeStream
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import CacheDtype
from qwen_jax.text import Tokenizer


def completions(
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    options: SamplingOptions | None = None,
    stop_ids: Iterable[int] | None = None,
    stop_strings: Sequence[str] = (),
    batch_size: int = 8,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    thinking_limit: int | None = None,
    cache_dtype: CacheDtype | None = None,
    speculate: Drafter | None = None,
    on_counts: Callable[[Counts], None] = lambda counts: None,
) -> Iterator[tuple[int, Completion]]:
    """Completes each prompt, and gives its place among them and its completion once it is finished.

    Which others a prompt runs with changes nothing but the rounding of sums. Rows take one prompt
    after another (`SlotStream`); on a mesh, where the length of a text changes its frequencies, and
    with a drafter, prompts of similar length run in batches, which are filled up with the last of
    them.

    Args:
      model, params, tokenizer: as the package loads them.
      prompts: token ids, none empty.
      max_new_tokens, options, stop_ids, seed: as for `TokenStream`.
      stop_strings: text that ends a row and is not part of it.
      batch_size: prompts that run together; 1 where lengths change frequencies.
      rows: the number of each prompt, which its draws are of; None for its place.
      thinking_limit: tokens after which reasoning is ended; None leaves it to the model.
      cache_dtype: as for `TokenStream`.
      speculate: guesses tokens that are then verified several at a time; None for one a pass.
      on_counts: gets what speculation has brought in each batch when it has ended.

    Raises:
      UserError: as `TokenStream`, or as `SpeculativeStream`.
    """
    check_integer("batch_size", batch_size, 1)
    rows = range(len(prompts)) if rows is None else rows

    def budget(own: Sequence[int]) -> ThinkingBudget | None:
        if thinking_limit is None:
            return None
        return ThinkingBudget(thinking_limit, tokenizer, [prompts[i] for i in own])

    if speculate is None and why_not_slots(model) is None:
        stream = SlotStream(
            model, params, prompts, max_new_tokens, options, stop_ids, seed, rows, batch_size,
            cache_dtype,
        )  # fmt: skip
        own = range(len(prompts))
        yield from finished_texts(
            stream, len(own), tokenizer, stop_strings, thinking_budget=budget(own)
        )
        return
    # The longest row would set the frequencies of the whole batch.
    B = 1 if model.config.rope.depends_on_length else min(batch_size, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), max(B, 1)):
        own = order[start : start + B]
        filled = own + own[-1:] * (B - len(own))
        asked, numbers = [prompts[i] for i in filled], [rows[i] for i in filled]
        arguments = model, params, asked, max_new_tokens
        if speculate is None:
            stream = TokenStream(
                *arguments, options, stop_ids, seed, first_row=numbers, cache_dtype=cache_dtype
            )
        else:
            stream = SpeculativeStream(
                *arguments, speculate, options, stop_ids, seed, numbers, cache_dtype
            )
            # They are not to be counted.
            for row in range(len(own), B):
                stream.stop(row)
        for row, completion in finished_texts(
            stream, B, tokenizer, stop_strings, thinking_budget=budget(filled)
        ):
            if row < len(own):
                yield own[row], completion
        if speculate is not None:
            on_counts(stream.counts)


def complete_all(
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    **options: Any,
) -> list[Completion]:
    """The completions of all prompts in their order, with a progress bar on a terminal.

    Arguments as for `completions`.
    """
    found: list[Completion | None] = [None] * len(prompts)
    bar = tqdm.tqdm(total=len(prompts), desc="writing", unit="text", disable=None)
    for i, completion in completions(model, params, tokenizer, prompts, max_new_tokens, **options):
        found[i] = completion
        bar.update(1)
    bar.close()
    return found
