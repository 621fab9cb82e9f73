"""Pairs of answers to one prompt, the better one first, as two rows of one length.

A record is `{"prompt": [MESSAGES], "chosen": ANSWER, "rejected": ANSWER}`; an answer is a message
of the assistant, or a list of messages that begins with one. Tools and template variables as chats
have them. What a chat would learn of an answer counts, and nothing of the prompt.
"""

import dataclasses
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.text import Tokenizer
from qwen_jax.training.data.form import Form, check_messages, check_not_prepared
from qwen_jax.training.data.options import DataOptions, SourceOptions, TokenOptions
from qwen_jax.training.data.packing import BEGINS, TRUNCATED, Arrays, finish, fit, padded
from qwen_jax.training.data.records import PAIR_FIELDS, Record, open_records
from qwen_jax.training.data.tokenise import Example, parsed, shown_value, tokenise_chat


class PairSource:
    """The pairs of a source, as rows [2, length] of what training takes.

    Attributes:
      source: that they are of.
    """

    def __init__(self, source: SourceOptions, tokenizer: Tokenizer, options: DataOptions):
        """Opens the source.

        Raises:
          UserError: it cannot be read, or asks for what pairs do not have.
        """
        check_not_prepared(source, "pairs")
        if source.too_long == "cut":
            raise UserError(
                f"{source.path}: too_long = cut would tear an answer from its prompt; set it to "
                "truncate or refuse"
            )
        self.source = source
        self._tokenizer, self._options = tokenizer, options
        self._records = open_records(source, pairs=True)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Arrays:
        """int32 `input_ids`, bool `attention_mask`, float32 `loss_weights` and uint8 `marks`.

        Raises:
          UserError: the record is broken or too long; names FILE:LINE.
        """
        record, length = self._records[index], self._options.length
        pair = tokenise_pair(record, self._tokenizer, self.source, self._options.tokens)
        rows = []
        for example in pair:
            short = fit(example, length, self.source.too_long or "refuse")
            row = finish(padded(short, length))
            if not row["loss_weights"].any():
                raise UserError(
                    f"{example.name}: nothing is left of the answer in {length} tokens; raise "
                    "length, or leave the record out"
                )
            rows.append(row)
        names = ("input_ids", "attention_mask", "loss_weights", "marks")
        both = {name: np.stack([row[name] for row in rows]) for name in names}
        # The two are one record, whichever was cut short.
        begins = both["marks"][:, 0]
        begins[0] |= begins[1] & TRUNCATED
        begins[1] &= ~np.uint8(BEGINS | TRUNCATED)
        return both


PAIRS = Form(PairSource, 2, "pairs of answers have a row for each answer", "a pair takes two")


def tokenise_pair(
    record: Record, tokenizer: Tokenizer, source: SourceOptions, options: TokenOptions
) -> tuple[Example, Example]:
    """The tokens of a prompt with the chosen answer, and with the rejected one.

    Raises:
      UserError: the record cannot be read so; names FILE:LINE and the field.
    """
    try:
        prompt, *answers = (_field(record, name) for name in PAIR_FIELDS)
        check_messages("prompt", prompt)
        return tuple(
            _answered(record, name, prompt, answer, tokenizer, source, options)
            for name, answer in zip(PAIR_FIELDS[1:], answers, strict=True)
        )
    except UserError as error:
        raise UserError(f"{record.name}: {error}") from None


def _field(record: Record, name: str) -> Any:
    """A field, of which tables may keep the JSON in a string."""
    value = record.fields.get(name)
    is_json = isinstance(value, str) and value.lstrip()[:1] in ("[", "{")
    return parsed(record.fields, name) if is_json else value


def _answered(
    record: Record,
    name: str,
    prompt: list[Any],
    answer: Any,
    tokenizer: Tokenizer,
    source: SourceOptions,
    options: TokenOptions,
) -> Example:
    answer = [answer] if isinstance(answer, dict) else answer
    check_messages(name, answer)
    if answer[0]["role"] != "assistant":
        raise UserError(
            f"{name} begins with a message of {shown_value(answer[0]['role'])}; give the "
            "assistant's answer alone, without the prompt"
        )
    try:
        example = tokenise_chat(
            record, [*prompt, *answer], tokenizer, source, options, given=len(prompt)
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return dataclasses.replace(example, name=f"{example.name}: {name}")
