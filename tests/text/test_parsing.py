"""Replies taken apart: what templates write comes back, streamed as whole, and nothing is lost."""

import itertools
import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_jax.text.chat import ChatTemplates, render_chat
from qwen_jax.text.parsing import (
    Content,
    Problem,
    Reasoning,
    Reply,
    ReplyParser,
    ToolCall,
    parse_reply,
    thinking_is_open,
)
from qwen_jax.text.template_engine import Template

from .chat_templates import CODER, QWEN3, QWEN25

WEATHER = {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}
HERMES = "<tool_call>\n" + json.dumps(WEATHER, ensure_ascii=False) + "\n</tool_call>"
CODER_CALL = (
    "<tool_call>\n<function=write>\n<parameter=path>\na b.txt\n</parameter>\n"
    "<parameter=text>\nline 1\n\nline 3\n</parameter>\n</function>\n</tool_call>"
)
TYPED = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "ratio": {"type": "number"},
                "deep": {"type": "boolean"},
                "options": {"type": "object"},
                "names": {"type": "array"},
                "maybe": {"type": ["integer", "null"]},
                "either": {"anyOf": [{"type": "boolean"}, {"type": "array"}]},
                "odd": {"type": "colour"},
            },
        },
    },
}


def xml_call(**values):
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function=f>\n{parameters}</function>\n</tool_call>"


def reply_in(template, message, **variables):
    """What the model would have written for the template to have this assistant message."""
    messages = [{"role": "user", "content": "Hi"}]
    templates = ChatTemplates({"default": Template(template, "test")})
    prompt = render_chat(templates, messages, None, True, None, variables)
    whole = render_chat(templates, [*messages, message], None, False, None, variables)
    assert whole.startswith(prompt)
    return whole[len(prompt) :].removesuffix("<|im_end|>\n")


def arguments_as_text(calls):
    return [{k: v if isinstance(v, str) else json.dumps(v)} for k, v in calls]


plain = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
hostile = st.sampled_from(["</tool_call>", "<tool_call>", "<think>", "</think>", '"', "\\", "\n"])
hostile_text = st.lists(plain | hostile, max_size=6).map("".join)
ARGUMENTS = st.dictionaries(names, json_values | hostile_text, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    reasoning=plain.map(lambda t: t.strip("\n").replace("</think>", "")),
    content=plain.map(lambda t: t.strip("\n")),
    calls=st.lists(st.tuples(names, ARGUMENTS), max_size=3),
)
def test_what_the_template_of_qwen3_writes_comes_back(reasoning, content, calls):
    expected = Reply(
        reasoning, content, tuple(ToolCall(name, arguments, "") for name, arguments in calls)
    )
    reply = parse_reply(reply_in(QWEN3, expected.as_message()))
    assert (reply.reasoning, reply.content, reply.problems) == (reasoning, content, ())
    assert [(call.name, call.arguments) for call in reply.tool_calls] == calls


@settings(max_examples=100, deadline=None)
@given(calls=st.lists(st.tuples(names, ARGUMENTS), min_size=1, max_size=3))
def test_what_the_template_of_qwen25_writes_comes_back(calls):
    message = Reply(None, "", tuple(ToolCall(*call, "") for call in calls)).as_message()
    reply = parse_reply(reply_in(QWEN25, message))
    assert [(call.name, call.arguments) for call in reply.tool_calls] == calls
    assert (reply.reasoning, reply.content, reply.problems) == (None, "", ())


