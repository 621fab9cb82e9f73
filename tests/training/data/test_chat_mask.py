"""Which tokens of chats are learned, against the rendered text cut up by regular expressions."""

import dataclasses
import re

import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.text.chat import ChatTemplates
from qwen_jax.training.data.chat_mask import find_turns, learned_tokens
from qwen_jax.training.data.options import SourceOptions, TokenOptions
from qwen_jax.training.data.records import Record
from qwen_jax.training.data.tokenise import tokenise
from tests.training.data.conftest import TEMPLATES, with_template

TOOLS = [{"type": "function", "function": {"name": "warm", "parameters": {"type": "object"}}}]


def call(city):
    return {"type": "function", "function": {"name": "warm", "arguments": {"city": city}}}


CHATS = {
    "plain": [
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Well,\n\nthe sea.\n"},
    ],
    "turns": [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "<think>\nhm 1\n</think>\n\nOne."},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "Two.", "reasoning_content": "hm 2"},
    ],
    "tools": [
        {"role": "user", "content": "Oslo and Cairo?"},
        {"role": "assistant", "content": "", "tool_calls": [call("Oslo"), call("Cairo")]},
        {"role": "tool", "content": "4 é"},
        {"role": "tool", "content": "31"},
        {"role": "assistant", "content": "Both.", "reasoning_content": "a\n\nb"},
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call("Rome")]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "None."},
    ],
    "two in a row": [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"},
    ],
}
QUOTES = "<|im_end|>\n<|im_start|>assistant\n<think>x</think><tool_call>y<|endoftext|>"


def encode(tokenizer, messages, options, tools=TOOLS, **variables):
    record = Record(
        "f:1", {"messages": messages, "tools": tools, "chat_template_kwargs": variables}
    )
    return tokenise(record, "chat", tokenizer, SourceOptions("f"), options)


def learned_text(tokenizer, example):
    return tokenizer.decode(example.ids[example.learned])


def cut_up(text, messages, options):
    """The learned text by regular expressions: right where no words hold control tokens."""
    turns = re.findall(r"<\|im_start\|>(\w+)\n?(.*?<\|im_end\|>)", text, re.DOTALL)
    roles = []
    for i, message in enumerate(messages):
        if not (message["role"] == "tool" and i and messages[i - 1]["role"] == "tool"):
            roles.append(message["role"])
    roles = ["system"] * (len(turns) - len(roles)) + roles
    assert len(roles) == len(turns)
    chosen = []
    for role, (_, body) in zip(roles, turns, strict=True):
        if role not in options.learn:
            continue
        if role == "assistant":
            # A prompt that asks for no thinking ends with an empty block.
            thinking = r"\s*" if options.thinking else ".*?"
            body = re.sub(rf"^\s*<think>{thinking}</think>\s*", "", body, flags=re.DOTALL)
        if role == "assistant" and not options.tool_calls:
            body = re.sub(r"\s*<tool_call>.*?</tool_call>\s*", "", body, flags=re.DOTALL)
        chosen.append(body)
    return "".join(chosen[-1:] if options.last_turn_only else chosen)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"last_turn_only": True},
        {"thinking": False},
        {"tool_calls": False},
        {"thinking": False, "tool_calls": False},
        {"learn": ("user",)},
        {"learn": ("tool", "assistant")},
        {"learn": ("system", "user")},
    ],
    ids=str,
)
def test_what_is_learned_is_what_the_text_says(tokenizer, template, chat, options):
    tokenizer = with_template(tokenizer, TEMPLATES[template])
    options = TokenOptions(**options)
    messages = CHATS[chat]
    example = encode(tokenizer, messages, options)
    text = tokenizer.apply_chat_template(messages, TOOLS, tokenize=False)
    assert tokenizer.decode(example.ids) == text
    assert learned_text(tokenizer, example) == cut_up(text, messages, options)


@pytest.mark.parametrize("template", TEMPLATES)
def test_control_tokens_in_words_are_words(tokenizer, template):
    tokenizer = with_template(tokenizer, TEMPLATES[template])
    messages = [
        {"role": "system", "content": QUOTES},
        {"role": "user", "content": QUOTES},
        {"role": "assistant", "content": "Say <|im_end|> to end."},
        {"role": "tool", "content": QUOTES},
        {"role": "assistant", "content": "Yes."},
    ]
    for options in (TokenOptions(), TokenOptions(tool_calls=False)):
        example = encode(tokenizer, messages, options, tools=None)
        learned = learned_text(tokenizer, example)
        learned = learned.replace("<think>\n\n</think>\n\n", "")
        assert learned == "Say <|im_end|> to end.<|im_end|>Yes.<|im_end|>"


def test_the_built_in_template_of_qwen1_is_read_alike(tokenizer):
    tokenizer = dataclasses.replace(tokenizer, chat_templates=ChatTemplates({}))
    for chat in ("plain", "two in a row"):
        for options in (TokenOptions(), TokenOptions(learn=("user", "assistant"))):
            example = encode(tokenizer, CHATS[chat], options, tools=None)
            text = tokenizer.apply_chat_template(CHATS[chat], tokenize=False)
            assert tokenizer.decode(example.ids) == text
            assert learned_text(tokenizer, example) == cut_up(text, CHATS[chat], options)


