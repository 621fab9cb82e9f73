"""Problems as conversations: each asked with thinking and without, and some with a calculator."""

import random
from collections.abc import Iterator
from typing import Any

from qwen_jax.embedded.problems import Problem, draw

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes an expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}

# Of how many problems one is of a kind: what takes the most learning has the most.
_SHARES = {
    "add": 21,
    "subtract": 21,
    "multiply": 18,
    "look up": 16,
    "sort": 10,
    "reverse": 7,
    "translate": 7,
}
# Of the problems with an expression, how many are asked with a calculator at hand.
_WITH_CALCULATOR = 0.08


def chats(seed: int, count: int, held_out: bool) -> Iterator[dict[str, Any]]:
    """Each of `count` problems with thinking and without, as JSONL takes them.

    Of each record the last turn is to be learned. A problem with a calculator is two records: up to
    the call, and up to the answer. Learned from one, the call would not be behind what a prompt
    without thinking ends with: the template writes that before the last turn only.
    """
    rng = random.Random(seed)
    kinds, shares = list(_SHARES), list(_SHARES.values())
    for _ in range(count):
        problem = draw(rng, *rng.choices(kinds, shares), held_out)
        with_tool = problem.expression is not None and rng.random() < _WITH_CALCULATOR
        for thinking in (True, False):
            if with_tool:
                yield from tool_chats(problem, thinking)
            else:
                yield chat(problem, thinking)


def chat(problem: Problem, thinking: bool) -> dict[str, Any]:
    """A question and its answer, the steps before it as thinking."""
    answer = {"role": "assistant", "content": problem.answer}
    if thinking:
        answer["reasoning_content"] = "\n".join(problem.steps)
    messages = [{"role": "user", "content": problem.question}, answer]
    return {"messages": messages, "enable_thinking": thinking}


def tool_chats(problem: Problem, thinking: bool) -> list[dict[str, Any]]:
    """A question with a calculator at hand and its call; then with its result and the answer."""
    call = {"name": "calculator", "arguments": {"expression": problem.expression}}
    reasons = ({"reasoning_content": text} for text in ("The calculator can do it.", "Done."))
    first, last = reasons if thinking else ({}, {})
    messages = [
        {"role": "user", "content": problem.question},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
            **first,
        },
        {"role": "tool", "content": problem.answer},
        {"role": "assistant", "content": problem.answer, **last},
    ]
    return [
        {"messages": part, "tools": [CALCULATOR], "enable_thinking": thinking}
        for part in (messages[:2], messages)
    ]
