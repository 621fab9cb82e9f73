"""What a model writes back, taken apart: reasoning, content and tool calls, whole or streamed.

Reasoning stands between <think> and </think> at the start; a template may have opened it in the
prompt. A call stands between <tool_call> and </tool_call>, as Hermes JSON
({"name": ..., "arguments": {...}}) or as Qwen3-Coder's XML (<function=NAME> with
<parameter=NAME> inside); which of the two shows in its first character.

Newlines next to a tag belong to the tag, as templates write them. Every other character comes out
as reasoning, content, the text of a call or the text of a problem: nothing is lost, and no reply is
an error.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_CALL_OPEN, _CALL_CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = "<function="

# Whole strings of JSON, and the quote of one that does not end.
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|"', re.DOTALL)
# A value may hold </parameter>: it ends where the next parameter or the function's end follows.
_XML_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>(.*?)</parameter>(?=\s*(?:<parameter=|</function>))", re.DOTALL
)
_XML_FUNCTION = re.compile(rf"\s*{_FUNCTION}([^>\n]+)>")
_XML_END = re.compile(r"\s*</function>\s*\Z")
_FUNCTION_JUST_ENDED = re.compile(r"</function>\s*\Z")


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """A piece of reasoning."""

    text: str


@dataclasses.dataclass(frozen=True)
class Content:
    """A piece of what is meant for the reader."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called.

    Attributes:
      name: of the function.
      arguments: by name. Those of XML calls are strings where no schema gives a type.
      text: the call as the model wrote it, tags included.
    """

    name: str
    arguments: dict[str, Any]
    text: str

    def as_message(self) -> dict[str, Any]:
        """The entry of an assistant message's `tool_calls`, as chat templates read it."""
        return {
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something in a reply that is not what it should be.

    Attributes:
      reason: one line.
      text: what it is about, as the model wrote it.
    """

    reason: str
    text: str


Event = Reasoning | Content | ToolCall | Problem


@dataclasses.dataclass(frozen=True)
class Reply:
    """One reply.

    Attributes:
      reasoning: None where there are no thinking tags.
      content: what is left for the reader.
      tool_calls: in order.
      problems: in order; the text of a broken call is here and nowhere else.
    """

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    problems: tuple[Problem, ...] = ()

    def as_message(self) -> dict[str, Any]:
        """The assistant message that chat templates write this reply back from."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_message() for call in self.tool_calls]
        return message


def thinking_is_open(prompt: str) -> bool:
    """Whether a rendered prompt ends inside reasoning, as templates of thinking models leave it."""
    return prompt.rstrip().endswith(THINK_OPEN)


def parse_reply(
    text: str, thinking_open: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
) -> Reply:
    """Takes a whole reply apart.

    Args:
      text: what the model wrote, without special tokens.
      thinking_open: whether the prompt ended inside reasoning, see `thinking_is_open`.
      tools: JSON schemas of the functions, which give XML arguments their types.
    """
    parser = ReplyParser(thinking_open, tools)
    events = [*parser.push(text), *parser.finish()]
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    return Reply(
        reasoning=reasoning if parser.thinks else None,
        content="".join(event.text for event in events if isinstance(event, Content)),
        tool_calls=tuple(event for event in events if isinstance(event, ToolCall)),
        problems=tuple(event for event in events if isinstance(event, Problem)),
    )


class ReplyParser:
    """Takes a reply apart while it comes.

    The events of all pushes and of `finish` are those of the whole reply, however it is cut into
    pushes; only a text that comes in several events may be divided otherwise. What may still become
    a tag is held back, a call until it is complete.

    Args:
      thinking_open, tools: as for `parse_reply`.

    Attributes:
      thinks: whether the reply has reasoning, even if empty.
    """

    def __init__(
        self, thinking_open: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
    ):
        self.thinks = thinking_open
        self._types = _parameter_types(tools or ())
        self._steps = {
            "start": self._start,
            "reasoning": self._reason,
            "content": self._write,
            "call": self._call,
        }
        self._state = "reasoning" if thinking_open else "start"
        self._text = ""
        # Newlines that come out with the next character, unless they turn out to belong to a tag.
        self._newlines = ""
        self._after_tag = thinking_open
        self._has_content = False
        # How far the text of an open call has been searched for its end.
        self._searched = 0

    def push(self, text: str) -> list[Event]:
        """Takes more text and returns what has become certain."""
        self._text += text
        return list(self._run(final=False))

    def finish(self) -> list[Event]:
        """The reply has ended: returns what was held back."""
        events = list(self._run(final=True))
        if self._state == "reasoning":
            events.append(Problem(f"the reasoning was cut off: no {THINK_CLOSE}", ""))
        elif self._newlines and not self._after_tag:
            events.append(Content(self._newlines))
        return events

    def _run(self, final: bool) -> Iterator[Event]:
        """Runs states until one needs more text: each yields events and says whether to go on."""
        while self._text and (yield from self._steps[self._state](final)):
            pass

    def _start(self, final: bool) -> Iterator[Event]:
        rest = self._text.lstrip("\n")
        if not final and len(rest) < len(THINK_OPEN) and THINK_OPEN.startswith(rest):
            return False
        self._state = "content"
        if rest.startswith(THINK_OPEN):
            self._state, self.thinks, self._after_tag = "reasoning", True, True
            self._text = rest[len(THINK_OPEN) :]
        yield from ()
        return True

    def _reason(self, final: bool) -> Iterator[Event]:
        found, text = self._until((THINK_CLOSE,), final)
        yield from self._spaced(Reasoning, text)
        if found:
            self._state, self._after_tag, self._newlines = "content", True, ""
            self._text = self._text[len(THINK_CLOSE) :]
        return bool(found)

    def _write(self, final: bool) -> Iterator[Event]:
        found, text = self._until((_CALL_OPEN, _CALL_CLOSE), final)
        yield from self._spaced(Content, text)
        if found == _CALL_OPEN:
            self._state, self._searched = "call", len(_CALL_OPEN)
        elif found:
            self._text = self._text[len(found) :]
            yield from self._spaced(Content, found)
            yield Problem(f"{found} stands without {_CALL_OPEN}; what it ends is content", "")
        return bool(found)

    def _until(self, tags: tuple[str, ...], final: bool) -> tuple[str, str]:
        """The first of the tags and the text before it; or no tag and all that can't begin one."""
        places = {self._text.find(tag): tag for tag in tags}
        end = min((place for place in places if place >= 0), default=None)
        found = "" if end is None else places[end]
        if end is None:
            kept = 0 if final else max(_overlap(self._text, tag) for tag in tags)
            end = len(self._text) - kept
        text, self._text = self._text[:end], self._text[end:]
        return found, text

    def _spaced(self, kind: type, text: str) -> Iterator[Event]:
        """The text as an event, without newlines that may belong to a tag."""
        if self._after_tag:
            text = text.lstrip("\n")
        if not text:
            return
        self._after_tag = False
        body = text.rstrip("\n")
        if body:
            self._has_content |= kind is Content
            yield kind(self._newlines + body)
            self._newlines = ""
        self._newlines += text[len(body) :]

    def _call(self, final: bool) -> Iterator[Event]:
        end = self._call_end(final)
        if end is None:
            return False
        self._state = "content"
        if end == 0:
            # A word about the tag rather than a call.
            yield from self._spaced(Content, _CALL_OPEN)
            self._text = self._text[len(_CALL_OPEN) :]
            return True
        text, self._text = self._text[:end], self._text[end:]
        # Text after a call keeps the newlines before the call, and not those behind it.
        self._newlines = self._newlines if self._has_content else ""
        self._after_tag = True
        yield from _read_call(text, self._types)
        return True

    def _call_end(self, final: bool) -> int | None:
        """Where the call ends that the text begins with; 0 if it is none, None to wait for more."""
        text, begin = self._text, len(_CALL_OPEN)
        while (close := text.find(_CALL_CLOSE, self._searched)) >= 0:
            end = close + len(_CALL_CLOSE)
            body = text[begin:close]
            inside = _is_inside_value(body)
            # A line that ends inside a JSON string is broken: strings have no bare newlines.
            if inside and _is_json(body):
                if end == len(text) and not final:
                    return None
                inside = text[end : end + 1] not in ("", "\n")
            if not inside:
                is_broken = any(isinstance(e, Problem) for e in _read_call(text[:end], {}))
                return (_end_before_next(text[:end]) or end) if is_broken else end
            self._searched = end
        if not final:
            # The last characters may be the beginning of the tag.
            self._searched = max(self._searched, len(text) - len(_CALL_CLOSE) + 1)
            return None
        if (end := _end_before_next(text)) is not None:
            return end
        body = text[begin:].lstrip()
        is_call = _is_json(body) or body.startswith(_FUNCTION) or _FUNCTION.startswith(body)
        return len(text) if is_call else 0


def _end_before_next(text: str) -> int | None:
    """The first closing tag's end if a call opens behind it: a broken one must not swallow that."""
    first = text.find(_CALL_CLOSE)
    return first + len(_CALL_CLOSE) if first >= 0 and _CALL_OPEN in text[first:] else None


def _overlap(text: str, tag: str) -> int:
    """Length of the longest beginning of `tag` that `text` ends with."""
    lengths = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(tag[:n])), 0)


