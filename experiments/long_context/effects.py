"""Known effects of scalings, each as a difference that is measured or not.

Of large models they are known from the papers that `qwen_jax.rope_scaling` and `nn.rope` name;
those of small models need not be the same.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from experiments.findings import Finding
from experiments.intervals import difference
from experiments.long_context.scoring import Score
from experiments.long_context.small_study import FACTOR, TUNED


@dataclasses.dataclass(frozen=True)
class Side:
    """What is measured on one side of a difference: of a method, at a multiple of the trained
    length."""

    method: str
    times: int


@dataclasses.dataclass(frozen=True)
class Effect:
    """A figure, or a difference `one` less `other`, and where it should lie.

    Attributes:
      name: of what is claimed.
      field: "share" of right answers or "nats".
      one, other: what is compared; None for a figure by itself.
      least, most: what the whole interval should lie between.
      task: that it is measured on.
      otherwise: why it may not be there, of small models.
    """

    name: str
    field: str
    one: Side
    other: Side | None
    least: float = 0.0
    most: float = math.inf
    task: str = "recall"
    otherwise: str = "smaller than these texts can tell"


def _more_right(name: str, one: Side, other: Side, least: float = 0.0, **fields: str) -> Effect:
    return Effect(name, "share", one, other, least, **fields)


def _more_nats(name: str, one: Side, other: Side) -> Effect:
    return Effect(name, "nats", one, other)


def _dilution(
    method: str, times: int, otherwise: str = "nearly all is right there without it"
) -> Effect:
    name = f"attention dilution: {method} with logn answers more, {times}x"
    sides = Side(f"{method} + logn", times), Side(method, times)
    return _more_right(name, *sides, otherwise=otherwise)


_TUNED = 2 * FACTOR
EFFECTS: tuple[Effect, ...] = (
    _more_right("none collapses: of its recall 30 points are lost at 4x", Side("none", 1),
                Side("none", 4), 0.3),
    _more_nats("PI is worse than none at 1x before fine-tuning", Side("PI", 1), Side("none", 1)),
    _more_right("static YaRN holds to its factor and falls behind it: 30 points from 4x to 8x",
                Side("YaRN", 4), Side("YaRN", 8), 0.3),
    _more_right("NTK falls before its factor: YaRN answers more at 4x", Side("YaRN", 4),
                Side("NTK", 4)),
    _more_right("the same, both with logn", Side("YaRN + logn", 4), Side("NTK + logn", 4)),
    _more_right("attention dilution: YaRN's temperature answers more, 4x", Side("YaRN", 4),
                Side("by parts", 4)),
    _dilution("none", 4, "keys stand at angles never seen, which logn does not mend"),
    *(_dilution(method, 4) for method in ("NTK", "Qwen1 NTK", "YaRN", "ABF", "DCA", "ReRoPE",
                                          "Self-Extend")),
    _dilution("DCA", 8),
    _dilution("ReRoPE", 8, "models differ: without logn some hold and some fall"),
    _more_right("DCA + logn holds where static YaRN has fallen, 8x", Side("DCA + logn", 8),
                Side("YaRN", 8)),
    _more_right("DCA alone holds where static YaRN has fallen, 8x", Side("DCA", 8),
                Side("YaRN", 8), otherwise="it has no temperature: its attention is diluted, as "
                "with logn it is not"),
    _more_right("DCA with the temperature of YaRN does, 8x", Side("DCA + temperature", 8),
                Side("YaRN", 8), otherwise="a temperature for all queries of a text is weaker than "
                "logn at its end"),
    _more_right("ReRoPE + logn holds where static YaRN has fallen, 8x", Side("ReRoPE + logn", 8),
                Side("YaRN", 8)),
    Effect("a window is flat in loss: within 0.1 nats from 1x to 8x", "nats", Side("window", 8),
           Side("window", 1), -0.1, 0.1, "loss"),
    Effect("sinks are flat in loss: within 0.1 nats from 1x to 8x", "nats", Side("sinks", 8),
           Side("sinks", 1), -0.1, 0.1, "loss"),
    _more_right("a window forgets: of its recall 30 points are lost from 1x to 8x",
                Side("window", 1), Side("window", 8), 0.3),
    Effect("a window is near chance at 8x: of 16 windows it sees one", "share",
           Side("window", 8), None, -1, 0.15),
    _more_nats("Qwen1's order at 4x: none above its NTK", Side("none", 4), Side("Qwen1 NTK", 4)),
    _more_nats("Qwen1's order at 4x: NTK above NTK with logn", Side("Qwen1 NTK", 4),
               Side("Qwen1 NTK + logn", 4)),
    _more_nats("Qwen1's order at 4x: with logn above with a window as well",
               Side("Qwen1 NTK + logn", 4), Side("Qwen1 NTK + logn + window", 4)),
    *(_more_nats(f"ABF is best once fine-tuned: {method} above it at {times}x",
                 Side(f"{method}{TUNED}", times), Side(f"ABF{TUNED}", times))
      for times in (FACTOR, _TUNED) for method in ("PI", "NTK", "YaRN")),
)  # fmt: skip


def findings(scores: Sequence[Score], ropes: Mapping[str, str], trained: int) -> list[Finding]:
    """Of the effects that the results can tell.

    Args:
      scores: of the study.
      ropes: name of a method -> its scaling.
      trained: tokens.
    """
    table: dict[tuple[str, str, int], dict[int, dict[int, Score]]] = {}
    for score in scores:
        own = table.setdefault((score.rope, score.task, score.length), {})
        own.setdefault(score.seed, {})[score.number] = score

    def side(effect: Effect, which: Side) -> dict[int, dict[int, float]] | None:
        name = which.method.removesuffix(TUNED)
        rope = ropes[name] + which.method[len(name) :]
        own = table.get((rope, effect.task, which.times * trained))
        return own and {
            seed: {number: getattr(score, effect.field) for number, score in texts.items()}
            for seed, texts in own.items()
        }

    found = []
    for effect in EFFECTS:
        one = side(effect, effect.one)
        other = effect.other and side(effect, effect.other)
        if one and (other or effect.other is None) and (not other or one.keys() & other.keys()):
            paired = other is not None and effect.one.times == effect.other.times
            found.append(Finding(effect, difference(one, other, paired)))
    return found
