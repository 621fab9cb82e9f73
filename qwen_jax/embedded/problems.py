"""The problems that the embedded model learns: each with its steps and its answer.

A problem is drawn from a seeded generator. Which ones are held out is decided by a hash of what is
asked, so that no wording of a held-out problem is ever trained on.
"""

import dataclasses
import hashlib
import random
from collections.abc import Callable

# One problem in so many is held out.
_HELD_OUT = 10


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      kind: as in `KINDS`.
      operands: what identifies it, whatever its wording, and sorted where their order makes no
        difference to the answer; the split is by this.
      question: as a user asks.
      steps: the way to the answer, a line each.
      answer: right, and nothing else.
      expression: for a calculator, where the problem is one for it.
    """

    kind: str
    operands: str
    question: str
    steps: tuple[str, ...]
    answer: str
    expression: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether it is for the evaluation, and never trained on."""
        digest = hashlib.sha256(f"{self.kind} {self.operands}".encode()).digest()
        return int.from_bytes(digest[:8]) % _HELD_OUT == 0


def draw(rng: random.Random, kind: str, held_out: bool) -> Problem:
    """A problem of a kind, from the trained ones or from those held out."""
    while (problem := KINDS[kind](rng)).held_out != held_out:
        pass
    return problem


def _number(rng: random.Random, digits: int) -> int:
    """With so many digits at most; each length as likely."""
    size = rng.randint(1, digits)
    return rng.randint(10 ** (size - 1) if size > 1 else 0, 10**size - 1)


def _add(rng: random.Random) -> Problem:
    a, b = _number(rng, 5), _number(rng, 5)
    question = _ask(rng, ["What is {}+{}?", "{}+{}=?", "Add {} and {}.", "{}加{}等于多少？"], a, b)
    steps = _columns(a, b, "+", lambda p, q, carry: p + q + carry)
    return Problem("add", _in_any_order(a, b), question, steps, str(a + b), f"{a}+{b}")


def _subtract(rng: random.Random) -> Problem:
    a, b = sorted((_number(rng, 5), _number(rng, 5)), reverse=True)
    question = _ask(
        rng, ["What is {}-{}?", "{}-{}=?", "Take {1} from {0}.", "{}减{}等于多少？"], a, b
    )
    steps = _columns(a, b, "-", lambda p, q, carry: p - q - carry)
    return Problem("subtract", f"{a} {b}", question, steps, str(a - b), f"{a}-{b}")


def _multiply(rng: random.Random) -> Problem:
    a, b = _number(rng, 4), rng.randint(2, 9)
    question = _ask(
        rng, ["What is {}*{}?", "{}*{}=?", "Multiply {} by {}.", "{}乘{}等于多少？"], a, b
    )
    steps = _columns(a, int(str(b) * len(str(a))), "*", lambda p, q, carry: p * q + carry)
    return Problem("multiply", _in_any_order(a, b), question, steps, str(a * b), f"{a}*{b}")


def _in_any_order(*operands: int) -> str:
    return " ".join(map(str, sorted(operands)))


def _ask(rng: random.Random, wordings: list[str], *parts: object) -> str:
    return rng.choice(wordings).format(*parts)


def _columns(a: int, b: int, sign: str, column: Callable[[int, int, int], int]) -> tuple[str, ...]:
    """Column by column from the right: both digits, the carry, what stays, and what that makes."""
    x, y = str(a)[::-1], str(b)[::-1]
    steps, carry, digits = [], 0, ""
    for i in range(max(len(x), len(y))):
        p, q = (int(s[i]) if i < len(s) else 0 for s in (x, y))
        total = column(p, q, carry)
        digits = f"{total % 10}{digits}"
        after = abs(total // 10)
        steps.append(f"{p}{sign}{q},{carry}:{total % 10},{after}:{digits}")
        carry = after
    digits = (f"{carry}{digits}" if carry else digits).lstrip("0")
    return (*steps, digits or "0")


_NAMES = "Anna Ben Chen Dora Emil Fang Gina Hugo Iris Jun Kai Lena Mei Nora Otto Ping".split()


def _look_up(rng: random.Random) -> Problem:
    """One to three of up to five keys, each right behind its name: a step says one of them.

    A name has a space before it wherever it stands, so that it is the same token everywhere, and
    nothing stands between it and its key: the model has to find a token again and go on with what
    followed, which layers learn early. With a colon between, whether it learned to look up at all
    within the training was a matter of luck.
    """
    names = rng.sample(_NAMES, rng.randint(1, 5))
    keys = {name: "".join(rng.choices("0123456789", k=rng.randint(3, 5))) for name in names}
    sentences = [f"{name}{key}." for name, key in keys.items()]
    for _ in range(rng.randint(0, 2)):
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(_FILLERS))
    asked = rng.sample(names, rng.randint(1, min(3, len(names))))
    wordings = _ONE_KEY if len(asked) == 1 else _SEVERAL_KEYS
    question = f"The keys are here. {' '.join(sentences)} {_ask(rng, wordings, ', '.join(asked))}"
    steps = tuple(f"It says {name}{keys[name]}." for name in asked)
    answer = " ".join(keys[name] for name in asked)
    return Problem("look up", f"{asked} {sentences}", question, steps, answer)


