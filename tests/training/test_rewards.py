"""What answers are worth, and rewards that are refused."""

import pytest

from qwen_jax.errors import UserError
from qwen_jax.training.data.records import Record
from qwen_jax.training.rewards import RewardOptions, exact, judge, well_formed

RECORD = Record("prompts.jsonl:7", {"answer": " 42\n"})


@pytest.mark.parametrize(
    ("text", "is_exact", "is_formed"),
    [
        ("42", 1, 1),
        ("<think>\n6 * 7\n</think>\n\n42\n", 1, 1),
        ("<think>\n42\n</think>\n\n43", 0, 1),
        ("42 or so", 0, 1),
        # Thinking that never ends, ends twice, or hides behind the answer.
        ("<think>\n42", 0, 0),
        ("<think>\na\n</think>\nb\n</think>\n\n42", 0, 0),
        ("42<think>", 0, 0),
        ("<think>\n42\n</think>\n\n", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_answer_behind_the_thinking_counts(text, is_exact, is_formed):
    assert exact(RECORD.fields, text) == is_exact
    assert well_formed(RECORD.fields, text) == is_formed


def half(record, text):
    return 0.5 if text else float("nan")


def test_rewards_are_summed_by_weight_and_reported_without():
    own = RewardOptions(f"{__name__}:half", -1.0)
    terms = (RewardOptions("exact", 2.0), RewardOptions("format", 0.1), own)
    total, values = judge(terms, RECORD, "42")
    assert total == pytest.approx(2 + 0.1 - 0.5)
    assert values == {"exact": 1, "format": 1, own.name: 0.5}
    with pytest.raises(UserError, match=r"prompts.jsonl:7: reward .*:half is nan; give finite"):
        judge((own,), RECORD, "")
    with pytest.raises(UserError, match=r"prompts.jsonl:7: answer = 42; the reward exact"):
        judge((RewardOptions("exact"),), Record(RECORD.name, {"answer": 42}), "42")


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("exakt", 1.0, r"reward exakt is not known; did you mean exact\? MODULE:FUNCTION names"),
        ("zzz", 1.0, "reward zzz is not known; known: exact, format; MODULE:FUNCTION names"),
        ("no_such_module:f", 1.0, "reward no_such_module:f: cannot be imported"),
        (f"{__name__}:nothing", 1.0, "cannot be imported"),
        (f"{__name__}:RECORD", 1.0, "is no function"),
        ("exact", 0.0, "reward exact: weight = 0.0 must be a number but 0"),
    ],
)
def test_rewards_that_are_none_are_refused(name, weight, message):
    with pytest.raises(UserError, match=message):
        RewardOptions(name, weight)
