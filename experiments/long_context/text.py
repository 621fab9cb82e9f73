"""Tasks as texts for a tokenizer: words, numbers and filler, cut to a number of tokens."""

import ast
import functools
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

import qwen_jax
from experiments.long_context.tasks import (
    NUM_TERMS,
    Content,
    Example,
    Question,
    Sentence,
    Term,
    TermKind,
    spread,
)
from qwen_jax.errors import UserError
from tools.jsonl_rows import read_rows

_ADJECTIVES = """
amber ancient arctic bitter blue bold brave brief bright broad brown busy calm careful cheap clean
clear clever cold cool crisp curious damp dark deep dense distant double dry dull eager early easy
empty equal exact faint fair famous fast fine firm flat formal free fresh gentle giant golden grand
green grey happy hard heavy hidden high hollow honest huge idle inner keen kind large late lazy
level light little lively local lonely long loud low loyal lucky mellow mild modern narrow neat new
noble old open outer pale patient plain polite proud pure quick quiet rare rough
round royal
""".split()
_NOUNS = """
acorn anchor anvil apple arrow autumn badge baker basket beacon bell bench berry blanket bottle
branch bridge bucket button cabin candle canyon carpet castle cedar chair chapel cherry circle
cliff clock cloud coast compass copper corner cotton creek crown desert drum eagle engine falcon
farmer feather fence field flute forest fountain garden glacier grape hammer harbor hazel helmet
hill island jacket kettle ladder lantern lemon library lighthouse marble market meadow mirror
mountain needle ocean orchard otter paddle parcel pebble pepper pillow planet pocket quarry
rabbit ribbon river saddle sailor shelter shovel signal silver spring stable stream summit temple
tunnel valley
""".split()
# As many of both, so that each index has a word of its own.
_WORDS = 100

# Tokens of filler that stand together at most.
_LONGEST_SENTENCE = 256
# What nothing happens in, round and round.
_NOISE = (
    " The river runs on.",
    " A cloud stands over the hill.",
    " The stones are warm.",
    " Someone walks by and does not stop.",
    " It is like this every day.",
)
_INTRODUCTIONS = {
    "pass_key": "A pass key is somewhere in the text below. You will be asked for it.\n\n",
    "fact": "Some codes are somewhere in the text below. You will be asked for them.\n\n",
    "assign": "Variables are set somewhere in the text below. You will be asked for them.\n\n",
    "common": "Below is a list of words, some of which occur more often than others.\n\n",
    "coded": "Below are words, a few of which occur most often.\n\n",
    "asked": "Some codes are in the text below, which asks for them further on.\n\n",
    "document": "Answer the question behind these documents with a few words of theirs.\n\n",
}


class Tokenizes(Protocol):
    """What a renderer needs of a tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text, nothing added."""


def word(term: Term, form: str = "fact") -> str:
    """What stands for a term in a sentence of a form; all of a kind differ."""
    i = term.index
    match term.kind:
        case TermKind.WORD:
            return f"{_ADJECTIVES[i // _WORDS]}-{_NOUNS[i % _WORDS]}"
        case TermKind.NUMBER if form == "pass_key":
            return str(10_000 + i * 7_919 % 90_000)
        case TermKind.NUMBER:
            return str(1_000_000 + i * 104_729 % 9_000_000)
        case TermKind.UUID:
            return str(uuid.uuid5(uuid.NAMESPACE_OID, str(i)))
        case TermKind.VARIABLE:
            number, letters = (i * 7_654_321 + 1_234_567) % 26**5, ""
            for _ in range(5):
                number, letter = divmod(number, 26)
                letters += chr(ord("A") + letter)
            return letters