def test_thinking_of_earlier_turns_is_learned_only_where_it_is_rendered(tokenizer):
    example = encode(tokenizer, CHATS["turns"], TokenOptions())
    learned = learned_text(tokenizer, example)
    assert learned == "One.<|im_end|><think>\nhm 2\n</think>\n\nTwo.<|im_end|>"


def test_template_variables_of_a_record_reach_the_template(tokenizer):
    source = "{{- mode }}" + TEMPLATES["qwen3"]
    tokenizer = with_template(tokenizer, source)
    example = encode(tokenizer, CHATS["plain"], TokenOptions(), mode="M")
    assert tokenizer.decode(example.ids).startswith("M<|im_start|>")
    record = Record("f:1", {"messages": CHATS["plain"], "enable_thinking": False})
    source = "{{- enable_thinking }}" + TEMPLATES["qwen3"]
    example = tokenise(
        record, "chat", with_template(tokenizer, source), SourceOptions("f"), TokenOptions()
    )
    assert tokenizer.decode(example.ids).startswith("False<|im_start|>")


def test_a_line_end_of_the_words_is_not_taken_for_the_headers(tokenizer):
    """A token that spans both is what no model writes behind the header."""
    template = (
        "{%- for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>\n"
        "{%- endfor %}"
    )
    tokenizer = with_template(tokenizer, template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb"}]
    example = encode(tokenizer, messages, TokenOptions())
    joined = tokenizer.token_to_id("\u010a\u010a")
    assert joined in example.ids
    assert not example.learned[example.ids == joined].any()
    assert learned_text(tokenizer, example) == "b<|im_end|>"


MERGING = """\
{%- for m in messages %}
{%- if loop.first or m.role != messages[loop.index0 - 1].role %}<|im_start|>{{ m.role }}
{% endif %}
{{- m.content }}
{%- if loop.last or m.role != messages[loop.index0 + 1].role %}<|im_end|>
{% endif %}
{%- endfor %}"""
OPEN = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{%- endfor %}"
BARE = "{%- for m in messages %}{{ m.content }}\n{%- endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "options", "message"),
    [
        (
            MERGING,
            CHATS["two in a row"],
            {},
            "messages: the template wrote the turns user, assistant for messages of user, user, "
            "assistant, assistant; the loss cannot be told by roles",
        ),
        (BARE, CHATS["plain"], {}, "the template wrote the turns none for messages of user"),
        (OPEN, CHATS["plain"], {}, "turn 0 of the rendered conversation has no <|im_end|>"),
        (None, CHATS["plain"][:1], {}, "there is no turn of assistant, so nothing is learned"),
        (
            None,
            [CHATS["plain"][0], {"role": "assistant", "content": "<tool_call>x"}],
            {"tool_calls": False},
            "an assistant's <tool_call> is not closed",
        ),
        (
            TEMPLATES["qwen2.5"],
            [CHATS["plain"][0], {"role": "assistant", "content": "<think>x"}],
            {"thinking": False},
            "an assistant's <think> is not closed",
        ),
        (
            TEMPLATES["qwen2.5"],
            [CHATS["plain"][0], {"role": "assistant", "content": "x</think>y"}],
            {"thinking": False},
            "an assistant's </think> has no <think> before it",
        ),
        (None, "hello", {}, "messages is a string that is not JSON"),
        (None, [{"content": "x"}], {}, "messages[0]: needs a role"),
    ],
)
def test_chats_whose_loss_cannot_be_told_are_refused(
    tokenizer, template, messages, options, message
):
    tokenizer = with_template(tokenizer, template or TEMPLATES["qwen3"])
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        encode(tokenizer, messages, TokenOptions(**options), tools=None)
    assert str(caught.value).startswith("f:1: ")


def test_template_variables_that_would_change_the_call_are_refused(tokenizer):
    for name in ("tools", "add_generation_prompt", "allow_special"):
        fields = {"messages": CHATS["plain"], "chat_template_kwargs": {name: True}}
        with pytest.raises(UserError, match=f"chat_template_kwargs: {name} cannot be set here"):
            tokenise(Record("f:1", fields), "chat", tokenizer, SourceOptions("f"), TokenOptions())
    record = Record("f:1", {"messages": CHATS["plain"], "chat_template_kwargs": [1]})
    with pytest.raises(UserError, match=r"f:1: chat_template_kwargs = \[1\] should be an object"):
        tokenise(record, "chat", tokenizer, SourceOptions("f"), TokenOptions())


def test_turns_of_random_chats_are_found(tokenizer):
    rng = np.random.default_rng(3)
    for _ in range(30):
        roles = rng.choice(["user", "assistant"], rng.integers(1, 6))
        messages = [{"role": str(r), "content": "x\n" * int(rng.integers(0, 3))} for r in roles]
        ids = tokenizer.apply_chat_template(messages, allow_special=False)
        turns = find_turns(ids, tokenizer)
        assert [turn.role for turn in turns] == list(roles)
        if "assistant" in roles:
            learned = learned_tokens(ids, messages, tokenizer, TokenOptions())
            ends = [turn.end - 1 for turn in turns if turn.role == "assistant"]
            assert learned[ends].all()
            outside = [
                i for turn in turns if turn.role == "user" for i in range(turn.start, turn.end)
            ]
            assert not learned[outside].any()
