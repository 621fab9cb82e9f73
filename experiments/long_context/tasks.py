"""Tasks on long texts: facts among filler, a question, and the answers to it.

A task knows neither words nor token ids. It draws a `Content`, of which a renderer makes a text of
the wanted length: `text.TextRenderer` for any tokenizer. The names and settings of RULER's tasks
(arXiv 2404.06654) are those of its published configuration; `RULER` tables what is set.
"""

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from qwen_jax.errors import UserError


class TermKind(enum.StrEnum):
    """What stands for a key or a value in the text."""

    WORD = "word"
    NUMBER = "number"
    UUID = "uuid"
    VARIABLE = "variable"


@dataclasses.dataclass(frozen=True)
class Term:
    """A key or a value: the `index`-th of a kind, from 0 below `NUM_TERMS`."""

    kind: TermKind
    index: int


NUM_TERMS = 10_000


@dataclasses.dataclass(frozen=True)
class Sentence:
    """Something said of terms.

    Attributes:
      form: "pass_key" of a value, "fact" of a key and its value, "assign" of a variable and what it
        is set to, or "list" of words one after another.
      terms: that it is of.
    """

    form: str
    terms: tuple[Term, ...]


@dataclasses.dataclass(frozen=True)
class Needle:
    """A sentence and where it stands among the filler: 0 before all of it, 1 behind."""

    sentence: Sentence
    depth: float


@dataclasses.dataclass(frozen=True)
class Content:
    """Attributes:
    needles: in any order.
    haystack: of what the filler is: "noise", "essay", or "needles", sentences like the needles.
    question: "pass_key", "fact", "assign", "common", "coded" or "document".
    asked: the terms that the question names.
    answers: in the order that the question asks for, that of the text.
    body: sentences that make up the whole text, in place of needles among filler; None else.
    documents: texts that the answer is in, in place of needles; behind them what else there is,
      of which a text has as much as fits.
    num_needed: how many of the documents the answer is in.
    asked_text, answer_text: of documents, the question and its answer.
    """

    needles: tuple[Needle, ...]
    haystack: str
    question: str
    asked: tuple[Term, ...]
    answers: tuple[Term, ...]
    body: Callable[[int], Sequence[Sentence]] | None = None
    documents: tuple[str, ...] = ()
    num_needed: int = 0
    asked_text: str = ""
    answer_text: str = ""


