"""What an answer is worth: functions of a record and a text, by name, and their weighted sum.

Each can be computed again by anyone: no model judges.
"""

import dataclasses
import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.text import parse_reply
from qwen_jax.text.parsing import THINK_CLOSE, THINK_OPEN
from qwen_jax.training.data.records import Record

# Of a record's fields and an answer's text, with the <think> that the prompt may have opened.
Reward = Callable[[Mapping[str, Any], str], float]
ANSWER = "answer"


def exact(record: Mapping[str, Any], text: str) -> float:
    """1 where what stands behind the thinking is the record's `answer`, but for space around it.

    Raises:
      UserError: the record has no such text.
    """
    wanted = record.get(ANSWER)
    if not isinstance(wanted, str) or not wanted.strip():
        found = "is missing" if wanted is None else f"= {wanted!r}"
        raise UserError(f"{ANSWER} {found}; the reward exact compares with that text")
    reply = parse_reply(text)
    # Thinking that never ends has no content; a call is none.
    return float(reply.content.strip() == wanted.strip() and not reply.tool_calls)


def well_formed(record: Mapping[str, Any], text: str) -> float:
    """1 where thinking, if there is any, is opened and closed once, before an answer."""
    opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    reply = parse_reply(text)
    begins = not opened or text.lstrip().startswith(THINK_OPEN)
    fits = opened == closed and opened <= 1 and begins and not reply.problems
    return float(fits and bool(reply.content.strip() or reply.tool_calls))


REWARDS: dict[str, Reward] = {"exact": exact, "format": well_formed}


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """One term of the reward.

    Attributes:
      name: of `REWARDS`, or MODULE:FUNCTION for one of your own, which is imported.
      weight: in the sum; below 0 for what is to be avoided.

    Raises:
      UserError: there is no such function, or a weight that counts nothing.
    """

    name: str
    weight: float = 1.0

    def __post_init__(self):
        if not math.isfinite(self.weight) or self.weight == 0:
            raise UserError(f"reward {self.name}: weight = {self.weight} must be a number but 0")
        find_reward(self.name)


def find_reward(name: str) -> Reward:
    """The function of that name.

    Raises:
      UserError: there is none; tells the nearest.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(REWARDS)};"
        raise UserError(f"reward {name} is not known; {hint} MODULE:FUNCTION names your own")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"reward {name}: cannot be imported ({error})") from None
    if not callable(found):
        raise UserError(f"reward {name}: is no function")
    return found


def judge(
    options: Sequence[RewardOptions], record: Record, text: str
) -> tuple[float, dict[str, float]]:
    """The weighted sum of an answer's rewards, and each before its weight.

    Raises:
      UserError: a reward cannot be told of this record, or is not a number; names FILE:LINE.
    """
    values: dict[str, float] = {}
    for term in options:
        try:
            value = float(find_reward(term.name)(record.fields, text))
        except UserError as error:
            raise UserError(f"{record.name}: {error}") from None
        if not math.isfinite(value):
            raise UserError(f"{record.name}: reward {term.name} is {value}; give finite numbers")
        values[term.name] = value
    return sum(term.weight * values[term.name] for term in options), values
