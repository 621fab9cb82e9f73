"""Tasks on long texts: facts among filler, a question, and the answers to it.

A task knows neither words nor token ids. It draws a `Content`, of which a renderer makes an
`Example` of the wanted length: `text.TextRenderer` for any tokenizer, `tokens.TokenRenderer` for a
vocabulary without words. The names and settings of RULER's tasks (arXiv 2404.06654) are those of
its published configuration.
"""

import dataclasses
import enum
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

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
      form: "pass_key" of a value, "fact" of a key and its value, "ask" of the same, where the value
        is an answer, "assign" of a variable and what it is set to, or "list" of words one after
        another.
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
    needles: in any order; of those at one depth the first stands first.
    haystack: of what the filler is: "noise", "essay", or "needles", sentences like the needles.
    question: "pass_key", "fact", "assign", "common", "coded" or "document"; "asked" where needles
      ask, and "none" where filler is all there is.
    asked: the terms that the question names.
    answers: in the order that the question asks for, that of the text.
    body: sentences that make up the whole text, in place of needles among filler; None else.
    documents: texts that the answer is in, in place of needles; behind them what else there is,
      of which a text has as much as fits.
    num_needed: how many of the documents the answer is in.
    asked_text, answer_text: of documents, the question and its answer.
    spans: of filler that is all there is, by its length what is scored of it, where each part
      begins and ends.
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
    spans: Callable[[int], tuple[tuple[int, int], ...]] | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """A text and what of it is scored.

    Attributes:
      ids: tokens of the whole.
      answers: where each answer begins and ends among them, in their order.
      drawn: the same of what nothing before it could predict, as far as a renderer tells.
    """

    ids: list[int]
    answers: tuple[tuple[int, int], ...]
    drawn: tuple[tuple[int, int], ...] = ()

    @property
    def start(self) -> int:
        """The first token that is to be predicted."""
        return self.answers[0][0]


# Where it belongs, its tokens, and how many at their end are an answer.
Piece = tuple[float, list[int], int]


class Renderer(Protocol):
    """Makes texts of contents."""

    def render(self, content: Content, length: int, rng: np.random.Generator) -> Example:
        """A text as near to `length` tokens as the content allows, no longer.

        Raises:
          UserError: the length does not even hold what is asked.
        """


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


@dataclasses.dataclass(frozen=True)
class RecallTask:
    """Associative recall: facts among filler, each of which is asked for further on.

    Distances between a fact and its question are drawn evenly, so that long ones are no rarer.

    Attributes:
      num_keys: facts.
    """

    num_keys: int = 8

    def draw(self, rng: np.random.Generator, depth: float | None) -> Content:
        """`depth` is not read."""
        del depth
        keys = _draw_terms(rng, TermKind.WORD, self.num_keys)
        values = _draw_terms(rng, TermKind.NUMBER, self.num_keys)
        needles = []
        for fact in zip(keys, values, strict=True):
            distance = rng.random()
            depth = (1 - distance) * rng.random()
            needles.append(Needle(Sentence("fact", fact), depth))
            needles.append(Needle(Sentence("ask", fact), depth + distance))
        return Content(tuple(needles), "essay", "asked", keys, values)


@dataclasses.dataclass(frozen=True)
class LossTask:
    """How well filler itself is predicted.

    Attributes:
      parts: equal ones that the text is scored in; of the first its first token is left out.
      last: tokens at the end that are scored in place of that, as a window that slides by so many
        scores them (Press et al., arXiv 2012.15409); of short texts at most a quarter.
      judged: whether of these tokens those are scored that need distant ones, as `key_tokens` has
        it.
    """

    parts: int = 16
    last: int | None = None
    judged: bool = False

    def draw(self, rng: np.random.Generator, depth: float | None) -> Content:
        """Nothing is drawn, `depth` is not read."""
        del rng, depth
        return Content((), "essay", "none", (), (), spans=self._spans)

    def _spans(self, length: int) -> tuple[tuple[int, int], ...]:
        if self.last is not None:
            return ((length - min(self.last, length // 4), length),)
        edges = [length * i // self.parts for i in range(self.parts + 1)]
        if min(b - a for a, b in itertools.pairwise(edges)) < 2:
            raise UserError(
                f"a text of {length} tokens is too short for {self.parts} parts; give longer "
                "--lengths"
            )
        return tuple((max(a, 1), b) for a, b in itertools.pairwise(edges))


Task = (
    NeedleTask
    | PassKeyTask
    | VariableTask
    | CommonWordsTask
    | FrequentWordsTask
    | QuestionTask
    | RecallTask
    | LossTask
)

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "passkey": PassKeyTask(),
        "recall": RecallTask(),
        "loss": LossTask(),
        "window_loss": LossTask(last=256),
        "key_loss": LossTask(parts=1, judged=True),
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
        "ruler": tuple(name for name in TASKS if name.startswith(("niah", "vt", "cwe", "fwe"))),
    }
)
# Of which only the nats tell something: nothing is asked.
LOSSES = ("loss", "window_loss", "key_loss")
# Whose needle can be put at a depth.
WITH_DEPTH = ("passkey", *GROUPS["niah"])


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


def reads_essay(task: Task) -> bool:
    """Whether a task's filler is the text that a renderer was given."""
    return isinstance(task, RecallTask | LossTask) or getattr(task, "haystack", "") == "essay"


def _draw_terms(rng: np.random.Generator, kind: TermKind, count: int) -> tuple[Term, ...]:
    """Different ones."""
    return tuple(Term(kind, int(i)) for i in rng.choice(NUM_TERMS, count, replace=False))


def spread(
    ids: list[int], filler: Sequence[Sequence[int]], pieces: Sequence[Piece]
) -> list[tuple[int, int]]:
    """Appends filler and the pieces among it to `ids`.

    Returns:
      Where each answer begins and ends.
    """
    places = []
    waiting = sorted(pieces, key=lambda piece: piece[0])
    for i in range(len(filler) + 1):
        while waiting and round(waiting[0][0] * len(filler)) <= i:
            _, piece, num_answer = waiting.pop(0)
            ids += piece
            if num_answer:
                places.append((len(ids) - num_answer, len(ids)))
        if i < len(filler):
            ids += filler[i]
    return places