xml_text = st.lists(
    plain | st.sampled_from(["</tool_call> ", "<tool_call>", "</parameter> ", "<think>", "\n"]),
    max_size=5,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(calls=st.lists(st.dictionaries(names, plain | json_values, max_size=3), max_size=3))
def test_what_the_template_of_coder_writes_comes_back(calls):
    tools = [
        {"name": f"f{i}", "parameters": {"properties": {k: schema_of(v) for k, v in call.items()}}}
        for i, call in enumerate(calls)
    ]
    made = tuple(ToolCall(f"f{i}", call, "") for i, call in enumerate(calls))
    if not made:
        return
    text = reply_in(CODER, Reply(None, "Now", made).as_message())
    reply = parse_reply(text, tools=tools)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [
        (call.name, call.arguments) for call in made
    ]
    assert (reply.content, reply.problems) == ("Now", ())


def schema_of(value):
    kinds = {str: "string", bool: "boolean", int: "integer", list: "array", dict: "object"}
    return {"type": kinds.get(type(value), "null")}


@settings(max_examples=200, deadline=None)
@given(before=xml_text, after=xml_text)
def test_an_xml_value_may_hold_tags_of_the_format(before, after):
    """But not a whole </parameter> that another parameter or the function's end follows."""
    value = f"{before}|</tool_call>|</parameter>|<tool_call>|{after}|"
    (call,) = parse_reply(xml_call(a="1", text=value.replace("</parameter>", ""))).tool_calls
    assert call.arguments["text"] == value.replace("</parameter>", "")
    (call,) = parse_reply(xml_call(a="1", text="x</parameter>y")).tool_calls
    assert call.arguments["text"] == "x</parameter>y"


PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "\n", "\n\n", HERMES, CODER_CALL,
    '{"name": "f", "arguments": {}}', '{"name": "x', '"', "\\", "{", "}", "<function=f>",
    "<parameter=p>", "</parameter>", "</function>", "text", " ", "<", "<tool", "</th", "é",
    xml_call(count="x"),
]  # fmt: skip
anything = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def joined(events):
    """The events with neighbouring texts of one kind made one."""
    out = []
    for event in events:
        if out and type(event) is type(out[-1]) and isinstance(event, Reasoning | Content):
            out[-1] = type(event)(out[-1].text + event.text)
        else:
            out.append(event)
    return out


def events_of(pieces, thinking_open):
    parser = ReplyParser(thinking_open, [TYPED])
    events = [event for piece in pieces for event in parser.push(piece)]
    return joined([*events, *parser.finish()])


@settings(max_examples=1000, deadline=None)
@given(text=anything, cuts=st.lists(st.integers(0, 400), max_size=12), thinking_open=st.booleans())
@example('<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>\n"', [50], False)
@example('<tool_call>{"a": "</tool_call>"}', [30, 31], False)
def test_however_a_reply_is_cut_its_events_are_the_same(text, cuts, thinking_open):
    whole = events_of([text], thinking_open)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert events_of(pieces, thinking_open) == whole
    assert events_of(list(text), thinking_open) == whole
    reply = parse_reply(text, thinking_open, [TYPED])
    parts = {Reasoning: reply.reasoning or "", Content: reply.content}
    for kind, expected in parts.items():
        assert "".join(e.text for e in whole if isinstance(e, kind)) == expected
    assert reply.tool_calls == tuple(e for e in whole if isinstance(e, ToolCall))
    assert reply.problems == tuple(e for e in whole if isinstance(e, Problem))


@settings(max_examples=1000, deadline=None)
@given(text=anything, thinking_open=st.booleans())
def test_no_character_is_lost_and_none_is_added(text, thinking_open):
    parser = ReplyParser(thinking_open, [TYPED])
    events = [*parser.push(text), *parser.finish()]
    # A problem with one argument speaks of text that its call holds already.
    events = [e for e in events if not getattr(e, "reason", "").startswith("argument ")]
    rest = text.lstrip("\n").removeprefix("" if thinking_open else "<think>")
    if parser.thinks:
        rest = rest.replace("</think>", "", 1)
    assert "".join(event.text for event in events).replace("\n", "") == rest.replace("\n", "")


@pytest.mark.parametrize(
    ("text", "thinking_open", "reasoning", "content"),
    [
        ("<think>\nwhy\n</think>\n\nThis", False, "why", "This"),
        ("why\n</think>\n\nThis", True, "why", "This"),
        ("\nwhy\n\nand\n</think>\n\nThis\n", True, "why\n\nand", "This\n"),
        ("<think>\n\n</think>\n\nThis", False, "", "This"),
        ("\n<think>why</think>This", False, "why", "This"),
        ("say <think> here", False, None, "say <think> here"),
        ("no </think> here", False, None, "no </think> here"),
        ("<think>a</think>b</think>c<think>", False, "a", "b</think>c<think>"),
        ("\n\nplain\n", False, None, "\n\nplain\n"),
        ("<thin", False, None, "<thin"),
        ("", False, None, ""),
    ],
)
def test_reasoning_is_what_stands_between_the_tags(text, thinking_open, reasoning, content):
    reply = parse_reply(text, thinking_open)
    assert reply == Reply(reasoning, content)


