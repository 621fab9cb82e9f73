"""What lm-evaluation-harness asks of a model, answered: likelihoods, texts, chats.

Text becomes tokens, and is cut where it is too long, as the harness's own model class for
transformers does it.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.inference.bulk import complete_all
from qwen_jax.inference.likelihood import token_likelihoods
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import CacheDtype
from qwen_jax.text import StopStrings, Tokenizer
from qwen_jax.text.parsing import THINK_CLOSE

# What the harness takes for one and the same, the first that is given counting.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LIMIT = 256
_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingOptions))
# Values that change nothing; any other is not honoured.
_OFF = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}

# Behind a message that is to go on, so that its end is found in the template's text.
_MARK = "\N{WORD JOINER}goes on\N{WORD JOINER} "


@dataclasses.dataclass(frozen=True)
class Writing:
    """How one text is to be written.

    Attributes:
      options: how tokens are chosen.
      max_new_tokens: at most.
      stop_strings: text that ends it.
      stop_ids: tokens that end it, beside the model's own.
    """

    options: SamplingOptions
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    stop_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Respondent:
    """A model that answers the harness's requests.

    Attributes:
      model, params, tokenizer: as the package loads them.
      max_length: tokens of a text and what follows it at most; longer ones lose their beginnings.
      options: how tokens are chosen, but for the temperature, where a task does not say.
      stop_ids: tokens that end a text; None for the model's own.
      batch_size: texts that run together.
      seed: of the draws.
      enable_thinking: the chat template's; None for its default. With True, what is answered is
        what stands behind the thinking, and a task's stop strings hold there only.
      cache_dtype: of what is written; likelihoods need no cache.
    """

    model: Decoder
    params: Any
    tokenizer: Tokenizer
    max_length: int
    options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    stop_ids: tuple[int, ...] | None = None
    batch_size: int = 8
    seed: int = 0
    enable_thinking: bool | None = None
    cache_dtype: CacheDtype | None = None

    @property
    def prefix_id(self) -> int:
        """The token that stands before a text where nothing else does."""
        bos = self.tokenizer.config.named_tokens.get("bos_token")
        found = self.tokenizer.eos_token_id if bos is None else self.tokenizer.token_to_id(bos)
        if found is None:
            raise UserError(
                "the tokenizer names neither bos_token nor eos_token, one of which has to stand "
                "before texts without a context; name one in tokenizer_config.json"
            )
        return found

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Ids of a text, with what the tokenizer puts around every text unless told otherwise."""
        if add_special_tokens is None:
            add_special_tokens = not text.startswith(self.tokenizer.decode(self.prefix_id))
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Of contexts and what follows them, ids both: its log probability, and whether greedy.

        Raises:
          UserError: nothing follows, or more than the model reads at once.
        """
        texts, starts = [], []
        for context, following in pairs:
            if not 1 <= len(following) <= self.max_length:
                raise UserError(
                    f"a continuation of {len(following)} tokens cannot be scored: 1 to "
                    f"{self.max_length} are needed"
                )
            text = [*(context or [self.prefix_id]), *following][-(self.max_length + 1) :]
            texts.append(text)
            starts.append(len(text) - len(following))
        found = token_likelihoods(self.model, self.params, texts, starts, self.batch_size)
        return [(float(row.log_probs.sum()), bool(row.greedy.all())) for row in found]

    def texts(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What follows each context, written as the task's `generation_kwargs` say.

        Raises:
          UserError: a setting that is not honoured, or no room for a context.
        """
        groups = collections.defaultdict(list)
        for i, (_, settings) in enumerate(requests):
            groups[json.dumps(settings, sort_keys=True, default=repr)].append(i)
        found = [""] * len(requests)
        for rows in groups.values():
            writing = self.read_settings(requests[rows[0]][1])
            contexts = [requests[i][0] for i in rows]
            for i, text in zip(rows, self._write(contexts, writing), strict=True):
                found[i] = text
        return found

    def _write(self, contexts: Sequence[str], writing: Writing) -> list[str]:
        room = self.max_length - writing.max_new_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks = {writing.max_new_tokens} leaves no room for a context in "
                f"{self.max_length} tokens; give fewer, or a greater length"
            )
        prompts = [self.encode(text)[-room:] or [self.prefix_id] for text in contexts]
        own = self.model.config.eos_token_ids if self.stop_ids is None else self.stop_ids
        completions = complete_all(
            self.model,
            self.params,
            self.tokenizer,
            prompts,
            writing.max_new_tokens,
            options=writing.options,
            stop_ids=(*own, *writing.stop_ids),
            stop_strings=() if self.enable_thinking else writing.stop_strings,
            batch_size=self.batch_size,
            seed=self.seed,
            cache_dtype=self.cache_dtype,
        )
        if not self.enable_thinking:
            return [completion.text for completion in completions]
        return [
            _before_stop(completion.text.rpartition(THINK_CLOSE)[2].lstrip(), writing.stop_strings)
            for completion in completions
        ]

    def read_settings(self, settings: Mapping[str, Any]) -> Writing:
        """A task's `generation_kwargs`.

        Raises:
          UserError: a setting that is not honoured, by its name.
        """
        left = dict(settings)
        until = left.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        limits = [left.pop(name, None) for name in _LIMITS]
        limit = next((limit for limit in limits if limit is not None), _DEFAULT_LIMIT)
        do_sample = left.pop("do_sample", None)
        given = {name: left.pop(name) for name in _SAMPLING if left.get(name) is not None}
        for name, value in left.items():
            if value is not None and value != _OFF.get(name):
                raise UserError(
                    f"generation_kwargs: {name} = {value} is not supported; leave it out"
                )
        temperature = given.pop("temperature", 0.0)
        if do_sample and not temperature:
            raise UserError("generation_kwargs: do_sample = True needs a temperature above 0")
        if do_sample is False:
            temperature = 0.0
        options = dataclasses.replace(self.options, temperature=temperature, **given)
        special = self.tokenizer.special_tokens
        for text in until:
            if text not in special and any(token in text for token in special):
                raise UserError(
                    f"generation_kwargs: until = {text!r} has a control token in it, which no "
                    "text is found with; give the token alone"
                )
        stop_ids = [special[text] for text in until if text in special]
        if self.tokenizer.eos_token_id is not None:
            stop_ids.append(self.tokenizer.eos_token_id)
        strings = tuple(text for text in until if text and text not in special)
        return Writing(options, int(limit), strings, tuple(stop_ids))

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """A conversation in the model's format; without the prompt its last message goes on."""
        variables = {}
        if self.enable_thinking is not None:
            variables["enable_thinking"] = self.enable_thinking
        if not add_generation_prompt:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": last["content"] + _MARK}]
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False, **variables
        )
        if add_generation_prompt:
            return text
        text, _, behind = text.rpartition(_MARK.rstrip())
        # A template that trims the mark's space would have trimmed the message's too.
        return text if behind.startswith(" ") else text.rstrip()


def _before_stop(text: str, stops: Sequence[str]) -> str:
    search = StopStrings(stops)
    return search.push(text) + search.finish()
