"""A record -> token ids, and which of them are learned."""

import dataclasses
import json
from typing import Any, Literal

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.json_fields import shown
from qwen_jax.text import Tokenizer
from qwen_jax.training.data.chat_mask import learned_tokens
from qwen_jax.training.data.lines import END_OF_TEXT
from qwen_jax.training.data.options import SourceOptions, TokenOptions
from qwen_jax.training.data.records import Record, Records, open_records

Kind = Literal["text", "chat"]


@dataclasses.dataclass(frozen=True)
class Example:
    """A record's tokens.

    Attributes:
      name: of the record, FILE:LINE.
      ids: int32 [n].
      learned: bool [n], whether each is learned, as what the tokens before it predict.
    """

    name: str
    ids: np.ndarray
    learned: np.ndarray


def kind_of(record: Record, source: SourceOptions) -> Kind:
    """Whether a record holds a text or a chat.

    Raises:
      UserError: it holds neither, or both.
    """
    text = record.fields.get(source.text_field) is not None
    chat = record.fields.get(source.messages_field) is not None
    if text and chat:
        raise UserError(
            f"{record.name}: has both {source.text_field} and {source.messages_field}; name the "
            "other field as text_field or messages_field to read one of them"
        )
    if not text and not chat:
        found = ", ".join(record.fields) or "no fields"
        raise UserError(
            f"{record.name}: has neither {source.text_field} nor {source.messages_field}, it has "
            f"{found}"
        )
    return "text" if text else "chat"


def open_examples(
    source: SourceOptions, tokenizer: Tokenizer, options: TokenOptions
) -> tuple[Records, Kind]:
    """The records of a source for `tokenise`, and their kind, which is the first one's.

    Raises:
      UserError: they cannot be read, are neither texts nor chats, or texts have no token that ends
        them.
    """
    records = open_records(source)
    kind = kind_of(records[0], source)
    if kind == "text":
        end_of_text_id(tokenizer, options)
    return records, kind


def tokenise(
    record: Record, kind: Kind, tokenizer: Tokenizer, source: SourceOptions, options: TokenOptions
) -> Example:
    """The tokens of a record.

    Fields other than the text, the messages, the tools, `enable_thinking` and
    `chat_template_kwargs` are not read.

    Args:
      record: to read.
      kind: of all the source's records.
      tokenizer: of the checkpoint that is trained.
      source: what the fields are called.
      options: what is learned.

    Raises:
      UserError: the record is of another kind, or cannot be read so; names FILE:LINE.
    """
    if (found := kind_of(record, source)) != kind:
        raise UserError(
            f"{record.name}: is a {found}, the source's first record is a {kind}; put them into "
            "two sources"
        )
    try:
        if kind == "text":
            return _text(record, tokenizer, source, options)
        return _chat(record, tokenizer, source, options)
    except UserError as error:
        raise UserError(f"{record.name}: {error}") from None


def end_of_text_id(tokenizer: Tokenizer, options: TokenOptions) -> int | None:
    """The token behind each text, None for none.

    Raises:
      UserError: the tokenizer has no token of that name, or none that ends a text.
    """
    if options.end_of_text == "":
        return None
    if options.end_of_text is not None:
        found = tokenizer.added_tokens.get(options.end_of_text)
        if found is None:
            raise UserError(f"end_of_text = {options.end_of_text} is no token of the tokenizer")
        return found
    found = tokenizer.added_tokens.get(END_OF_TEXT, tokenizer.eos_token_id)
    if found is None:
        raise UserError(
            f"the tokenizer has neither {END_OF_TEXT} nor an eos_token; name the token that ends a "
            'text as end_of_text, or "" for none'
        )
    return found


def _text(
    record: Record, tokenizer: Tokenizer, source: SourceOptions, options: TokenOptions
) -> Example:
    text = record.fields[source.text_field]
    if not isinstance(text, str):
        raise UserError(f"{source.text_field} = {shown_value(text)} should be a string")
    ids = tokenizer.encode(text, allow_special=options.allow_special)
    end = end_of_text_id(tokenizer, options)
    ids += [] if end is None else [end]
    if not ids:
        raise UserError(f"{source.text_field} is empty; leave the record out")
    return Example(record.name, np.array(ids, np.int32), np.ones(len(ids), bool))


def _chat(
    record: Record, tokenizer: Tokenizer, source: SourceOptions, options: TokenOptions
) -> Example:
    messages = parsed(record.fields, source.messages_field)
    return tokenise_chat(record, messages, tokenizer, source, options)


def tokenise_chat(
    record: Record,
    messages: Any,
    tokenizer: Tokenizer,
    source: SourceOptions,
    options: TokenOptions,
    given: int = 0,
) -> Example:
    """The tokens of a conversation, with the tools and template variables of a record.

    Args:
      record: of which tools and variables are.
      messages: of the conversation; the first `given` of them are a prompt, which is not learned.
      tokenizer: of the checkpoint that is trained.
      source: what the fields are called.
      options: what is learned.

    Raises:
      UserError: fields or messages that cannot be read so.
    """
    tools = parsed(record.fields, source.tools_field)
    variables = template_variables(record)
    ids = tokenizer.apply_chat_template(messages, tools or None, allow_special=False, **variables)
    learned = learned_tokens(ids, messages, tokenizer, options, given)
    return Example(record.name, np.array(ids, np.int32), learned)


def template_variables(record: Record) -> dict[str, Any]:
    """What a record gives its template beside messages and tools.

    Raises:
      UserError: fields that cannot be read so, or that a record cannot set.
    """
    variables = record.fields.get("chat_template_kwargs")
    if variables is None:
        variables = {}
    if not isinstance(variables, dict) or not all(isinstance(key, str) for key in variables):
        raise UserError(f"chat_template_kwargs = {shown_value(variables)} should be an object")
    if record.fields.get("enable_thinking") is not None:
        variables = {**variables, "enable_thinking": record.fields["enable_thinking"]}
    for name in ("add_generation_prompt", "tokenize", "allow_special", "messages", "tools"):
        if name in variables:
            raise UserError(f"chat_template_kwargs: {name} cannot be set here; leave it out")
    return variables


def parsed(fields: dict[str, Any], name: str) -> Any:
    """A field that may be JSON within a string, as tables keep what has no fixed columns."""
    value = fields.get(name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is a string that is not JSON ({error})") from None


def shown_value(value: Any) -> str:
    """A field's value as errors show it."""
    try:
        return shown(value)
    except TypeError:  # Bytes, dates and others that parquet has.
        return f"a {type(value).__name__}"
