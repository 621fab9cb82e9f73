"""A chat that keeps its cache between turns."""

from collections.abc import Callable, Sequence
from typing import Any

from qwen_jax.inference.completion import (
    Completion,
    ThinkingBudget,
    Timing,
    complete,
    ends_inside_reasoning,
)
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import Cache, CacheDtype, check_cache_dtype, rewind_cache
from qwen_jax.nn.rope import inverse_frequencies
from qwen_jax.text import Tokenizer
from qwen_jax.text.parsing import THINK_CLOSE, parse_reply


class Conversation:
    """A growing list of messages and the cache of the tokens that they became.

    Each turn renders the whole conversation, since templates rewrite the past (Qwen3 drops old
    reasoning), and runs only the tokens after what the cache already holds. It starts anew where
    the cache cannot be taken back to where the two part, or where the longer prompt has other
    rotary frequencies.

    Attributes:
      messages: system, user and assistant messages so far; reasoning stands apart from content, as
        `reasoning_content`.
    """

    def __init__(
        self,
        model: Decoder,
        params: Any,
        tokenizer: Tokenizer,
        system: str | None = None,
        allow_special: bool = False,
        max_window_size: int | None = None,
        cache_dtype: CacheDtype | None = None,
        **template_variables: Any,
    ):
        """Starts an empty conversation.

        Args:
          model, params, tokenizer: of one checkpoint.
          system: the system message; None leaves it to the template.
          allow_special: whether control tokens that a user types become control ids.
          max_window_size: tokens that the messages before the user's newest stay below, the oldest
            turns left out of the prompt for it, as generation_config.json has it; None for all.
          cache_dtype: as for `TokenStream`.
          **template_variables: for the chat template, such as `enable_thinking`.
        """
        self._model, self._params, self._tokenizer = model, params, tokenizer
        check_cache_dtype(cache_dtype)
        self._cache_dtype = cache_dtype
        self._allow_special = allow_special
        self._max_window_size = max_window_size
        self._template_variables = template_variables
        self._cache: Cache | None = None
        self._cached_ids: list[int] = []
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def prompt_ids(self, user: str) -> list[int]:
        """Ids of the conversation with one more user message and the assistant's turn open."""
        return self._render([*self._in_window(), {"role": "user", "content": user}], open_turn=True)

    def reply(
        self,
        user: str,
        max_new_tokens: int,
        options: SamplingOptions | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        seed: int = 0,
        on_text: Callable[[str], None] = lambda text: None,
        thinking_budget: int | None = None,
    ) -> tuple[Completion, Timing]:
        """The assistant's answer to `user`; both are added to `messages` when it is complete.

        An interrupt leaves the conversation as it was before the turn.

        Args:
          user: what the user says.
          max_new_tokens, options, stop_ids: as for `TokenStream`.
          seed: of the draws; each turn draws anew from the same seed.
          stop_strings: text that ends the answer.
          on_text: gets new text as soon as it is final.
          thinking_budget: reasoning tokens after which the answer is asked for; None for no limit.
        """
        ids = self.prompt_ids(user)
        budget = (
            None
            if thinking_budget is None
            else ThinkingBudget(thinking_budget, self._tokenizer, [ids])
        )
        cache, kept = self._cache, self._reusable(ids)
        if kept < len(self._cached_ids):
            cache = rewind_cache(cache, kept) if kept else None
        # Until the answer is complete there is no cache to go back to: this one is donated.
        self._cache, self._cached_ids = None, []
        stream = TokenStream(
            self._model,
            self._params,
            [ids[kept:]],
            max_new_tokens,
            options,
            stop_ids,
            seed,
            cache,
            first_row=len(self.messages),
            cache_dtype=self._cache_dtype,
        )
        (answer,), timing = complete(
            stream, 1, self._tokenizer, stop_strings, lambda _, text: on_text(text), budget
        )
        self._cache = stream.cache
        # The last token was chosen but never run.
        self._cached_ids = (ids + answer.ids)[:-1]
        self.messages += [
            {"role": "user", "content": user},
            _assistant_message(answer.text, ends_inside_reasoning(self._tokenizer, ids)),
        ]
        return answer, timing

    def _reusable(self, ids: list[int]) -> int:
        """How many tokens of the cache the prompt `ids` can go on from."""
        if self._cache is None:
            return 0
        # The last token always runs: its logits choose the first new one.
        kept = min(_common_prefix(self._cached_ids, ids), len(ids) - 1)
        if kept < len(self._cached_ids) and not self._cache.can_rewind:
            return 0
        config, made_for = self._model.config, int(self._cache.frequencies_for[0])
        if config.rope.depends_on_prompt:
            made, wanted = (
                inverse_frequencies(config.rope, config.rotary_dim, n) for n in (made_for, len(ids))
            )
            return kept if (made == wanted).all() else 0
        return kept

    def _render(self, messages: list[dict[str, str]], open_turn: bool) -> list[int]:
        return self._tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=open_turn,
            allow_special=self._allow_special,
            **self._template_variables,
        )

    def _in_window(self) -> list[dict[str, str]]:
        """The system's message and the latest turns that leave the window some room."""
        if self._max_window_size is None:
            return self.messages
        has_system = bool(self.messages) and self.messages[0]["role"] == "system"
        system, turns = self.messages[:has_system], self.messages[has_system:]
        first = len(turns)
        while first >= 2:
            tokens = self._render([*system, *turns[first - 2 :]], open_turn=False)
            # The line end behind the last turn does not count.
            if len(tokens) - 1 >= self._max_window_size:
                break
            first -= 2
        return [*system, *turns[first:]]


def _assistant_message(text: str, thinking_open: bool) -> dict[str, str]:
    """The message that templates write the answer back from: tool calls stay in its content."""
    reasoning = parse_reply(text, thinking_open).reasoning
    if reasoning is None:
        return {"role": "assistant", "content": text}
    _, _, content = text.partition(THINK_CLOSE)
    message = {"role": "assistant", "content": content.lstrip("\n")}
    return {**message, "reasoning_content": reasoning}


def _common_prefix(a: list[int], b: list[int]) -> int:
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))
