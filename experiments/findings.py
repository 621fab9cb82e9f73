"""Known effects, and what was measured of them."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from experiments.files import save
from experiments.intervals import Estimate


class Effect(Protocol):
    """A difference that is known from elsewhere.

    Attributes:
      name: of what is claimed.
      least, most: what the whole interval should lie between.
      otherwise: why it may not be there.
    """

    name: str
    least: float
    most: float
    otherwise: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """An effect and what was measured of it.

    Attributes:
      effect: the effect.
      found: the difference.
    """

    effect: Effect
    found: Estimate

    @property
    def seen(self) -> bool:
        """Whether the whole interval lies where the effect has it."""
        return self.effect.least < self.found.low and self.found.high < self.effect.most

    @property
    def against(self) -> bool:
        """Whether none of the interval does."""
        return self.found.high < self.effect.least or self.found.low > self.effect.most

    @property
    def verdict(self) -> str:
        """In words."""
        if self.seen:
            return "seen"
        if not math.isfinite(self.found.high):
            return "one model tells nothing of others"
        return "not seen" + ", but its reverse" * self.against

    def row(self) -> dict[str, object]:
        """For a table of all findings."""
        e, f = self.effect, self.found
        return {
            "effect": e.name,
            "least": e.least,
            "most": e.most,
            "mean": f.mean,
            "low": f.low,
            "high": f.high,
            "verdict": self.verdict,
        }


def draw_findings(found: Sequence[Finding], path: Path, what: str) -> None:
    """Each difference with its interval beside where it should lie, in its own unit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1 + 0.27 * len(found)), layout="constrained")
    axes = figure.subplots()
    for row, finding in enumerate(found):
        f, colour = finding.found, "C2" if finding.seen else "C3" if finding.against else "C7"
        if math.isfinite(f.high):
            axes.plot([f.low, f.high], [row, row], color=colour, linewidth=2)
        axes.plot(f.mean, row, "o", color=colour)
        for edge in (finding.effect.least, finding.effect.most):
            if math.isfinite(edge):
                axes.plot(edge, row, "|", color="black", markersize=9)
    axes.set_yticks(range(len(found)), [f.effect.name for f in found], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set(xlabel=f"{what}; black: where it should begin")
    axes.grid(True, axis="x", alpha=0.3)
    save(figure, path)
