"""Many prompts -> finished texts, rows of the cache taking one after another where they can."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tqdm

from qwen_jax.inference.checks import check_integer
from qwen_jax.inference.completion import Completion, ThinkingBudget, finished_texts
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.inference.slots import SlotStream, why_not_slots
from qwen_jax.models.decoder import Decoder
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
) -> Iterator[tuple[int, Completion]]:
    """Completes each prompt, and gives its place among them and its completion once it is finished.

    Which others a prompt runs with changes nothing but the rounding of sums. Rows take one prompt
    after another (`SlotStream`); on a mesh, and where the length of a text changes its frequencies,
    prompts of similar length run in batches, which are filled up with the last of them.

    Args:
      model, params, tokenizer: as the package loads them.
      prompts: token ids, none empty.
      max_new_tokens, options, stop_ids, seed: as for `TokenStream`.
      stop_strings: text that ends a row and is not part of it.
      batch_size: prompts that run together; 1 where lengths change frequencies.
      rows: the number of each prompt, which its draws are of; None for its place.
      thinking_limit: tokens after which reasoning is ended; None leaves it to the model.

    Raises:
      UserError: as `TokenStream`.
    """
    check_integer("batch_size", batch_size, 1)
    rows = range(len(prompts)) if rows is None else rows

    def budget(own: Sequence[int]) -> ThinkingBudget | None:
        if thinking_limit is None:
            return None
        return ThinkingBudget(thinking_limit, tokenizer, [prompts[i] for i in own])

    if why_not_slots(model) is None:
        stream = SlotStream(
            model, params, prompts, max_new_tokens, options, stop_ids, seed, rows, batch_size
        )
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
        stream = TokenStream(
            model,
            params,
            [prompts[i] for i in filled],
            max_new_tokens,
            options,
            stop_ids,
            seed,
            first_row=[rows[i] for i in filled],
        )
        for row, completion in finished_texts(
            stream, B, tokenizer, stop_strings, thinking_budget=budget(filled)
        ):
            if row < len(own):
                yield own[row], completion


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
