"""Tasks as texts: lengths, places of needles, and answers behind their question."""

import json
import re

import numpy as np
import pytest

from experiments.long_context.scoring import Draw, make_example
from experiments.long_context.tasks import (
    LOSSES,
    NUM_TERMS,
    TASKS,
    Question,
    QuestionTask,
    Term,
    TermKind,
)
from experiments.long_context.text import (
    TextRenderer,
    project_text,
    read_haystack,
    read_questions,
    word,
)
from qwen_jax.errors import UserError

ESSAY = "One came. Two went? Three of them stayed! And that was all there was to it."


class Bytes:
    """A token a byte."""

    def encode(self, text):
        return list(text.encode())


def text_of(ids):
    return bytes(ids).decode()


def render(name, length, depth=None, seed=0):
    rng = np.random.default_rng(seed)
    content = TASKS[name].draw(rng, depth)
    return content, TextRenderer(Bytes(), ESSAY).render(content, length, rng)


@pytest.mark.parametrize("kind", TermKind)
@pytest.mark.parametrize("form", ["fact", "pass_key"])
def test_terms_of_a_kind_differ(kind, form):
    assert len({word(Term(kind, i), form) for i in range(NUM_TERMS)}) == NUM_TERMS


ASKED_BEHIND = [name for name in TASKS if name != "recall" and name not in LOSSES]


@pytest.mark.parametrize("name", ASKED_BEHIND)
@pytest.mark.parametrize("length", [8_000, 12_345])
def test_texts_are_as_long_as_asked_and_end_with_their_answers(name, length):
    content, example = render(name, length)
    assert length - 200 < len(example.ids) <= length
    answers = [text_of(example.ids[a:b]).strip(" ,") for a, b in example.answers]
    assert answers == [word(term, content.question) for term in content.answers]
    assert example.answers[-1][1] == len(example.ids)
    text = text_of(example.ids)
    question = text[: example.start].rsplit("\n\n", 1)[1]
    for term in content.asked:
        assert word(term) in question
    # Every answer can be read off the text before the question.
    for answer in answers:
        assert answer in text[: example.start - len(question)]


def test_recall_asks_on_the_way_for_what_was_said():
    content, example = render("recall", 9_000)
    assert 8_800 < len(example.ids) <= 9_000 and len(example.answers) == 8
    text = text_of(example.ids)
    facts = dict(re.findall(r" The code of (\S+) is (\S+)\.", text))
    assert len(facts) == 8
    for begin, end in example.answers:
        asked = re.search(r" What is the code of (\S+)\? It is$", text[:begin])
        answer = text[begin:end].strip()
        assert facts[asked[1]] == answer
        assert text.index(f" The code of {asked[1]} is {answer}.") < begin
    assert {facts[word(key)] for key in content.asked} == {word(v) for v in content.answers}


def test_losses_are_of_filler_from_any_place():
    essay = " ".join(f"Number {i} came. Then {i} went?" for i in range(200))
    renderer, rng = TextRenderer(Bytes(), essay), np.random.default_rng(4)
    for name, spans in (("loss", 16), ("window_loss", 1), ("key_loss", 1)):
        example = renderer.render(TASKS[name].draw(rng, None), 1_003, rng)
        assert len(example.ids) == 1_003 and len(example.answers) == spans
        assert example.answers[-1][1] == 1_003
        assert text_of(example.ids) in f" {essay} {essay}"


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_needles_stand_at_their_depth(depth, place):
    content, example = render("niah_single_1", 20_000, depth)
    text = text_of(example.ids[: example.start])
    body = text[text.index("\n\n") + 2 : text.rindex("\n\n")]
    needle = f" The code of {word(content.asked[0])} is {word(content.answers[0])}."
    assert body.count(needle) == 1
    before, after = (len(part) for part in body.split(needle))
    assert before / (before + after) == pytest.approx(place, abs=0.01)


