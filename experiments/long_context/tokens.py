"""Tasks as texts of a vocabulary without words: what a small model can learn in minutes.

Tokens of filler follow each other by chance, in a way that can be learned; keys and values stand
among them in pairs. A question is a key, its answer the value.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from experiments.long_context.tasks import (
    Content,
    Example,
    Piece,
    Sentence,
    Term,
    spread,
)
from qwen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Language:
    """A vocabulary, and what follows what in its filler.

    A token of filler is drawn by the one before it or, as often, by the one before that: what the
    second tells cannot be had from a table of pairs, so that a model has to look back.

    Attributes:
      num_filler, num_keys, num_values: tokens of each kind.
      concentration: of the Dirichlet distribution that a token's followers are drawn from; small
        for few likely ones.
      seed: of what follows what.
    """

    num_filler: int = 32
    num_keys: int = 30
    num_values: int = 30
    concentration: float = 0.15
    seed: int = 0

    # Ids: what a text begins with, what stands before a pass key, and then all of a kind.
    begin = 0
    marker = 1
    first_filler = 2

    @property
    def first_key(self) -> int:
        """The id of the first of the keys, which stand behind the filler."""
        return self.first_filler + self.num_filler

    @property
    def first_value(self) -> int:
        """The id of the first of the values, which stand behind the keys."""
        return self.first_key + self.num_keys

    @property
    def vocab_size(self) -> int:
        """Ids, filled up to a multiple of 8."""
        return -(-(self.first_value + self.num_values) // 8) * 8

    @functools.cached_property
    def followers(self) -> np.ndarray:
        """float64 [2, F, F], the probability of each token behind the last, and the one before."""
        rng = np.random.default_rng(self.seed)
        alphas = np.full(self.num_filler, self.concentration)
        return rng.dirichlet(alphas, size=(2, self.num_filler))

    @functools.cached_property
    def _cumulative(self) -> list[list[list[float]]]:
        return np.cumsum(self.followers, axis=-1).tolist()

    def filler(self, rng: np.random.Generator, count: int) -> list[int]:
        """So many tokens one behind another."""
        last = [int(i) for i in rng.integers(self.num_filler, size=2)]
        found = []
        for which, chance in rng.random((count, 2)).tolist():
            back = int(which < 0.5)
            row = self._cumulative[back][last[1 - back]]
            token = min(bisect.bisect(row, chance), self.num_filler - 1)
            last = [last[1], token]
            found.append(self.first_filler + token)
        return found


class TokenRenderer:
    """Texts of exactly the wanted number of tokens."""

    def __init__(self, language: Language = Language()):
        """Makes a renderer for a language."""
        self._language = language

    def render(self, content: Content, length: int, rng: np.random.Generator) -> Example:
        """A text with its answers; its first token is the one that every text begins with.

        Args:
          content: of a task.
          length: tokens, those of the answers included.
          rng: which token stands for which term, and the filler.

        Raises:
          UserError: the length does not hold what is asked; more terms than tokens; or a task of
            words that are counted or documents, which a vocabulary without words has not.
        """
        language = self._language
        if content.spans is not None:
            return Example(
                [language.begin, *language.filler(rng, length - 1)], content.spans(length)
            )
        if content.body is not None or content.documents:
            raise UserError(
                f"questions of the kind {content.question} need words; leave the task out of "
                "--tasks, or give a --model with a tokenizer"
            )
        tokens = self._tokens(content, rng)
        pieces = [self._piece(needle.depth, needle.sentence, tokens) for needle in content.needles]
        question = self._question(content, tokens)
        room = length - 1 - sum(len(ids) for _, ids, _ in pieces) - sum(len(q) for q, _ in question)
        if room < 0:
            raise UserError(
                f"a text of {length} tokens is too short for its question and needles, which are "
                f"{length - room}; give longer --lengths"
            )
        filler = [[token] for token in language.filler(rng, room)]
        if content.haystack == "needles":
            filler = self._other_facts(room, set(tokens.values()), rng)
        ids = [language.begin]
        places = spread(ids, filler, pieces)
        for part, num_answer in question:
            ids += part
            if num_answer:
                places.append((len(ids) - num_answer, len(ids)))
        return Example(ids, tuple(places), self._drawn(ids, places))

    def _tokens(self, content: Content, rng: np.random.Generator) -> dict[Term, int]:
        """Which token stands for each term: what is first said of something is a key."""
        language = self._language
        keys = dict.fromkeys(
            n.sentence.terms[0] for n in content.needles if n.sentence.form != "pass_key"
        )
        values = dict.fromkeys(
            term for n in content.needles for term in n.sentence.terms[1:] if term not in keys
        )
        found: dict[Term, int] = {}
        for terms, first, count in (
            (keys, language.first_key, language.num_keys),
            (values, language.first_value, language.num_values),
        ):
            if len(terms) > count:
                raise UserError(
                    f"{len(terms)} different keys or values, where the vocabulary has {count}; "
                    "leave the task out of --tasks"
                )
            picks = rng.choice(count, len(terms), replace=False)
            found |= {term: first + int(i) for term, i in zip(terms, picks, strict=True)}
        return found

    def _digits(self, term: Term) -> list[int]:
        """A number of a pass key: four values, one for each decimal digit."""
        return [self._language.first_value + int(digit) for digit in f"{term.index:04}"]

    def _piece(self, depth: float, sentence: Sentence, tokens: dict[Term, int]) -> Piece:
        if sentence.form == "pass_key":
            return depth, [self._language.marker, *self._digits(sentence.terms[0])], 0
        ids = [tokens[term] for term in sentence.terms]
        return depth, ids, int(sentence.form == "ask")

    def _question(self, content: Content, tokens: dict[Term, int]) -> list[tuple[list[int], int]]:
        """Tokens behind the text, and how many at the end of each part are an answer."""
        match content.question:
            case "asked":
                return []
            case "pass_key":
                answer = self._digits(content.answers[0])
                return [([self._language.marker, *answer], len(answer))]
            case "fact" if len(content.asked) > 1:
                pairs = zip(content.asked, content.answers, strict=True)
                return [([tokens[key], tokens[value]], 1) for key, value in pairs]
        asked = [tokens[term] for term in content.asked]
        return [(asked, 0), *(([tokens[term]], 1) for term in content.answers)]

    def _other_facts(self, room: int, taken: set[int], rng: np.random.Generator) -> list[list[int]]:
        """Facts about other keys, which may be said to be this and then that; one token may be
        left over."""
        language = self._language
        sides = [
            [t for t in range(first, first + count) if t not in taken]
            for first, count in (
                (language.first_key, language.num_keys),
                (language.first_value, language.num_values),
            )
        ]
        facts = [[int(rng.choice(side)) for side in sides] for _ in range(room // 2)]
        return facts + [[language.first_filler]] * (room % 2)

    def _drawn(
        self, ids: Sequence[int], places: Sequence[tuple[int, int]]
    ) -> tuple[tuple[int, int], ...]:
        """Tokens that are neither filler nor answers."""
        answers = {i for begin, end in places for i in range(begin, end)}
        language = self._language
        filler = range(language.first_filler, language.first_key)
        return tuple(
            (i, i + 1)
            for i, token in enumerate(ids)
            if i and token not in filler and i not in answers
        )