_ONE_KEY = ["What is {}'s key?", "Which key has {}?", "{} 的钥匙是多少？"]
_SEVERAL_KEYS = ["What are the keys of {}?", "Which keys have {}?", "{} 的钥匙是多少？"]
_FILLERS = (
    "The weather is fine today.",
    "Lunch is at noon.",
    "Please close the window.",
    "The train was late again.",
    "Nobody was in the room.",
)


def _sort(rng: random.Random) -> Problem:
    numbers = [_number(rng, 2) for _ in range(rng.randint(3, 6))]
    text = " ".join(map(str, numbers))
    question = rng.choice(["Sort {}.", "Put in order: {}", "排序：{}"]).format(text)
    steps, left = [], list(numbers)
    while left:
        least = min(left)
        left.remove(least)
        steps.append(f"{least}:{' '.join(map(str, left))}")
    answer = " ".join(map(str, sorted(numbers)))
    return Problem("sort", _in_any_order(*numbers), question, tuple(steps), answer)


def _reverse(rng: random.Random) -> Problem:
    items = rng.sample(_WORDS, rng.randint(3, 6))
    text = " ".join(items)
    question = rng.choice(["Reverse {}.", "Write backwards: {}", "倒过来写：{}"]).format(text)
    steps = tuple(f"{i}. {item}" for i, item in enumerate(items, 1))
    return Problem("reverse", text, question, steps, " ".join(reversed(items)))


_WORDS = "red blue green sun moon star cat dog bird tree river stone one two three four".split()

_COUNTS = {"one": "一", "two": "两", "three": "三", "four": "四", "five": "五", "six": "六"}
_COLOURS = {"red": "红", "blue": "蓝", "green": "绿", "white": "白", "black": "黑", "yellow": "黄"}
_THINGS = {
    "apple": ("个", "苹果"),
    "cup": ("个", "杯子"),
    "book": ("本", "书"),
    "bird": ("只", "鸟"),
    "cat": ("只", "猫"),
    "car": ("辆", "车"),
    "flower": ("朵", "花"),
    "pen": ("支", "笔"),
}


def _translate(rng: random.Random) -> Problem:
    count, colour, thing = (rng.choice(list(table)) for table in (_COUNTS, _COLOURS, _THINGS))
    measure, noun = _THINGS[thing]
    english = f"{count} {colour} {thing}{'s' * (count != 'one')}"
    chinese = f"{_COUNTS[count]}{measure}{_COLOURS[colour]}{noun}"
    parts = (
        f"{count} {_COUNTS[count]}",
        f"{colour} {_COLOURS[colour]}",
        f"{thing} {measure}{noun}",
    )
    if rng.random() < 0.5:
        question = rng.choice(["Say in Chinese: {}", "{} 用中文怎么说？"]).format(english)
        return Problem("translate", english, question, parts, chinese)
    question = rng.choice(["Say in English: {}", "{} 用英文怎么说？"]).format(chinese)
    parts = tuple(" ".join(reversed(part.split())) for part in parts)
    return Problem("translate", english, question, parts, english)


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "look up": _look_up,
    "sort": _sort,
    "reverse": _reverse,
    "translate": _translate,
}
