"""The embedded model's problems in every form that a recipe of training learns from.

Texts for pretraining: questions with their answers; the same with the steps between; and long ones,
in which a question is about something far before it. Conversations for fine-tuning. Pairs of a
right and a wrong answer for preferences. Of lists to reverse, questions beside what is right for
rewards, and short conversations to begin with.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_jax.embedded.chats import chat, chats
from qwen_jax.embedded.problems import KINDS, Problem, draw

Records = Iterator[dict[str, Any]]

# Problems of a text, and of a long one.
_FEW, _MANY = 3, 24
# What a small model soon gets right now and then without thinking, and the more so the shorter the
# list: so that answers to one question differ in what they are worth.
_SHORT = "reverse"


def general(seed: int, count: int, held_out: bool) -> Records:
    """Texts of a few questions with their answers."""
    return _texts(seed, count, held_out, lambda p: f"{p.question}\n{p.answer}\n")


def reasoning(seed: int, count: int, held_out: bool) -> Records:
    """Texts of a few questions with steps and answers."""
    return _texts(
        seed, count, held_out, lambda p: "\n".join([p.question, *p.steps, p.answer]) + "\n"
    )


def long(seed: int, count: int, held_out: bool) -> Records:
    """Texts of many questions, and behind them the answers in the same order."""
    rng = random.Random(seed)
    for _ in range(count):
        problems = _problems(rng, _MANY, held_out)
        questions = [f"{i}) {p.question}" for i, p in enumerate(problems, 1)]
        answers = [f"{i}) {p.answer}" for i, p in enumerate(problems, 1)]
        yield {"text": "\n".join([*questions, "", *answers, ""])}


def pairs(seed: int, count: int, held_out: bool) -> Records:
    """A question, the right answer and a wrong one of the same form."""
    rng = random.Random(seed)
    for problem in _problems(rng, count, held_out):
        prompt = [{"role": "user", "content": problem.question}]
        right, wrong = problem.answer, _wrong(rng, problem)
        chosen, rejected = ({"role": "assistant", "content": text} for text in (right, wrong))
        yield {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "enable_thinking": False,
        }


def short_chats(seed: int, count: int, held_out: bool) -> Records:
    """A short question and the right answer, without thinking."""
    for problem in _short_problems(seed, count, held_out):
        yield chat(problem, thinking=False)


def questions(seed: int, count: int, held_out: bool) -> Records:
    """A short question as a prompt, and beside it the right answer, other ones than the chats'."""
    for problem in _short_problems(seed + 1, count, held_out):
        prompt = [{"role": "user", "content": problem.question}]
        yield {"messages": prompt, "answer": problem.answer, "enable_thinking": False}


SAMPLES: dict[str, Callable[[int, int, bool], Records]] = {
    "general": general,
    "reasoning": reasoning,
    "long": long,
    "chats": chats,
    "pairs": pairs,
    "short_chats": short_chats,
    "questions": questions,
}


def write_samples(directory: Path, count: int, held_out: int, seed: int) -> None:
    """Writes `NAME.jsonl` and `NAME_held_out.jsonl` of each of `SAMPLES`.

    Args:
      directory: that gets them.
      count: records of each; of conversations, problems.
      held_out: the same of those that nothing is trained on; of long texts a quarter as many.
      seed: of all of them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in SAMPLES.items():
        few = -(-held_out // 4) if make is long else held_out
        for ending, number, is_held_out in (("", count, False), ("_held_out", few, True)):
            path = directory / f"{name}{ending}.jsonl"
            temporary = path.with_suffix(".tmp")
            with temporary.open("w", encoding="utf-8") as file:
                for record in make(seed, number, is_held_out):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            temporary.replace(path)


def _problems(rng: random.Random, count: int, held_out: bool) -> list[Problem]:
    return [draw(rng, rng.choice(list(KINDS)), held_out) for _ in range(count)]


def _short_problems(seed: int, count: int, held_out: bool) -> list[Problem]:
    rng = random.Random(seed)
    return [draw(rng, _SHORT, held_out) for _ in range(count)]


def _texts(seed: int, count: int, held_out: bool, write: Callable[[Problem], str]) -> Records:
    rng = random.Random(seed)
    for _ in range(count):
        yield {"text": "".join(write(problem) for problem in _problems(rng, _FEW, held_out))}


def _wrong(rng: random.Random, problem: Problem) -> str:
    """The right answer with another digit in it; without digits, that of another problem."""
    places = [i for i, character in enumerate(problem.answer) if character in "0123456789"]
    if places:
        place = rng.choice(places)
        others = [digit for digit in "0123456789" if digit != problem.answer[place]]
        return f"{problem.answer[:place]}{rng.choice(others)}{problem.answer[place + 1 :]}"
    while (other := draw(rng, problem.kind, problem.held_out).answer) == problem.answer:
        pass
    return other
