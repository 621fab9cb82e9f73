"""The embedded model's problems: which are asked, how, and what counts as right."""

import json

import pytest

import qwen_jax
from qwen_jax.embedded.chats import CALCULATOR
from qwen_jax.embedded.problems import KINDS, Problem
from qwen_jax.embedded.tokenizer import write_tokenizer
from qwen_jax.evaluation.pictures import draw_problems
from qwen_jax.evaluation.problems import as_table, ask, held_out_problems, score
from qwen_jax.inference.completion import Completion

ADD = Problem("add", "1 2", "1+2=?", ("1+2,0:3,0:3", "3"), "3", "1+2")
SORT = Problem("sort", "2 1", "Sort 2 1.", ("1:2", "2:"), "1 2")


def call(name="calculator", **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [problem.question for problem in held_out_problems(20, 0)]
    write_tokenizer(directory, texts, 400)
    (directory / "config.json").write_text(json.dumps({"vocab_size": 400}))
    return qwen_jax.load_tokenizer(directory)


def asked(tokenizer, problem, replies):
    """The answers where the model writes `replies`, by (calculator, thinking)."""

    def write(prompts):
        found = []
        for ids in prompts:
            prompt = tokenizer.decode(ids)
            mode = ("<tools>" in prompt, not prompt.endswith("</think>\n\n"))
            text, reason = replies[mode]
            found.append(Completion(text, tokenizer.encode(text), reason))
        return found

    answers = ask([problem], tokenizer, write)
    return {(answer.task == "calls", answer.thinking): answer for answer in answers}


def test_problems_are_held_out_and_no_question_comes_twice():
    problems = held_out_problems(30, seed=3)
    assert all(problem.held_out for problem in problems)
    assert len({problem.question for problem in problems}) == len(problems)
    counts = {kind: sum(p.kind == kind for p in problems) for kind in KINDS}
    assert counts == dict.fromkeys(KINDS, 30)
    assert held_out_problems(30, seed=3) == problems
    assert held_out_problems(30, seed=4) != problems
    # There are not so many translations.
    many = held_out_problems(400, seed=0)
    assert 50 < sum(p.kind == "translate" for p in many) < 400


def test_each_problem_is_asked_in_both_modes_as_the_model_learned_them(tokenizer):
    prompts = []

    def write(given):
        prompts.extend(tokenizer.decode(ids) for ids in given)
        return [Completion("", [], "stop")] * len(given)

    ask([SORT, ADD], tokenizer, write)
    expected = []
    for problem, tools in ((SORT, None), (ADD, None), (ADD, [CALCULATOR])):
        messages = [{"role": "user", "content": problem.question}]
        for thinking in (True, False):
            expected.append(
                tokenizer.apply_chat_template(
                    messages, tools, True, tokenize=False, enable_thinking=thinking
                )
            )
    assert prompts == expected
    assert len(set(prompts)) == 6


@pytest.mark.parametrize(
    ("text", "reason", "right", "found"),
    [
        ("<think>\n1+2,0:3,0:3\n3\n</think>\n\n3", "stop", True, "3"),
        ("<think>\n3\n</think>\n\n 3 \n", "stop", True, "3"),
        ("<think>\n3\n</think>\n\n4", "stop", False, "4"),
        ("<think>\n3\n</think>\n\n3", "length", False, "3"),
        ("<think>\n3", "length", False, None),
        ("<think>\n3\n</think>\n\n", "stop", False, None),
        ("<think>\n3\n</think>\n\n3 or 4", "stop", False, "3 or 4"),
        ("3", "stop", True, "3"),
        ("3<think>", "stop", False, "3<think>"),
        ("<think>\n\n</think>\n\n3" + call(expression="1+2"), "stop", False, "3"),
    ],
)
def test_the_answer_is_what_stands_behind_the_thinking(tokenizer, text, reason, right, found):
    """And counts if it is the right one and the text has come to its end."""
    replies = {(tool, thinking): (text, reason) for tool in (0, 1) for thinking in (0, 1)}
    answer = asked(tokenizer, ADD, replies)[False, True]
    assert (answer.right, answer.found, answer.cut) == (right, found, reason == "length")
    assert (answer.text, answer.expected, answer.kind) == (text, "3", "add")


@pytest.mark.parametrize(
    ("text", "reason", "well_formed", "right"),
    [
        (call(expression="1+2"), "stop", True, True),
        ("<think>\nThe calculator can.\n</think>\n\n" + call(expression="1 + 2"), "stop", 1, True),
        (call(expression="1+3"), "stop", True, False),
        (call(expression="1+2"), "length", True, False),
        (call("sums", expression="1+2"), "stop", False, False),
        (call(expression="1+2", also="x"), "stop", False, False),
        (call(expression=3), "stop", False, False),
        (call(expression="1+2") + "\n" + call(expression="1+2"), "stop", False, False),
        ('<tool_call>\n{"name": "calculator", "argu', "length", False, False),
        ("3", "stop", False, False),
        ("1+2", "stop", False, False),
    ],
)
def test_a_call_counts_in_format_and_with_the_right_expression(
    tokenizer, text, reason, well_formed, right
):
    replies = {(tool, thinking): (text, reason) for tool in (0, 1) for thinking in (0, 1)}
    answer = asked(tokenizer, ADD, replies)[True, True]
    assert (answer.task, answer.expected) == ("calls", "1+2")
    assert (answer.well_formed, answer.right) == (well_formed, right)


def test_shares_are_of_each_kind_and_mode(tokenizer, tmp_path):
    replies = {
        (False, True): ("<think>\n\n</think>\n\n3", "stop"),
        (False, False): ("3", "length"),
        (True, True): (call(expression="1+2"), "stop"),
        (True, False): ("no", "stop"),
    }
    answers = [*asked(tokenizer, ADD, replies).values(), *asked(tokenizer, SORT, replies).values()]
    found = {(f.name, f.metric): (f.value, f.count) for f in score(answers)}
    assert found["answers, add", "right, with thinking"] == (1, 1)
    assert found["answers, sort", "right, with thinking"] == (0, 1)
    assert found["answers, all", "right, with thinking"] == (0.5, 2)
    assert found["answers, all", "right, without thinking"] == (0, 2)
    assert found["answers, all", "cut off, without thinking"] == (1, 2)
    assert found["calls, add", "right, with thinking"] == (1, 1)
    assert found["calls, all", "in format, with thinking"] == (1, 1)
    assert found["calls, all", "in format, without thinking"] == (0, 1)
    assert ("calls, sort", "right, with thinking") not in found
    table = as_table(answers)
    assert "| answers, all | 2 | 50.0% (9.5% to 90.5%) | 0.0% (0.0% to 65.8%) |" in table
    assert "answers: 4 of 4 in format, 2 cut off (counted as wrong)" in table
    draw_problems(answers, "m", tmp_path / "problems.png")
    assert (tmp_path / "problems.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1
