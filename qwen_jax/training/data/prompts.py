"""Prompts that a model is to answer, with what tells a right answer.

A record is `{"messages": [MESSAGES], ...}`, the last message not the assistant's; tools and
template variables as chats have them. Its other fields, such as `answer`, are for rewards.
"""

import functools
from collections.abc import Sequence

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.text import Tokenizer
from qwen_jax.training.data.form import Form, check_messages, check_not_prepared
from qwen_jax.training.data.options import DataOptions, SourceOptions
from qwen_jax.training.data.packing import BEGINS, Arrays
from qwen_jax.training.data.records import Record, Records, open_records
from qwen_jax.training.data.tokenise import parsed, template_variables


class PromptSource:
    """The prompts of a source, as rows [length].

    Attributes:
      source: that they are of.
    """

    def __init__(
        self, source: SourceOptions, tokenizer: Tokenizer, options: DataOptions, *, room: int
    ):
        """Opens the source.

        Args:
          source: that is read.
          tokenizer: of the checkpoint.
          options: of the run.
          room: tokens of a row that are left for the answer.

        Raises:
          UserError: it cannot be read, or asks for what prompts do not have.
        """
        _check(source)
        if options.length <= room:
            raise UserError(
                f"length = {options.length} leaves no room for a prompt beside the answer's "
                f"{room} tokens (max_new_tokens); raise it"
            )
        self.source = source
        # Which of the sources, so that the record is found again.
        self._number = options.sources.index(source)
        self._tokenizer, self._length, self._most = tokenizer, options.length, options.length - room
        self._records = open_records(source)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Arrays:
        """int32 `input_ids`, bool `attention_mask`, float32 `loss_weights`, all 0, uint8 `marks`.

        And int32 [2] `place`, for `PromptRecords`.

        Raises:
          UserError: the record is broken or too long; names FILE:LINE.
        """
        record = self._records[index]
        ids = tokenise_prompt(record, self._tokenizer, self.source)
        if len(ids) > self._most:
            raise UserError(
                f"{record.name}: has {len(ids)} tokens, and {self._most} of the row's "
                f"{self._length} are for prompts; raise length, or leave the record out"
            )
        marks = np.zeros(self._length, np.uint8)
        marks[0] = BEGINS
        return {
            "input_ids": np.pad(np.asarray(ids, np.int32), (0, self._length - len(ids))),
            "attention_mask": np.arange(self._length) < len(ids),
            "loss_weights": np.zeros(self._length, np.float32),
            "marks": marks,
            "place": np.array([self._number, index], np.int32),
        }


class PromptRecords:
    """The records behind the rows of a run's prompts, by their `place`."""

    def __init__(self, options: DataOptions):
        """Opens all sources.

        Raises:
          UserError: one cannot be read.
        """
        for source in options.sources:
            _check(source)
        self._sources: list[Records] = [
            open_records(source, whole=True) for source in options.sources
        ]

    def __getitem__(self, place: Sequence[int]) -> Record:
        number, index = map(int, place)
        return self._sources[number][index]


def prompts_form(group_size: int, room: int) -> Form:
    """Prompts of which each takes `group_size` rows of a batch, with `room` tokens for answers."""
    return Form(
        functools.partial(PromptSource, room=room),
        group_size,
        "each answer to a prompt has a row",
        f"a prompt's answers take {group_size}",
    )


def tokenise_prompt(record: Record, tokenizer: Tokenizer, source: SourceOptions) -> list[int]:
    """The tokens of a conversation up to where the assistant goes on.

    Raises:
      UserError: the record cannot be read so; names FILE:LINE and the field.
    """
    try:
        messages = parsed(record.fields, source.messages_field)
        check_messages(source.messages_field, messages)
        if messages[-1]["role"] == "assistant":
            raise UserError(
                f"{source.messages_field} ends with the assistant; leave out the answer, which "
                "the model is to find"
            )
        tools = parsed(record.fields, source.tools_field)
        return tokenizer.apply_chat_template(
            messages,
            tools or None,
            add_generation_prompt=True,
            allow_special=False,
            **template_variables(record),
        )
    except UserError as error:
        raise UserError(f"{record.name}: {error}") from None


def _check(source: SourceOptions) -> None:
    check_not_prepared(source, "prompts")
    if source.too_long not in (None, "refuse"):
        raise UserError(
            f"{source.path}: too_long = {source.too_long} would ask something else; leave it out, "
            "and raise length or leave long prompts out"
        )