def _is_json(body: str) -> bool:
    return body.lstrip().startswith("{")


def _is_inside_value(body: str) -> bool:
    """Whether a call's body, up to a closing tag, stops inside a string or a parameter."""
    if _is_json(body):
        return any(part.group() == '"' for part in _JSON_STRING.finditer(body))
    if not body.lstrip().startswith(_FUNCTION) or _FUNCTION_JUST_ENDED.search(body):
        return False
    return body.rfind("<parameter=") > body.rfind("</parameter>")


def _read_call(text: str, types: Mapping[str, Mapping[str, frozenset[str]]]) -> Iterator[Event]:
    """The call, or a problem that holds all of its text; problems with its arguments follow."""
    if not text.endswith(_CALL_CLOSE):
        yield Problem(f"the tool call was cut off: no {_CALL_CLOSE}", text)
        return
    body = text[len(_CALL_OPEN) : -len(_CALL_CLOSE)]
    try:
        if not body.lstrip().startswith(_FUNCTION):
            name, arguments = _read_json_call(body)
            yield ToolCall(name, arguments, text)
            return
        name, values = _read_xml_call(body)
    except (ValueError, RecursionError) as error:
        yield Problem(" ".join(str(error).split()), text)
        return
    arguments, problems = {}, []
    for parameter, value in values:
        try:
            arguments[parameter] = _typed(value, types.get(name, {}).get(parameter, frozenset()))
        except (ValueError, RecursionError) as error:
            arguments[parameter] = value
            problems.append(Problem(f"argument {parameter} of {name}: {error}", value))
    yield ToolCall(name, arguments, text)
    yield from problems


