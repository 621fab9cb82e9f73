"""The worked examples of the README, run as they stand there."""

import dataclasses
import re
import types
from pathlib import Path

import pytest

from qwen_jax.text import file_infill, repository_infill
from qwen_jax.text.chat import ChatTemplates
from qwen_jax.text.template_engine import Template

from .chat_templates import CODER, QWEN3, QWEN25

README = Path(__file__).parents[2] / "README.md"
HERMES = """\
<think>
Two cities, two calls.
</think>

Let me look.
<tool_call>
{"name": "temperature", "arguments": {"city": "Oslo"}}
</tool_call>
<tool_call>
{"name": "temperature", "arguments": {"city": "Cairo", "unit": "celsius"}}
</tool_call><|im_end|>"""
XML = """\
Let me look.
<tool_call>
<function=temperature>
<parameter=city>
Oslo
</parameter>
</function>
</tool_call>
<tool_call>
<function=temperature>
<parameter=city>
Cairo
</parameter>
<parameter=unit>
celsius
</parameter>
</function>
</tool_call><|im_end|>"""
ANSWER = "Oslo has 4, Cairo 31 degrees."


def block(name):
    (code,) = re.findall(rf"^```python {name}\n(.*?)^```", README.read_text(), re.DOTALL | re.M)
    return code


class Model:
    """Stands for the model: gives replies in turn and keeps what it was asked."""

    def __init__(self, tokenizer, replies):
        self.tokenizer, self.replies, self.prompts = tokenizer, list(replies), []

    def generate(self, model, params, prompts, **options):
        self.prompts += [self.tokenizer.decode(ids) for ids in prompts]
        return [self.tokenizer.encode(self.replies.pop(0)) for _ in prompts]


def run(code, tokenizer, replies):
    model = Model(tokenizer, replies)
    package = types.SimpleNamespace(generate=model.generate)
    scope = {"qwen_jax": package, "tokenizer": tokenizer, "model": None, "params": None}
    exec(compile(code, str(README), "exec"), scope)
    return scope, model.prompts


@pytest.mark.parametrize(
    ("template", "reply"),
    [(QWEN3, HERMES), (QWEN25, HERMES), (CODER, XML)],
    ids=["thinking", "hermes", "xml"],
)
def test_a_tool_call_goes_there_and_back(qwen3, capsys, template, reply):
    tokenizer = dataclasses.replace(
        qwen3, chat_templates=ChatTemplates({"default": Template(template, "test")})
    )
    scope, (first, second) = run(block("tool-call"), tokenizer, [reply, ANSWER])
    assert capsys.readouterr().out == ANSWER + "\n"
    assert "The temperature in a city now." in first
    calls = [call.arguments for call in scope["reply"].tool_calls]
    assert calls == [{"city": "Oslo"}, {"city": "Cairo", "unit": "celsius"}]
    # The template writes the reply as the model wrote it, and the two results in one turn.
    said = reply.partition("</think>\n\n")[2] or reply if template == QWEN25 else reply
    turn = second[len(first) :]
    assert "".join(turn.split()).startswith("".join(said.split()))
    for result in ("4.0", "31.0"):
        assert f"<tool_response>\n{result}\n</tool_response>" in turn


def test_a_hole_is_filled_in(qwen3):
    scope, prompts = run(block("infill"), qwen3, ["PI", "def area(r): ..."])
    assert [qwen3.decode(ids) for ids in scope["middle"]] == ["PI", "def area(r): ..."]
    ids = file_infill(qwen3, "def area(r):\n    return ", "\n\nprint(area(2))\n")
    assert prompts[0] == qwen3.decode(ids)
    ids = repository_infill(
        qwen3,
        "shapes",
        [("constants.py", "PI = 3.14159\n")],
        "area.py",
        "from constants import PI\n",
        "\nprint(area(2))\n",
    )
    assert prompts[1] == qwen3.decode(ids)