@pytest.mark.parametrize(("text", "thinking_open"), [("<think>\nhm", False), ("hm\n", True)])
def test_reasoning_that_does_not_end_is_a_problem(text, thinking_open):
    reply = parse_reply(text, thinking_open)
    assert (reply.reasoning, reply.content) == ("hm", "")
    assert [p.reason for p in reply.problems] == ["the reasoning was cut off: no </think>"]


def test_a_call_inside_reasoning_is_reasoning():
    reply = parse_reply(f"<think>{HERMES}</think>{HERMES}")
    assert reply.reasoning == HERMES
    assert len(reply.tool_calls) == 1


def test_text_around_calls_is_content():
    reply = parse_reply(f"One\n{HERMES}\ntwo {CODER_CALL}\n\nthree\n")
    assert reply.content == "One\ntwo three\n"
    assert [call.name for call in reply.tool_calls] == ["get_weather", "write"]
    assert [call.text for call in reply.tool_calls] == [HERMES, CODER_CALL]
    assert reply.tool_calls[0].arguments == WEATHER["arguments"]
    assert reply.tool_calls[1].arguments == {"path": "a b.txt", "text": "line 1\n\nline 3"}


GOOD = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def call_of(body):
    return f"<tool_call>{body}</tool_call>"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('\n{"name": "f", "arguments": {"a": 1}\n', "not valid JSON (Expecting ',' delimiter"),
        ('\n{"name": "f, "arguments": {}}\n', "not valid JSON (Expecting"),
        ("{'name': 'f'}", "not valid JSON (Expecting property name"),
        ('{"name": "f", "arguments": {"a": NaN}}', "not valid JSON (NaN is not a JSON number)"),
        ('{"name": "f", "arguments": {}} {}', "not valid JSON (Extra data"),
        ('{"a": ' + "[" * 100_000 + "}", "not valid JSON (nested too deep)"),
        ('{"a": 1' + "0" * 5000 + "}", "not valid JSON (Exceeds the limit"),
        ('{"arguments": {}}', "the tool call has no name"),
        ('{"name": 3, "arguments": {}}', "the tool call has no name"),
        ('{"name": "f"}', "the tool call has no object of arguments"),
        ('{"name": "f", "arguments": [1]}', "the tool call has no object of arguments"),
        ('{"name": "f", "arguments": "{"}', "not valid JSON"),
        ("", "the tool call is neither a JSON object nor <function=NAME>"),
        ("[]", "the tool call is neither a JSON object nor <function=NAME>"),
        ("<function=>", "the tool call does not name its function"),
        ("<function=f", "the tool call does not name its function"),
        ("<function=f>\n", "the tool call should go on with a parameter or </function>: ''"),
        ("<function=f>words</function>", "the tool call should go on with a parameter or </funct"),
        ("<function=f><parameter=a>1</function>", "the tool call should go on with a parameter"),
        (
            "<function=f><parameter=a>1</parameter><parameter=a>2</parameter></function>",
            "the tool call gives a twice",
        ),
    ],
)
def test_a_broken_call_is_reported_whole_and_the_rest_is_read(body, reason):
    broken = call_of(body)
    reply = parse_reply(f"A\n{broken}\n{GOOD}\nZ")
    assert [p.text for p in reply.problems] == [broken]
    assert reply.problems[0].reason.startswith(reason)
    assert "\n" not in reply.problems[0].reason
    assert [call.text for call in reply.tool_calls] == [GOOD]
    assert reply.content == "A\nZ"


def test_a_broken_string_does_not_swallow_the_next_call():
    for gap in ("\n", " and "):
        broken = '<tool_call>{"name": "f", "arguments": {"a": "x}}</tool_call>'
        reply = parse_reply(f"{broken}{gap}{GOOD}")
        assert [p.text for p in reply.problems] == [broken]
        assert [call.text for call in reply.tool_calls] == [GOOD]


@pytest.mark.parametrize("end", range(len("<tool_call>"), len(HERMES)))
def test_a_call_that_is_cut_off_is_reported_whole(end):
    for call in (HERMES, CODER_CALL):
        reply = parse_reply("Wait\n" + call[:end])
        assert reply.content == "Wait"
        assert [p.text for p in reply.problems] == [call[:end]]
        assert reply.problems[0].reason == "the tool call was cut off: no </tool_call>"


@pytest.mark.parametrize(
    "text",
    [CODER_CALL.removeprefix("<tool_call>\n"), "Look: " + HERMES.removeprefix("<tool_call>")],
)
def test_a_call_without_its_opening_tag_is_content_and_reported(text):
    assert parse_reply(text + "\nbye") == Reply(
        reasoning=None,
        content=text + "\nbye",
        problems=(Problem("</tool_call> stands without <tool_call>; what it ends is content", ""),),
    )


