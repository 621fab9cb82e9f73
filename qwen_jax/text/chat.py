"""Conversations as text and as ids, through the chat template of a checkpoint."""

import dataclasses
import datetime
import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from qwen_jax.errors import UserError
from qwen_jax.json_fields import read_json_object, shown
from qwen_jax.text import control_tokens, template_engine
from qwen_jax.text.control_tokens import Breaker, Marks
from qwen_jax.text.template_engine import Template
from qwen_jax.text.tokenizer_config import (
    AddedToken,
    TokenizerConfig,
    read_text,
)

# Qwen1 has no template file; this is what its `make_context` writes, system prompt included.
CHATML = Template(
    source="""\
{%- if tools %}
    {{- raise_exception('this checkpoint has no template for tools') }}
{%- endif %}
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is not defined %}
        {{- raise_exception('each message needs content') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    name="built-in ChatML",
)

# Names that clients give a model's reasoning; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MAX_NESTING = 200


@dataclasses.dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of one checkpoint by name; empty where it has none."""

    by_name: Mapping[str, Template]

    def choose(self, tools: Sequence | None) -> Template:
        """The template for a conversation: "tool_use" if there are tools and it exists.

        Raises:
          UserError: the checkpoint has several templates and none named "default".
        """
        if tools is not None and "tool_use" in self.by_name:
            return self.by_name["tool_use"]
        if not self.by_name:
            return CHATML
        if "default" in self.by_name:
            return self.by_name["default"]
        first = next(iter(self.by_name.values()))
        raise UserError(
            f"{first.name}: chat templates {sorted(self.by_name)} but none named 'default';"
            " add chat_template.jinja"
        )


def read_chat_templates(directory: Path, config: TokenizerConfig) -> ChatTemplates:
    """The templates of a checkpoint, from the first of these that has any.

    chat_template.jinja with additional_chat_templates/*.jinja, then `chat_template` in
    tokenizer_config.json (text, or a list of {name, template}), then chat_template.json.

    Raises:
      UserError: a file can't be read, or the field has another form.
    """
    found: dict[str, Template] = {}
    path = directory / "chat_template.jinja"
    if path.is_file():
        found["default"] = Template(_template_text(path), str(path))
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[extra.name.removesuffix(".jinja")] = Template(_template_text(extra), str(extra))
    if found:
        return ChatTemplates(found)

    path = directory / "tokenizer_config.json"
    value = config.fields.get("chat_template")
    if value is None:
        path = directory / "chat_template.json"
        value = read_json_object(path).get("chat_template") if path.is_file() else None
    name = f"{path}: field chat_template"
    if value is None:
        return ChatTemplates({})
    if isinstance(value, str):
        return ChatTemplates({"default": Template(value, name)})
    entries = (
        value.items()
        if isinstance(value, dict)
        else [(entry.get("name"), entry.get("template")) for entry in value]
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
        else [(None, None)]
    )
    for key, source in entries:
        if not isinstance(key, str) or not isinstance(source, str):
            raise UserError(f"{name} must be text or a list of objects with name and template")
        found[key] = Template(source, name)
    return ChatTemplates(found)


def _template_text(path: Path) -> str:
    # As transformers reads it, in text mode; jinja2 makes the same of the line ends anyway.
    return read_text(path).replace("\r\n", "\n").replace("\r", "\n")


@dataclasses.dataclass(frozen=True)
class _Program:
    """A compiled template and the added tokens that it writes in ways that can't be stamped."""

    program: jinja2.Template
    unstamped: frozenset[str]


@functools.lru_cache(maxsize=64)
def _compile(
    template: Template,
    tokens: frozenset[str] = frozenset(),
    stamp: str = "",
    named_tokens: tuple[tuple[str, str], ...] = (),
) -> _Program:
    tree = template_engine.parse(template)
    from_variables = control_tokens.tokens_in_variables(tree, dict(named_tokens), tokens)
    unstamped = control_tokens.stamp_template(tree, tokens, stamp) | from_variables
    return _Program(template_engine.compile_tree(tree, template), unstamped)


def render_chat(
    templates: ChatTemplates,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    named_tokens: Mapping[str, str] | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as text, character for character what transformers 5.23 writes.

    Args:
      templates: of the checkpoint.
      messages: dicts with `role` and whatever the template reads (`content`, `tool_calls`,
        `reasoning_content`...). Keys whose value is None count as absent. Parts of a `content`, all
        of type text, are put together, where templates for text would write nothing.
      tools: JSON schemas of functions, None for no tools.
      add_generation_prompt: whether to open the assistant's next turn.
      named_tokens: variables such as eos_token.
      template_variables: more variables, such as enable_thinking=False.

    Raises:
      UserError: messages or tools have another form, or the template is broken, refuses them or
        runs without end.
    """
    template = templates.choose(tools)
    variables = _variables(messages, tools, add_generation_prompt, template_variables)
    program = _compile(template).program
    return template_engine.render(program, template, {**(named_tokens or {}), **variables})


def encode_chatml(
    text: str, added_tokens: Sequence[AddedToken], encode_plain: Callable[..., list[int]]
) -> list[int]:
    """Ids of what the built-in template wrote, with every added token in it as its id.

    Args:
      text: from `render_chat`.
      added_tokens: the tokenizer's added tokens.
      encode_plain: ids of text without them.
    """
    tokens, marks = [token.content for token in added_tokens], control_tokens.choose_marks([text])
    return control_tokens.encode_marked(
        text, added_tokens, tokens, marks, _head_apart(encode_plain)
    )


def encode_chat_safely(
    templates: ChatTemplates,
    messages: Sequence[Mapping[str, Any]],
    added_tokens: Sequence[AddedToken],
    encode_plain: Callable[..., list[int]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    named_tokens: Mapping[str, str] | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The conversation as ids, where only the template can write control tokens.

    Added tokens in the messages, tools and template variables are taken as plain text. In messages
    of the assistant only those with special=True are: the model's own <think> and <tool_call> are
    what the template and the model know them as.

    Arguments as in `render_chat`; `encode_plain` gives the ids of text without control tokens.
    See `control_tokens` for how.

    Raises:
      UserError: as `render_chat`.
    """
    template = templates.choose(tools)
    if template is CHATML:
        encode_plain = _head_apart(encode_plain)
    named = dict(named_tokens or {})
    variables = _variables(messages, tools, add_generation_prompt, template_variables)
    tokens = frozenset(token.content for token in added_tokens)
    kept = frozenset(token.content for token in added_tokens if not token.special)
    marks = control_tokens.choose_marks(
        [template.source, *control_tokens.strings_in([named, variables])]
    )

    break_all = Breaker(tuple(sorted(tokens)), marks.breaker)
    break_special = Breaker(tuple(sorted(tokens - kept)), marks.breaker)
    assistant = [m for m in variables["messages"] if m["role"] == "assistant"]
    own_words = "\n".join(control_tokens.strings_in(assistant))
    broken = {name: break_all(value) for name, value in variables.items() if name != "messages"}
    broken["messages"] = [
        (break_special if message["role"] == "assistant" else break_all)(message)
        for message in variables["messages"]
    ]
    broken = {**named, **broken}

    now = datetime.datetime.now()
    text, unstamped = _render_stamped(template, tokens, named, broken, marks, now)
    unstamped |= {token for token in kept if token in own_words}
    return control_tokens.encode_marked(text, added_tokens, unstamped, marks, encode_plain)


def _render_stamped(
    template: Template,
    tokens: frozenset[str],
    named: Mapping[str, str],
    variables: Mapping[str, Any],
    marks: Marks,
    now: datetime.datetime,
) -> tuple[str, frozenset[str]]:
    """The text, stamped if that leaves it as it is, and the tokens that count unstamped."""
    pairs = tuple(sorted(named.items()))
    bare = _compile(template, tokens, "", pairs)
    text = template_engine.render(bare.program, template, variables, now)
    stamped = _compile(template, tokens, marks.stamp, pairs)
    try:
        stamped_text = template_engine.render(stamped.program, template, variables, now)
    except UserError:
        return text, bare.unstamped
    if stamped_text.replace(marks.stamp, "") != text:
        return text, bare.unstamped
    return stamped_text, stamped.unstamped


def _variables(
    messages: Any, tools: Any, add_generation_prompt: bool, more: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the template sees, in plain JSON types: objects with methods stay outside."""
    variables = _plain(dict(more or {}), "template variables")
    # transformers passes `documents` always, so `documents is defined` must hold.
    variables.setdefault("documents", None)
    return {
        **variables,
        "messages": _checked_messages(messages),
        "tools": _checked_tools(tools),
        "add_generation_prompt": add_generation_prompt,
    }


def _head_apart(encode_plain: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """Encodes a role, the line end behind it and the words each alone, as Qwen1's code does.

    No token spans two of them, as one may where the words begin with a line end.
    """

    def encode(text: str, continues: bool) -> list[int]:
        ids: list[int] = []
        for part in filter(None, text.partition("\n")):
            ids += encode_plain(part, continues=continues or bool(ids))
        return ids

    return encode


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple):
        raise UserError(
            f"messages: must be a list of objects with role and content,"
            f" found {type(messages).__name__}"
        )
    if not messages:
        raise UserError("messages: empty; give at least one message")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(
                f"messages[{index}]: must be an object with role and content,"
                f" found {type(message).__name__}"
            )
        if not isinstance(message.get("role"), str):
            raise UserError(f"messages[{index}]: needs a role such as 'user', as text")
        plain = _plain(message, f"messages[{index}]")
        plain = {key: value for key, value in plain.items() if value is not None}
        if "content" in plain:
            plain["content"] = _content_text(plain["content"], f"messages[{index}]: content")
        checked.append(_with_reasoning(plain))
    return checked


def _content_text(content: Any, place: str) -> str:
    """The text of a content that may come in parts, which templates for text leave out unsaid."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UserError(f"{place} = {shown(content)} should be text, or a list of parts of text")
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise UserError(
                f"{place}[{index}]: {shown(kind)} is not read; give parts of type text, with text"
            )
        if not isinstance(part.get("text"), str):
            raise UserError(f"{place}[{index}]: a part of type text needs text")
    return "".join(part["text"] for part in content)


def _checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise UserError(f"tools: must be a list of JSON schemas, found {type(tools).__name__}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise UserError(
                f"tools[{index}]: must be a JSON schema object, found {type(tool).__name__}"
            )
    return [_plain(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under the names that templates read, whichever name it came by."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any, place: str, depth: int = 0) -> Any:
    if depth > _MAX_NESTING:
        raise UserError(f"{place}: nested deeper than {_MAX_NESTING} levels; flatten it")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(k, place, depth + 1): _plain(v, place, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, place, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return f"<{type(value).__name__}>"
