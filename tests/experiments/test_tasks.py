"""Tasks on long texts, before they are texts: RULER's settings, and that answers follow."""

from collections import Counter

import numpy as np
import pytest

from experiments.long_context.tasks import (
    LOSSES,
    TASKS,
    CommonWordsTask,
    FrequentWordsTask,
    NeedleTask,
    Question,
    QuestionTask,
    TermKind,
    VariableTask,
    find_tasks,
)
from qwen_jax.errors import UserError

WORD, NUMBER, UUID = TermKind.WORD, TermKind.NUMBER, TermKind.UUID


def rng(seed=0):
    return np.random.default_rng(seed)


def test_settings_are_those_of_ruler_s_published_configuration():
    """Haystack, kinds of keys and values, how many keys, values and queries; hops; frequencies."""
    niah = {
        "niah_single_1": ("noise", WORD, NUMBER, 1, 1, 1),
        "niah_single_2": ("essay", WORD, NUMBER, 1, 1, 1),
        "niah_single_3": ("essay", WORD, UUID, 1, 1, 1),
        "niah_multikey_1": ("essay", WORD, NUMBER, 4, 1, 1),
        "niah_multikey_2": ("needles", WORD, NUMBER, 1, 1, 1),
        "niah_multikey_3": ("needles", UUID, UUID, 1, 1, 1),
        "niah_multivalue": ("essay", WORD, NUMBER, 1, 4, 1),
        "niah_multiquery": ("essay", WORD, NUMBER, 1, 1, 4),
    }
    for name, settings in niah.items():
        assert TASKS[name] == NeedleTask(*settings)
    assert TASKS["vt"] == VariableTask(num_chains=1, num_hops=4)
    assert TASKS["cwe"] == CommonWordsTask(num_common=10, common_times=30, other_times=3)
    assert TASKS["fwe"] == FrequentWordsTask(alpha=2.0, num_asked=3)


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_the_values_of_the_keys_that_are_asked_for(name, seed):
    task = TASKS[name]
    content = task.draw(rng(seed), 0.25)
    facts = [needle.sentence.terms for needle in content.needles]
    assert len(facts) == max(task.num_keys, task.num_queries) * task.num_values
    assert len({value for _, value in facts}) == len(facts)
    assert len(content.asked) == task.num_queries
    assert len(content.answers) == task.num_queries * task.num_values
    assert content.needles[0].depth == 0.25
    assert content.needles[0].sentence.terms[0] in content.asked
    for answer in content.answers:
        assert any(value == answer and key in content.asked for key, value in facts)
    if task.num_values > 1:
        depth = {n.sentence.terms[1]: n.depth for n in content.needles}
        depths = [depth[answer] for answer in content.answers]
        assert depths == sorted(depths)
    else:
        assert [dict(facts)[key] for key in content.asked] == list(content.answers)


def test_a_variable_is_set_before_the_next_is_set_to_it():
    content = VariableTask(num_chains=2, num_hops=3).draw(rng(), None)
    assert len(content.needles) == 8
    source = {n.sentence.terms[0]: (n.sentence.terms[1], n.depth) for n in content.needles}
    last, previous = content.asked[0], 0.0
    for name in content.answers:
        assert source[name][0] == last and source[name][1] >= previous
        last, previous = name, source[name][1]
    assert len(content.answers) == 4


@pytest.mark.parametrize("count", [330, 900, 5000])
def test_common_words_occur_as_often_as_said(count):
    content = CommonWordsTask().draw(rng(2), None)
    (listed,) = content.body(count)
    times = Counter(listed.terms)
    assert [times[word] for word in content.answers] == [30] * 10
    assert {times[word] for word in set(times) - set(content.answers)} == {3}
    assert count - 3 < len(listed.terms) <= count
    with pytest.raises(UserError, match="too short for 10 that occur 30 times each"):
        content.body(301)


@pytest.mark.parametrize("count", [10, 200, 5000])
def test_of_frequent_words_the_first_three_are_the_most_frequent(count):
    content = FrequentWordsTask().draw(rng(3), None)
    (listed,) = content.body(count)
    ranked = Counter(listed.terms).most_common(4)
    assert [word for word, _ in ranked[:3]] == list(content.answers)
    times = [n for _, n in ranked]
    assert times[0] > times[1] > times[2] and times[2] > (times[3] if len(times) > 3 else 0)
    if count == 5000:
        # Zeta(2) up to 2,000: 1 / sum of k ** -2.
        assert times[0] / len(listed.terms) == pytest.approx(6 / np.pi**2, rel=0.02)


def test_names_of_tasks_and_groups():
    assert tuple(find_tasks(["niah", "vt", "niah_single_1"])) == (
        *(name for name in TASKS if name.startswith("niah")),
        "vt",
    )
    assert set(find_tasks(["ruler"])) == set(TASKS) - {"passkey", "recall", *LOSSES}
    own = (Question("Who?", "Ann", ("Ann came.",)),)
    assert len(find_tasks(["ruler"], [own, own])) == 13
    assert find_tasks(["qa_1"], [own]) == {"qa_1": QuestionTask(own)}
    with pytest.raises(UserError, match="--tasks=qa is unknown; known: niah, ruler, passkey"):
        find_tasks(["qa"])
    with pytest.raises(UserError, match="--tasks=qa_2 needs a file of questions"):
        find_tasks(["qa_2"], [own])
