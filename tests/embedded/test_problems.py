"""Problems are right, their steps lead to the answer, and none is in both splits."""

import random
import re

import pytest

from qwen_jax.embedded.problems import KINDS, draw

ARITHMETIC = ("add", "subtract", "multiply")


def problems(kind, count=400, seed=0):
    rng = random.Random(seed)
    return [draw(rng, kind, rng.random() < 0.3) for _ in range(count)]


@pytest.mark.parametrize("kind", ARITHMETIC)
def test_answers_are_python_s(kind):
    for problem in problems(kind):
        # The numbers as they are asked, whatever the wording.
        assert set(re.findall(r"\d+", problem.question)) == set(
            re.findall(r"\d+", problem.expression)
        )
        assert eval(problem.expression) == int(problem.answer)
        assert problem.answer == str(int(problem.answer))


@pytest.mark.parametrize("kind", ARITHMETIC)
def test_each_step_follows_from_the_one_before(kind):
    for problem in problems(kind):
        *columns, last = problem.steps
        assert last == problem.answer
        carry, digits = "0", ""
        for column in columns:
            match = re.fullmatch(r"(\d)([-+*])(\d),(\d):(\d),(\d):(\d+)", column)
            p, sign, q, before, digit, after, so_far = match.groups()
            assert before == carry
            total = eval(f"{p}{sign}{q}") + int(before) * (-1 if sign == "-" else 1)
            assert total == int(digit) + 10 * int(after) * (-1 if sign == "-" else 1)
            digits = digit + digits
            assert so_far == digits
            carry = after
        assert int((carry if carry != "0" else "") + digits) == int(problem.answer)


def test_keys_are_those_that_the_passage_gives():
    counts = set()
    for problem in problems("look up"):
        keys = re.findall(r"([A-Z][a-z]+)(\d+)\.", problem.question)
        assert len(dict(keys)) == len(keys)
        said = [re.fullmatch(r"It says (\D+)(\d+)\.", step).groups() for step in problem.steps]
        asked = re.findall(r"[A-Z][a-z]+", problem.question.rpartition(". ")[2])
        assert [who for who, _ in said] == [word for word in asked if word in dict(keys)]
        assert (
            problem.answer.split() == [key for _, key in said] == [dict(keys)[w] for w, _ in said]
        )
        counts.add(len(said))
    assert counts == {1, 2, 3}


def test_lists_are_sorted_and_reversed():
    for problem in problems("sort"):
        numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert problem.answer.split() == [str(number) for number in sorted(numbers)]
        assert [step.split(":")[0] for step in problem.steps] == problem.answer.split()
    for problem in problems("reverse"):
        asked = problem.question.rstrip(".").split()[-len(problem.steps) :]
        asked[0] = asked[0].rpartition("：")[2]
        assert problem.answer.split() == asked[::-1]


def test_translations_go_back_and_forth():
    there, back = {}, {}
    for problem in problems("translate", 2000):
        question = re.sub("Say in (Chinese|English): | 用[中英]文怎么说？", "", problem.question)
        (there if problem.answer[0] > "z" else back)[question] = problem.answer
    both = [english for english, chinese in there.items() if chinese in back]
    assert len(both) > 100
    assert all(back[there[english]] == english for english in both)


@pytest.mark.parametrize("kind", KINDS)
def test_no_problem_is_in_both_splits(kind):
    rng = random.Random(3)
    trained = {draw(rng, kind, False).operands for _ in range(1500)}
    held_out = {draw(rng, kind, True).operands for _ in range(300)}
    assert not trained & held_out
    if kind in ("add", "multiply", "sort"):
        # Nor with its operands the other way round.
        assert all(text.split() == sorted(text.split(), key=int) for text in trained | held_out)
    share = sum(KINDS[kind](rng).held_out for _ in range(3000)) / 3000
    assert 0.05 < share < 0.2