def test_a_word_about_the_tag_is_content():
    text = "Write <tool_call> first.\nThen go on."
    assert parse_reply(text) == Reply(None, text)


def test_arguments_may_be_json_inside_json_and_strings_may_hold_bare_newlines():
    double = call_of(json.dumps({"name": "f", "arguments": json.dumps({"a": [1]})}))
    assert parse_reply(double).tool_calls[0].arguments == {"a": [1]}
    bare = call_of('{"name": "f", "arguments": {"a": "x\ny"}}')
    assert parse_reply(bare).tool_calls[0].arguments == {"a": "x\ny"}


def test_xml_arguments_have_the_types_of_their_schema():
    written = {
        "text": "12", "count": " -12 ", "ratio": "0.5", "deep": "True", "options": '{"a": [1]}',
        "names": '["x"]', "maybe": "null", "either": "false", "odd": "3", "unknown": "4",
    }  # fmt: skip
    typed = {
        "text": "12", "count": -12, "ratio": 0.5, "deep": True, "options": {"a": [1]},
        "names": ["x"], "maybe": None, "either": False, "odd": "3", "unknown": "4",
    }  # fmt: skip
    for tools in ([TYPED], [TYPED["function"]], [{}, {"function": 3}, TYPED]):
        reply = parse_reply(xml_call(**written), tools=tools)
        assert reply.tool_calls[0].arguments == typed
        assert list(map(type, reply.tool_calls[0].arguments.values())) == list(
            map(type, typed.values())
        )
        assert reply.problems == ()
    assert parse_reply(xml_call(**written)).tool_calls[0].arguments == written


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("count", "many", "not valid JSON"),
        ("count", "1.5", "should be integer, is '1.5'"),
        ("count", "true", "should be integer, is 'true'"),
        ("deep", "1", "should be boolean, is '1'"),
        ("options", "[]", "should be object, is '[]'"),
        ("either", "null", "should be array or boolean, is 'null'"),
        ("maybe", "{", "not valid JSON"),
        ("names", "[" * 100_000, "not valid JSON (nested too deep)"),
    ],
)
def test_an_argument_of_another_type_stays_text_and_is_reported(name, value, reason):
    reply = parse_reply(xml_call(**{name: value}), tools=[TYPED])
    assert reply.tool_calls[0].arguments == {name: value}
    (problem,) = reply.problems
    assert problem.reason.startswith(f"argument {name} of f: {reason}")
    assert problem.text == value


def test_events_come_as_soon_as_they_are_certain():
    parser = ReplyParser()
    assert parser.push("<think>\nLet me") == [Reasoning("Let me")]
    assert parser.push(" see\n</th") == [Reasoning(" see")]
    assert parser.push("ere\n") == [Reasoning("\n</there")]
    assert parser.push("</think>\n\n") == []
    assert parser.push("So <") == [Content("So ")]
    assert parser.push("b> it is\n") == [Content("<b> it is")]
    assert parser.push(HERMES[:-1]) == []
    assert [type(event) for event in parser.push(HERMES[-1:])] == [ToolCall]
    assert parser.push("\n") == [] and parser.finish() == []


def test_a_long_call_that_comes_by_characters_is_no_slower_than_it_is_long():
    text = call_of(
        json.dumps({"name": "f", "arguments": {"a": "x</tool_call> " * 200 + "y" * 10**5}})
    )
    parser, begin = ReplyParser(), time.perf_counter()
    events = [event for character in text for event in parser.push(character)]
    assert [type(event) for event in events] == [ToolCall]
    # Searching all of it for each character would take minutes.
    assert time.perf_counter() - begin < 10


def test_a_prompt_tells_whether_it_ends_inside_reasoning():
    assert thinking_is_open("<|im_start|>assistant\n<think>\n")
    assert not thinking_is_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not thinking_is_open("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n")
    assert not thinking_is_open("")


def test_a_broken_string_does_not_swallow_the_text_on_the_next_line():
    broken = '<tool_call>{"name": "f", "arguments": {"a": "x}}</tool_call>'
    reply = parse_reply(f"{broken}\nSo be it.")
    assert [p.text for p in reply.problems] == [broken]
    assert reply.content == "So be it."