@dataclasses.dataclass(frozen=True)
class NeedleTask:
    """Facts of the form "the number for KEY is VALUE", some of which are asked for.

    Attributes:
      haystack: as `Content` has it.
      keys, values: kinds of terms.
      num_keys: facts about different keys.
      num_values: facts about each key.
      num_queries: keys that are asked for.
    """

    haystack: str
    keys: TermKind = TermKind.WORD
    values: TermKind = TermKind.NUMBER
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def draw(self, rng: np.random.Generator, depth: float | None) -> Content:
        """The first fact that is asked for stands at `depth`, all others, or all, anywhere."""
        num_keys = max(self.num_keys, self.num_queries)
        keys = _draw_terms(rng, self.keys, num_keys)
        values = _draw_terms(rng, self.values, num_keys * self.num_values)
        depths = rng.random(len(values))
        if depth is not None:
            depths[0] = depth
        needles = [
            Needle(Sentence("fact", (keys[i // self.num_values], value)), float(depths[i]))
            for i, value in enumerate(values)
        ]
        asked = keys[: self.num_queries]
        if self.num_values == 1:
            # In the order of the question; several values of a key in that of the text.
            answers = tuple(needle.sentence.terms[1] for needle in needles[: len(asked)])
        else:
            own = [needle for needle in needles if needle.sentence.terms[0] in asked]
            own.sort(key=lambda needle: needle.depth)
            answers = tuple(needle.sentence.terms[1] for needle in own)
        return Content(tuple(needles), self.haystack, "fact", asked, answers)


@dataclasses.dataclass(frozen=True)
class PassKeyTask:
    """One number to remember among noise (Mohtashami and Jaggi, arXiv 2305.16300)."""

    def draw(self, rng: np.random.Generator, depth: float | None) -> Content:
        """The number stands at `depth`, or anywhere."""
        (key,) = _draw_terms(rng, TermKind.NUMBER, 1)
        depth = float(rng.random()) if depth is None else depth
        needle = Needle(Sentence("pass_key", (key,)), depth)
        return Content((needle,), "noise", "pass_key", (), (key,))


@dataclasses.dataclass(frozen=True)
class VariableTask:
    """A value that is handed on from variable to variable; which of them have it is asked for.

    Attributes:
      num_chains: values that are handed on, of which one is asked for.
      num_hops: how often each is.
    """

    num_chains: int = 1
    num_hops: int = 4

    def draw(self, rng: np.random.Generator, depth: float | None) -> Content:
        """A variable is set before the next is set to it; `depth` is not read."""
        del depth
        each = self.num_hops + 1
        names = _draw_terms(rng, TermKind.VARIABLE, self.num_chains * each)
        values = _draw_terms(rng, TermKind.NUMBER, self.num_chains)
        needles = []
        for chain, value in enumerate(values):
            own = names[chain * each : (chain + 1) * each]
            depths = np.sort(rng.random(each))
            for place, name in enumerate(own):
                source = own[place - 1] if place else value
                needles.append(Needle(Sentence("assign", (name, source)), float(depths[place])))
        return Content(tuple(needles), "noise", "assign", values[:1], names[:each])


@dataclasses.dataclass(frozen=True)
class CommonWordsTask:
    """A list of words in which some occur more often than the others; these are asked for.

    Attributes:
      num_common: words that occur often.
      common_times, other_times: how often each occurs, and each of the others.
    """

    num_common: int = 10
    common_times: int = 30
    other_times: int = 3

    def draw(self, rng: np.random.Generator, depth: float | None) -> Content:
        """Words in random order; longer texts have more of the others."""
        del depth
        words = _draw_terms(rng, TermKind.WORD, NUM_TERMS // 2)
        common = words[: self.num_common]
        order_seed = int(rng.integers(2**31))

        def body(count: int) -> list[Sentence]:
            """So many words, as near as the times allow."""
            others = (count - self.num_common * self.common_times) // self.other_times
            others = min(others, len(words) - self.num_common)
            if others < 1:
                raise UserError(
                    f"a text of {count} words is too short for {self.num_common} that occur "
                    f"{self.common_times} times each; give longer --lengths"
                )
            listed = [*common * self.common_times]
            listed += words[self.num_common : self.num_common + others] * self.other_times
            order = np.random.default_rng(order_seed).permutation(len(listed))
            return [Sentence("list", tuple(listed[i] for i in order))]

        return Content((), "", "common", (), common, body)


@dataclasses.dataclass(frozen=True)
class FrequentWordsTask:
    """Words drawn with the frequencies of Zeta(alpha); the three likeliest are asked for."""

    alpha: float = 2.0
    num_words: int = 2000
    num_asked: int = 3

    def draw(self, rng: np.random.Generator, depth: float | None) -> Content:
        """Words in random order."""
        del depth
        words = _draw_terms(rng, TermKind.WORD, self.num_words)
        shares = np.arange(1, self.num_words + 1) ** -self.alpha
        shares /= shares.sum()
        order_seed = int(rng.integers(2**31))

        def body(count: int) -> list[Sentence]:
            """So many words, each as often as its share says, but for rounding."""
            times = np.floor(count * shares + 0.5).astype(int)
            # Those that are asked for differ in their times, or no answer would be right.
            for i in range(self.num_asked - 1, -1, -1):
                times[i] = max(times[i], times[i + 1] + 1)
            listed = np.repeat(np.arange(self.num_words), times)
            order = np.random.default_rng(order_seed).permutation(listed)
            return [Sentence("list", tuple(words[i] for i in order))]

        return Content((), "", "coded", (), words[: self.num_asked], body)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a user's file: what its answer is, and the documents that it is in."""

    question: str
    answer: str
    documents: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class QuestionTask:
    """Questions about documents among the documents of other questions."""

    questions: tuple[Question, ...]

    def draw(self, rng: np.random.Generator, depth: float | None) -> Content:
        """One of the questions; `depth` is not read."""
        del depth
        own = self.questions[int(rng.integers(len(self.questions)))]
        others = [d for q in self.questions for d in q.documents if d not in own.documents]
        others = [others[i] for i in rng.permutation(len(others))]
        return Content(
            (),
            "",
            "document",
            (),
            (),
            documents=(*own.documents, *dict.fromkeys(others)),
            num_needed=len(own.documents),
            asked_text=own.question,
            answer_text=own.answer,
        )


Task = NeedleTask | PassKeyTask | VariableTask | CommonWordsTask | FrequentWordsTask | QuestionTask

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "passkey": PassKeyTask(),
        "niah_single_1": NeedleTask("noise"),
        "niah_single_2": NeedleTask("essay"),
        "niah_single_3": NeedleTask("essay", values=TermKind.UUID),
        "niah_multikey_1": NeedleTask("essay", num_keys=4),
        "niah_multikey_2": NeedleTask("needles"),
        "niah_multikey_3": NeedleTask("needles", keys=TermKind.UUID, values=TermKind.UUID),
        "niah_multivalue": NeedleTask("essay", num_values=4),
        "niah_multiquery": NeedleTask("essay", num_queries=4),
        "vt": VariableTask(),
        "cwe": CommonWordsTask(),
        "fwe": FrequentWordsTask(),
    }
)
# Names that stand for several.
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "niah": tuple(name for name in TASKS if name.startswith("niah")),
        "ruler": tuple(name for name in TASKS if name != "passkey"),
    }
)
# Whose needle can be put at a depth.
WITH_DEPTH = ("passkey", "niah_single_1", "niah_single_2", "niah_single_3")


def find_tasks(
    names: Sequence[str], questions: Sequence[tuple[Question, ...]] = ()
) -> dict[str, Task]:
    """The tasks that names of tasks and of groups stand for, each once.

    Args:
      names: `qa_1` and further on are of `questions`, and of the group "ruler" as well.
      questions: of a user's files.

    Raises:
      UserError: an unknown name.
    """
    own = {f"qa_{i}": QuestionTask(rows) for i, rows in enumerate(questions, 1)}
    tasks = {**TASKS, **own}
    groups = {**GROUPS, "ruler": (*GROUPS["ruler"], *own)}
    found: dict[str, Task] = {}
    for name in names:
        if re.fullmatch(r"qa_\d+", name) and name not in own:
            raise UserError(f"--tasks={name} needs a file of questions; give --qa=FILE")
        if name not in tasks and name not in groups:
            known = ", ".join((*groups, *tasks))
            raise UserError(f"--tasks={name} is unknown; known: {known}")
        found |= {task: tasks[task] for task in groups.get(name, (name,))}
    return found


def _draw_terms(rng: np.random.Generator, kind: TermKind, count: int) -> tuple[Term, ...]:
    """Different ones."""
    return tuple(Term(kind, int(i)) for i in rng.choice(NUM_TERMS, count, replace=False))
