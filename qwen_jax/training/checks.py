"""Which values the fields of options may have, refused in one form of words."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from qwen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Of a finite number; None for no bound on that side."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        names = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
        bounds = {words: getattr(self, name) for name, words in names.items()}
        return " and ".join(f"{words} {x}" for words, x in bounds.items() if x is not None)


# Of what begins a random number generator.
SEED = Bounds(least=0, below=2**32)


def check_fields(options: Any, **allowed: Bounds | Collection[str]) -> None:
    """Checks fields of `options` by name: numbers by bounds, words by those that are known.

    None is what a field may have in either case.

    Raises:
      UserError: names the field, its value and what it may be.
    """
    for name, values in allowed.items():
        value = getattr(options, name)
        if value is None or value in values:
            continue
        if isinstance(values, Bounds):
            finite = "" if math.isfinite(value) else "finite, "
            raise UserError(f"{name} = {value} must be {finite}{values}")
        raise UserError(f"{name} = {value} is not supported; known: {', '.join(values)}")
