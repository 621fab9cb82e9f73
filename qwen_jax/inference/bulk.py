"""Many prompts -> finished texts, in batches of similar length, in the order given."""

from collections.abc import Iterable, Sequence
from typing import Any

import tqdm

from qwen_jax.inference.checks import check_integer
from qwen_jax.inference.completion import Completion, complete
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.models.decoder import Decoder
from qwen_jax.text import Tokenizer


def complete_all(
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
) -> list[Completion]:
    """Completes each prompt; which others it runs with changes nothing but the rounding of sums.

    A batch that is not full is filled up with its last prompt, so that nothing is compiled for it.
    A progress bar is shown on a terminal.

    Args:
      model, params, tokenizer: as the package loads them.
      prompts: token ids, none empty.
      max_new_tokens, options, stop_ids, seed: as for `TokenStream`; a prompt's draws are of its
        place among all prompts.
      stop_strings: text that ends a row and is not part of it.
      batch_size: prompts that run together; 1 where lengths change frequencies.

    Raises:
      UserError: as `TokenStream`.
    """
    check_integer("batch_size", batch_size, 1)
    found: list[Completion | None] = [None] * len(prompts)
    # The longest row would set the frequencies of the whole batch.
    B = 1 if model.config.rope.depends_on_length else min(batch_size, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    bar = tqdm.tqdm(total=len(prompts), desc="writing", unit="text", disable=None)
    for start in range(0, len(prompts), max(B, 1)):
        numbers = order[start : start + B]
        rows = numbers + numbers[-1:] * (B - len(numbers))
        batch = [prompts[i] for i in rows]
        stream = TokenStream(
            model, params, batch, max_new_tokens, options, stop_ids, seed, first_row=rows
        )
        completions, _ = complete(stream, B, tokenizer, stop_strings)
        for i, completion in zip(numbers, completions, strict=False):
            found[i] = completion
        bar.update(len(numbers))
    bar.close()
    return found