def project_text() -> str:
    """What the sources of this package say of themselves: every docstring, file by file."""
    root = Path(qwen_jax.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        found += [" ".join((ast.get_docstring(node) or "").split()) for node in nodes]
    return " ".join(text for text in found if text)


def read_haystack(path: Path) -> str:
    """A user's filler.

    Raises:
      UserError: it cannot be read, or has no sentence.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    if not text.strip():
        raise UserError(f"{path}: has no text; give a file with some")
    return text


def read_questions(path: Path) -> tuple[Question, ...]:
    """Of a JSONL file with `question`, `answer` and `documents` (or one `context`) a line.

    Raises:
      UserError: it cannot be read, or a line is not so.
    """
    found = []
    for name, row in read_rows(path):
        documents = row.get("documents", [row.get("context")])
        documents = documents if isinstance(documents, list) else []
        texts = [row.get("question"), row.get("answer"), *documents] if documents else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(
                f"{name}: question, answer and documents (a list of texts) or context are needed"
            )
        found.append(Question(texts[0], texts[1], tuple(texts[2:])))
    return tuple(found)


class TextRenderer:
    """Texts of a wanted number of tokens."""

    def __init__(self, tokenizer: Tokenizes, essay: str):
        """Makes a renderer.

        Args:
          tokenizer: of the model.
          essay: the filler of tasks that want prose, such as `project_text`.
        """
        self._tokenizer = tokenizer
        self._essay = essay

    @functools.cached_property
    def _essay_sentences(self) -> list[list[int]]:
        pieces = re.split(r"(?<=[.!?])\s+", " ".join(self._essay.split()))
        sentences = [self._encode(f" {piece}") for piece in pieces if piece]
        # Texts whose sentences end in another way, or not at all, are cut.
        return [
            ids[i : i + _LONGEST_SENTENCE]
            for ids in sentences
            for i in range(0, len(ids), _LONGEST_SENTENCE)
        ]

    @functools.cached_property
    def _noise_sentences(self) -> list[list[int]]:
        return [self._encode(sentence) for sentence in _NOISE]

    @functools.lru_cache(maxsize=100_000)  # noqa: B019 - a renderer lives as long as its run.
    def _cached(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text))

    def _encode(self, text: str) -> list[int]:
        return list(self._cached(text))

    def render(self, content: Content, length: int, rng: np.random.Generator) -> Example:
        """A text with its answers, as near to `length` tokens as whole sentences come, no longer.

        Args:
          content: of a task.
          length: tokens, those of the answers included.
          rng: where the filler begins, and what facts it has.

        Raises:
          UserError: the length does not even hold the question.
        """
        if content.documents:
            return self._with_documents(content, length, rng)
        if content.spans is not None:
            tokens = sum(map(len, self._essay_sentences))
            if tokens < length:
                raise UserError(
                    f"the filler has {tokens} tokens, fewer than a text of {length}, and what is "
                    "there twice can be copied; give a longer --haystack or shorter --lengths"
                )
            filler = self._filler(content, length, rng, whole=False)
            return Example([token for ids in filler for token in ids], content.spans(length))
        opening = self._encode(_INTRODUCTIONS[content.question])
        question = self._encode(_question(content)) if content.question != "asked" else []
        at_end = content.answers if question else ()
        answers = [
            self._encode(f"{', ' if i else ' '}{word(term, content.question)}")
            for i, term in enumerate(at_end)
        ]
        pieces = [(needle.depth, *self._say(needle.sentence)) for needle in content.needles]
        fixed = sum(map(len, (opening, question, *answers, *(ids for _, ids, _ in pieces))))
        room = length - fixed
        if room < 0:
            raise UserError(
                f"a text of {length} tokens is too short for its question and needles, which are "
                f"{fixed}; give longer --lengths"
            )
        places: list[tuple[int, int]] = []
        ids = [*opening]
        if content.body is None:
            places += spread(ids, self._filler(content, room, rng), pieces)
        else:
            ids += self._longest_list(content, room)
        ids += question
        for answer in answers:
            places.append((len(ids), len(ids) + len(answer)))
            ids += answer
        return Example(ids, tuple(places))

    def _say(self, sentence: Sentence) -> tuple[list[int], int]:
        """A sentence, and how many tokens at its end are an answer."""
        if sentence.form != "ask":
            return self._encode(_say(sentence)), 0
        key, value = (word(term, sentence.form) for term in sentence.terms)
        answer = self._encode(f" {value}")
        return [*self._encode(f" What is the code of {key}? It is"), *answer], len(answer)

    def _with_documents(self, content: Content, length: int, rng: np.random.Generator) -> Example:
        """The documents of the answer and as many others as fit, in any order."""
        opening = self._encode(_INTRODUCTIONS[content.question])
        question = self._encode(f"\n\n{content.asked_text.strip()} The answer is")
        answer = self._encode(f" {content.answer_text.strip()}")
        room = length - len(opening) - len(question) - len(answer)
        chosen: list[list[int]] = []
        for i, document in enumerate(content.documents):
            ids = self._encode(f"Document: {document.strip()}\n\n")
            if len(ids) > room:
                if i < content.num_needed:
                    raise UserError(
                        f"a text of {length} tokens is too short for the documents of a question; "
                        "give longer --lengths"
                    )
                break
            room -= len(ids)
            chosen.append(ids)
        middle = [token for i in rng.permutation(len(chosen)) for token in chosen[i]]
        ids = [*opening, *middle, *question]
        return Example([*ids, *answer], ((len(ids), len(ids) + len(answer)),))

    def _filler(
        self, content: Content, room: int, rng: np.random.Generator, whole: bool = True
    ) -> list[list[int]]:
        """Sentences of no more than `room` tokens together; unless `whole`, of as many."""
        match content.haystack:
            case "noise":
                sentences, start = self._noise_sentences, 0
            case "essay":
                sentences = self._essay_sentences
                start = int(rng.integers(len(sentences)))
            case _:
                return self._other_facts(content, room, rng)
        found = []
        while True:
            sentence = sentences[(start + len(found)) % len(sentences)]
            room -= len(sentence)
            if room < 0:
                return found if whole else [*found, sentence[:room]]
            found.append(sentence)

    def _other_facts(
        self, content: Content, room: int, rng: np.random.Generator
    ) -> list[list[int]]:
        """Facts about other keys, with other values."""
        key, value = content.needles[0].sentence.terms
        taken = {term for needle in content.needles for term in needle.sentence.terms}
        found = []
        while True:
            i, j = (int(number) for number in rng.integers(NUM_TERMS, size=2))
            fact = Term(key.kind, i), Term(value.kind, j)
            if taken & set(fact):
                continue
            sentence = self._encode(_say(Sentence("fact", fact)))
            room -= len(sentence)
            if room < 0:
                return found
            found.append(sentence)

    def _longest_list(self, content: Content, room: int) -> list[int]:
        """The longest of the content's lists that fits."""

        def listed(count: int) -> list[int]:
            terms = [term for sentence in content.body(count) for term in sentence.terms]
            return [
                token
                for i, term in enumerate(terms, 1)
                for token in (*self._cached(f" {i}."), *self._cached(f" {word(term)}"))
            ]

        least, most = 0, room
        while most - least > 1:
            middle = (least + most) // 2
            try:
                fits = len(listed(middle)) <= room
            except UserError:
                # Fewer words than such a list has.
                fits = True
            least, most = (middle, most) if fits else (least, middle)
        return listed(least)


def _say(sentence: Sentence) -> str:
    terms = [word(term, sentence.form) for term in sentence.terms]
    match sentence.form:
        case "pass_key":
            return f" The pass key is {terms[0]}. Keep it in mind: {terms[0]} is the pass key."
        case "assign":
            return f" VAR {terms[0]} = {terms[1]}."
        case _:
            return f" The code of {terms[0]} is {terms[1]}."


def _question(content: Content) -> str:
    asked = [word(term) for term in content.asked]
    listed = " and ".join([", ".join(asked[:-1]), asked[-1]] if len(asked) > 1 else asked)
    several = len(content.answers) > 1
    match content.question:
        case "pass_key":
            return "\n\nWhat is the pass key? The pass key is"
        case "fact" if len(asked) == 1 and several:
            return (
                f"\n\nWhat are the {len(content.answers)} codes of {listed}, in the order of the "
                f"text? The codes of {listed} are"
            )
        case "fact" if several:
            return f"\n\nWhat are the codes of {listed}, in this order? The codes are"
        case "fact":
            return f"\n\nWhat is the code of {listed}? The code of {listed} is"
        case "assign":
            return (
                f"\n\nWhich {len(content.answers)} variables have the value {listed}, directly or "
                "through another variable, in the order of the text? The variables are"
            )
        case "common":
            return f"\n\nWhich {len(content.answers)} words occur most often? The words are"
        case _:
            return (
                f"\n\nWhich {len(content.answers)} words occur most often, most frequent first? "
                "The words are"
            )