def test_of_facts_as_filler_none_is_about_what_is_asked_for():
    content, example = render("niah_multikey_3", 30_000)
    text = text_of(example.ids[: example.start])
    facts = re.findall(r" The code of (\S+) is (\S+)\.", text)
    assert len(facts) > 200
    asked = word(content.asked[0])
    assert [value for key, value in facts if key == asked] == [word(content.answers[0])]
    assert sum(value == word(content.answers[0]) for _, value in facts) == 1


def test_essays_are_the_user_s_or_the_project_s(tmp_path):
    _, example = render("niah_single_2", 4_000)
    text = text_of(example.ids)
    assert text.count("Three of them stayed!") > 10
    own = project_text()
    assert len(own) > 100_000 and "attention" in own
    path = tmp_path / "own.txt"
    path.write_text("Ours.")
    assert read_haystack(path) == "Ours."
    path.write_text(" \n")
    with pytest.raises(UserError, match="has no text"):
        read_haystack(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read as text"):
        read_haystack(path)


@pytest.mark.parametrize("name", [*ASKED_BEHIND, "recall"])
def test_what_does_not_fit_is_refused(name):
    with pytest.raises(UserError, match=r"too short .*; give longer --lengths"):
        render(name, 50)


def test_documents_of_other_questions_are_the_filler(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"Who is number {i}?", "answer": f"Ann{i}",
             "documents": [f"Number {i} is Ann{i}.", f"And {i} is more than {i - 1}."]}
            for i in range(40)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = QuestionTask(read_questions(path))
    rng = np.random.default_rng(1)
    content = task.draw(rng, None)
    example = TextRenderer(Bytes(), ESSAY).render(content, 1500, rng)
    assert 1400 < len(example.ids) <= 1500
    text = text_of(example.ids)
    number = int(re.search(r"Who is number (\d+)\? The answer is", text)[1])
    assert text.endswith(f"The answer is Ann{number}")
    assert text_of(example.ids[example.start :]) == f" Ann{number}"
    for document in rows[number]["documents"]:
        assert text.count(f"Document: {document}\n\n") == 1
    documents = re.findall(r"Document: (.*)\n", text)
    assert len(documents) == len(set(documents)) > 30
    with pytest.raises(UserError, match="too short for the documents of a question"):
        TextRenderer(Bytes(), ESSAY).render(content, 150, rng)
    for bad in ({"question": "Who?"}, {**rows[0], "documents": []}, {**rows[0], "answer": " "}):
        path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(UserError, match=r"questions\.jsonl:2: question, answer and documents"):
            read_questions(path)
    path.write_text('{"question": "Who?", "answer": "Ann", "context": "Ann came."}\n')
    assert read_questions(path)[0].documents == ("Ann came.",)


def test_filler_whose_sentences_do_not_end_fills_a_text():
    essay = "字" * 40_000
    renderer = TextRenderer(Bytes(), essay)
    rng = np.random.default_rng(0)
    example = renderer.render(TASKS["niah_single_2"].draw(rng, 0.5), 5_000, rng)
    assert 4_700 < len(example.ids) <= 5_000


def test_losses_want_filler_that_is_there_once():
    renderer, rng = TextRenderer(Bytes(), ESSAY), np.random.default_rng(0)
    with pytest.raises(UserError, match="fewer than a text of 900, and what is there twice"):
        renderer.render(TASKS["window_loss"].draw(rng, None), 900, rng)


def test_texts_that_documents_do_not_fill_are_refused():
    """Not called as long as they were asked to be."""
    task = QuestionTask((Question("Who?", "Ann", ("Ann came.",)),))
    draw = Draw("qa_1", 3_000, None, 0, 0)
    with pytest.raises(UserError, match=r"--tasks=qa_1: what there is fills \d+ of 3000 tokens"):
        make_example(TextRenderer(Bytes(), ESSAY), task, draw)


@pytest.mark.parametrize("documents", ('"Ann came."', "5", "[5]"))
def test_documents_that_are_no_list_of_texts_are_refused(documents, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"question": "Who?", "answer": "Ann", "documents": {documents}}}\n')
    with pytest.raises(UserError, match="documents \\(a list of texts\\) or context are needed"):
        read_questions(path)
