"""The main job on the model that the package brings along: load it, check it, talk to it.

    python -m tools.demo

It is a Qwen3 of 1.9 M parameters. The problems that it is asked here are held out of its training.
"""

import re
import textwrap
import time
from typing import Any

import jax
import numpy as np
from absl import flags

import qwen_jax
from qwen_jax.checkpoint.hub import EMBEDDED, resolve_source
from qwen_jax.embedded.chats import CALCULATOR
from qwen_jax.errors import UserError
from qwen_jax.evaluation.problems import held_out_problems
from qwen_jax.inference.completion import complete, ends_inside_reasoning
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.defaults import load_generation_defaults
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import init_cache
from qwen_jax.text import Reply, parse_reply
from tools import command_line

_SEED = flags.DEFINE_integer("seed", 0, "Of the problems.", lower_bound=0)

_TOLERANCE = 1e-4
_WIDTH = 48
_MOST_NEW_TOKENS = 256


def main() -> None:
    """Runs the demonstration."""
    start = time.perf_counter()
    model, params = qwen_jax.load_pretrained(EMBEDDED)
    tokenizer = qwen_jax.load_tokenizer(EMBEDDED)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    elapsed = time.perf_counter() - start
    print(f"Loaded {count / 1e6:.1f} M parameters in {elapsed:.2f} s on {jax.devices()[0]}.")

    problems = held_out_problems(1, _SEED.value)
    difference = _cached_against_full(model, params, tokenizer.encode(problems[0].question))
    print(f"Checked: token by token equals one pass within {difference:.1e}.")
    if not difference <= _TOLERANCE:
        raise UserError(f"the check failed: {difference} is above {_TOLERANCE}")

    speaker = _Speaker(model, params, tokenizer)
    for problem in problems:
        replies = [speaker.say(problem.question, thinking) for thinking in (True, False)]
        cells = [_as_text(reply, problem.answer) for reply in replies]
        print(f"\nuser: {problem.question}")
        _print_side_by_side(["with thinking", *cells[0]], ["without", *cells[1]])
    _call_a_tool(speaker, next(p for p in problems if p.expression is not None))
    rates = [timing.tokens_per_s for timing in speaker.timings]
    print(f"\nA token at a time, once compiled: {max(rates):.0f} tokens/s.")


class _Speaker:
    """A model that is asked by conversations."""

    def __init__(self, model: Decoder, params: Any, tokenizer: qwen_jax.text.Tokenizer):
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._defaults = load_generation_defaults(resolve_source(EMBEDDED))
        self.timings = []

    def say(self, messages: str | list[dict[str, Any]], thinking: bool, tools=None) -> Reply:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prompt = self._tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking
        )
        stream = TokenStream(
            self._model,
            self._params,
            [prompt],
            _MOST_NEW_TOKENS,
            self._defaults.options,
            self._defaults.stop_ids,
        )
        (completion,), timing = complete(stream, 1, self._tokenizer)
        self.timings.append(timing)
        return parse_reply(completion.text, ends_inside_reasoning(self._tokenizer, prompt), tools)


def _as_text(reply: Reply, answer: str) -> list[str]:
    """Lines of a reply, marked by whether it is right."""
    lines = []
    if reply.reasoning is not None:
        lines = ["<think>", *reply.reasoning.strip().splitlines(), "</think>"]
    content = reply.content.strip()
    verdict = "right" if content == answer else f"wrong: it is {answer}"
    return [*lines, f"{content}   ({verdict})"]


def _print_side_by_side(left: list[str], right: list[str]) -> None:
    columns = [
        [line for text in column for line in textwrap.wrap(text, _WIDTH) or [""]]
        for column in (left, right)
    ]
    for i in range(max(map(len, columns))):
        a, b = (column[i] if i < len(column) else "" for column in columns)
        # Chinese characters are two columns wide.
        padding = _WIDTH - len(a) - sum(ord(c) > 0x2E7F for c in a)
        print(f"  {a}{' ' * padding} | {b}".rstrip())


def _call_a_tool(speaker: _Speaker, problem: Any) -> None:
    """One problem with the calculator at hand: the call, its result, the answer."""
    messages = [{"role": "user", "content": problem.question}]
    print(f"\nuser: {problem.question}   (a calculator is at hand)")
    reply = speaker.say(messages, True, [CALCULATOR])
    if len(reply.tool_calls) != 1:
        print(f"assistant: {reply.content.strip()}   (no call)")
        return
    (call,) = reply.tool_calls
    print(f"assistant calls {call.name}: {call.arguments}")
    result = _calculate(call.arguments.get("expression", ""))
    print(f"tool: {result}")
    function = {"name": call.name, "arguments": call.arguments}
    messages += [
        {
            "role": "assistant",
            "content": reply.content,
            "reasoning_content": (reply.reasoning or "").strip(),
            "tool_calls": [{"type": "function", "function": function}],
        },
        {"role": "tool", "content": result},
    ]
    print(f"assistant: {speaker.say(messages, True, [CALCULATOR]).content.strip()}")


def _calculate(expression: str) -> str:
    found = re.fullmatch(r"\s*(\d+)\s*([+*-])\s*(\d+)\s*", expression)
    if not found:
        return f"cannot compute {expression!r}"
    a, sign, b = int(found[1]), found[2], int(found[3])
    return str({"+": a + b, "-": a - b, "*": a * b}[sign])


def _cached_against_full(model: Decoder, params: Any, ids: list[int]) -> float:
    """Largest difference of logits between one pass and a token at a time."""
    variables = {"params": params}
    with jax.default_matmul_precision("highest"):
        full = model.apply(variables, np.array([ids])).logits
        step = jax.jit(model.apply)
        cache = init_cache(model.config, 1, len(ids), full.dtype)
        worst = 0.0
        for i, token in enumerate(ids):
            out = step(variables, np.array([[token]]), cache=cache)
            cache = out.cache
            worst = max(worst, float(abs(out.logits[0, 0] - full[0, i]).max()))
    return worst


if __name__ == "__main__":
    command_line.run(main)
