"""The embedded model's own tasks: problems that it has never seen, with thinking and without."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qwen_jax.embedded.chats import CALCULATOR
from qwen_jax.embedded.problems import KINDS, Problem, draw
from qwen_jax.evaluation.figures import Figure, share
from qwen_jax.inference.completion import Completion, ends_inside_reasoning
from qwen_jax.text import Tokenizer, parse_reply

ANSWERS, CALLS = "answers", "calls"
ALL = "all"

# Writes a completion for each prompt of ids.
Write = Callable[[Sequence[Sequence[int]]], Sequence[Completion]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One problem, asked once.

    Attributes:
      task: answers, or calls where a calculator is at hand, and what counts is the call of it.
      kind, question: of the problem.
      thinking: whether the model was asked to think.
      expected: the right answer, or the expression to call the calculator with.
      text: all that the model wrote.
      found: its answer behind the thinking, or the expression that it called with; None where there
        is none.
      right: whether they are equal, and the text has come to its end.
      well_formed: of a call, whether it can be read and is one; of an answer, whether it is none.
      cut: whether the text had not ended after the most tokens, which never counts as right.
      num_tokens: that were written.
    """

    task: str
    kind: str
    question: str
    thinking: bool
    expected: str
    text: str
    found: str | None
    right: bool
    well_formed: bool
    cut: bool
    num_tokens: int


def held_out_problems(each: int, seed: int) -> list[Problem]:
    """So many problems of each kind that are held out of training, no question twice.

    Of a kind that has fewer there are as many as turned up in 100 draws for each that was wanted.
    """
    rng = random.Random(seed)
    problems = []
    for kind in KINDS:
        own: dict[str, Problem] = {}
        for _ in range(100 * each):
            if len(own) == each:
                break
            problem = draw(rng, kind, held_out=True)
            own.setdefault(problem.question, problem)
        problems += own.values()
    return problems


def ask(problems: Iterable[Problem], tokenizer: Tokenizer, write: Write) -> list[Answer]:
    """Asks every problem in every way: with thinking and without, and if it can be, for a call.

    Args:
      problems: to ask.
      tokenizer: of the model, with a chat template that knows `enable_thinking`.
      write: the model.
    """
    asked = [
        (problem, task, thinking)
        for problem in problems
        for task in ((ANSWERS,) if problem.expression is None else (ANSWERS, CALLS))
        for thinking in (True, False)
    ]
    prompts = [_prompt(tokenizer, *one) for one in asked]
    return [
        _grade(*one, ends_inside_reasoning(tokenizer, prompt), completion)
        for one, prompt, completion in zip(asked, prompts, write(prompts), strict=True)
    ]


def _prompt(tokenizer: Tokenizer, problem: Problem, task: str, thinking: bool) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.question}],
        tools=[CALCULATOR] if task == CALLS else None,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )


def _grade(
    problem: Problem, task: str, thinking: bool, thinking_open: bool, completion: Completion
) -> Answer:
    tools = [CALCULATOR] if task == CALLS else None
    reply = parse_reply(completion.text, thinking_open, tools)
    cut = completion.finish_reason == "length"
    if task == CALLS:
        expected, found = problem.expression, None
        well_formed = len(reply.tool_calls) == 1 and not reply.problems
        if well_formed:
            (call,) = reply.tool_calls
            found = _expression(call.name, call.arguments)
            well_formed = found is not None
    else:
        expected = problem.answer
        found = reply.content.strip() or None
        well_formed = not reply.tool_calls and not reply.problems
    return Answer(
        task=task,
        kind=problem.kind,
        question=problem.question,
        thinking=thinking,
        expected=expected,
        text=completion.text,
        found=found,
        right=well_formed and not cut and found == expected,
        well_formed=well_formed,
        cut=cut,
        num_tokens=len(completion.ids),
    )


def _expression(name: str, arguments: Any) -> str | None:
    """What a call gives the calculator, spaces left out; None for any other call."""
    if name != CALCULATOR["function"]["name"] or not isinstance(arguments, dict):
        return None
    if arguments.keys() != {"expression"} or not isinstance(arguments["expression"], str):
        return None
    return "".join(arguments["expression"].split())


def score(answers: Sequence[Answer]) -> list[Figure]:
    """The shares that are right, by kind and together, in each mode; and of calls in format."""
    figures = []
    for task in (ANSWERS, CALLS):
        own = [answer for answer in answers if answer.task == task]
        kinds = [*dict.fromkeys(answer.kind for answer in own), ALL]
        for kind in kinds if own else []:
            for thinking in (True, False):
                some = [a for a in own if kind in (a.kind, ALL) and a.thinking == thinking]
                name, mode = f"{task}, {kind}", mode_name(thinking)
                right = sum(a.right for a in some)
                figures.append(share("problems", name, f"right, {mode}", right, len(some)))
                if kind != ALL:
                    continue
                for metric, count in (
                    ("in format", sum(a.well_formed for a in some)),
                    ("cut off", sum(a.cut for a in some)),
                ):
                    figures.append(share("problems", name, f"{metric}, {mode}", count, len(some)))
    return figures


def mode_name(thinking: bool) -> str:
    """How tables and pictures call a mode."""
    return "with thinking" if thinking else "without thinking"


def as_table(answers: Sequence[Answer]) -> str:
    """The shares that are right by kind, the modes side by side, and what was cut off."""
    figures = {(f.name, f.metric): f for f in score(answers)}
    modes = [f"right, {mode_name(thinking)}" for thinking in (True, False)]
    lines = ["| problems | count | with thinking | without |", "|---|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in figures):
        own = [figures[name, mode] for mode in modes]
        cells = [f"{f.value:.1%} ({f.low:.1%} to {f.high:.1%})" for f in own]
        lines.append(f"| {name} | {own[0].count} | {' | '.join(cells)} |")
    for task in dict.fromkeys(answer.task for answer in answers):
        own = [answer for answer in answers if answer.task == task]
        cut = sum(answer.cut for answer in own)
        formed = sum(answer.well_formed for answer in own)
        lines.append(f"{task}: {formed} of {len(own)} in format, {cut} cut off (counted as wrong)")
    return "\n".join(lines)