def _read_json_call(body: str) -> tuple[str, dict[str, Any]]:
    if not _is_json(body):
        raise ValueError(f"the tool call is neither a JSON object nor {_FUNCTION}NAME>")
    call = _load_json(body)
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError("the tool call has no name")
    if isinstance(arguments, str):
        # Some write the object as JSON inside JSON, as OpenAI's interface returns it.
        arguments = _load_json(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("the tool call has no object of arguments")
    return name, arguments


def _load_json(text: str) -> Any:
    try:
        # Not strict: models write bare newlines into strings.
        return json.loads(text, strict=False, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("not valid JSON (nested too deep)") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _read_xml_call(body: str) -> tuple[str, list[tuple[str, str]]]:
    """The function's name and its parameters as text."""
    head = _XML_FUNCTION.match(body)
    if head is None:
        raise ValueError("the tool call does not name its function")
    values: dict[str, str] = {}
    position = head.end()
    while (parameter := _XML_PARAMETER.match(body, position)) is not None:
        name, value = parameter.groups()
        if name in values:
            raise ValueError(f"the tool call gives {name} twice")
        values[name] = value.removeprefix("\n").removesuffix("\n")
        position = parameter.end()
    if _XML_END.match(body, position) is None:
        rest = " ".join(body[position:].split())[:40]
        raise ValueError(f"the tool call should go on with a parameter or </function>: {rest!r}")
    return head.group(1), list(values.items())


def _parameter_types(
    tools: Iterable[Mapping[str, Any]],
) -> dict[str, dict[str, frozenset[str]]]:
    """JSON types of parameters by function and name; empty for what the schemas do not say."""
    types: dict[str, dict[str, frozenset[str]]] = {}
    for tool in tools:
        function = _field(_object(tool), "function") or _object(tool)
        parameters = _field(_field(function, "parameters"), "properties")
        types[function.get("name")] = {name: _types_in(part) for name, part in parameters.items()}
    return types


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _field(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _object(schema.get(name))


def _types_in(schema: Any) -> frozenset[str]:
    """The types that a schema names and that JSON has."""
    schema = _object(schema)
    given = schema.get("type")
    names = {given} if isinstance(given, str) else set(given) if isinstance(given, list) else set()
    for key in ("anyOf", "oneOf"):
        for part in schema.get(key) or ():
            names |= _types_in(part)
    return frozenset(names & {"string", *_JSON_TYPES})


_JSON_TYPES = {
    "null": type(None),
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "object": dict,
    "array": list,
}


def _typed(value: str, types: frozenset[str]) -> Any:
    """An XML argument as its schema has it; a string where that says so, or nothing."""
    if "null" in types and value.strip() == "null":
        return None
    if not types or "string" in types:
        return value
    text = value.strip()
    # Python's spelling is what a template writes that prints a value rather than its JSON.
    read = _load_json(text.lower() if text in ("True", "False") else text)
    for name in types:
        is_bool = isinstance(read, bool)
        if isinstance(read, _JSON_TYPES[name]) and is_bool == (name == "boolean"):
            return read
    raise ValueError(f"should be {' or '.join(sorted(types))}, is {text[:40]!r}")
