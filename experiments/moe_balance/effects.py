"""Known effects of balancing, each as a difference that is measured or not.

Of large models they are known from "Demons in the Detail" (arXiv 2501.11873), loss-free balancing
(2408.15664), DeepSeek-V3 (2412.19437) and expert choice (2202.09368); those of small models need
not be the same.
"""

import dataclasses
import math
from collections.abc import Sequence

from experiments.findings import Finding
from experiments.intervals import BySeed, Estimate, difference
from experiments.moe_balance.arms import GLOBAL, LOSS_FREE, MICRO, NONE
from experiments.moe_balance.domains import DOMAINS, LOW_ENTROPY
from experiments.moe_balance.study import Result

LOSS, LOW_ENTROPY_LOSS, TRAINED_LOSS = "loss", "low-entropy loss", "loss as trained"
LOSSES = (LOSS, LOW_ENTROPY_LOSS, TRAINED_LOSS)
_INFORMATION, _MAX_VIO, _MICRO_VIO = "domain_information", "max_vio", "max_vio_micro"


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a difference: a figure of an arm."""

    arm: str
    figure: str


@dataclasses.dataclass(frozen=True)
class Effect:
    """A difference `one` less `other`, and where it should lie.

    Attributes:
      name: of what is claimed.
      one, other: what is compared.
      least, most: what the whole interval should lie between.
      otherwise: why it may not be there, of small models.
    """

    name: str
    one: Side
    other: Side
    least: float = 0.0
    most: float = math.inf
    otherwise: str = "smaller than these models can tell"


def _more(name: str, figure: str, one: str, other: str, least: float = 0.0, **more) -> Effect:
    return Effect(name, Side(one, figure), Side(other, figure), least, **more)


def _equal(
    name: str,
    figure: str,
    one: str,
    other: str,
    within: float,
    otherwise: str = "the interval is wider than what counts as equal",
) -> Effect:
    return Effect(name, Side(one, figure), Side(other, figure), -within, within, otherwise)


_SHORT = "500 steps move little by so small a coefficient"
_HALF, _LATE = "micro 0.1 then global at 50%", "micro 0.1 then global at 80%"
EFFECTS: tuple[Effect, ...] = (
    _more("unbalanced collapses: MaxVio of none is 1 above global 0.1's", _MAX_VIO, NONE, GLOBAL,
          1.0),
    _more("loss-free's MaxVio is 1 below that of the loss at 0.001", _MAX_VIO, "global 0.001",
          LOSS_FREE, 1.0),
    _more("loss-free's MaxVio is below that of the loss at 0.01", _MAX_VIO, "global 0.01",
          LOSS_FREE),
    _equal("at equal loss: within 0.01 nats", LOSS, LOSS_FREE, "global 0.01", 0.01,
           "loss-free's is lower, as in the paper"),
    _more("or a lower one: below that of the loss at 0.01", LOSS, "global 0.01", LOSS_FREE),
    _more("counts of all tokens balance more than those of micro-batches: loss-free", _MAX_VIO,
          "loss-free sign 0.001 by micro counts", LOSS_FREE),
    _more("global groups specialise more than micro ones: half a bit", _INFORMATION, GLOBAL, MICRO,
          0.5),
    _more("and than sequence ones: half a bit", _INFORMATION, GLOBAL, "sequence 0.1", 0.5),
    _more("loss-free specialises more than micro groups: half a bit", _INFORMATION, LOSS_FREE,
          MICRO, 0.5),
    _equal("shuffled groups specialise as global ones: within 0.2 bits", _INFORMATION,
           "shuffled 0.1", GLOBAL, 0.2),
    _more("a buffer of counts specialises more than micro groups", _INFORMATION, "buffer 0.1",
          MICRO),
    _more("micro groups cost loss: above global's", LOSS, MICRO, GLOBAL),
    _more("most of all where entropy is low: above global's there", LOW_ENTROPY_LOSS, MICRO,
          GLOBAL),
    _more("the price of global groups: MaxVio of micro-batches is 1 above micro groups'",
          _MICRO_VIO, GLOBAL, MICRO, 1.0),
    _more("stronger alpha balances more: global 0.01 to 0.1", _MAX_VIO, "global 0.01", GLOBAL),
    _more("the same of micro: 0.01 to 0.1", _MICRO_VIO, "micro 0.01", MICRO),
    _more("stronger alpha costs loss: micro 0.01 to 1", LOSS, "micro 1", "micro 0.01"),
    _more("the same of global: 0.01 to 1", LOSS, "global 1", "global 0.01",
          otherwise="evenness of the whole batch costs a small model nothing"),
    _more("a late switch recovers: at 50% more information than micro", _INFORMATION, _HALF, MICRO),
    _more("but only a part: less than global from the start", _INFORMATION, GLOBAL, _HALF),
    _more("the later, the less: 50% against 80%", _INFORMATION, _HALF, _LATE),
    _more("a late switch recovers loss: micro above switching at 50%", LOSS, MICRO, _HALF),
    _more("but only a part: switching at 80% above global from the start", LOSS, _LATE, GLOBAL),
    _more("1% of a micro loss beside the global one balances micro-batches more", _MICRO_VIO,
          GLOBAL, "global 0.1 + micro 0.001", otherwise=_SHORT),
    Effect("expert choice leaks: its loss as trained is 0.01 below none's", Side(NONE, LOSS),
           Side("expert choice", TRAINED_LOSS), 0.01, otherwise="in rows of 32 tokens there is "
           "little future; that it leaks is shown by tests/nn/test_router.py"),
    Effect("and what it knows is lost without the future: read causally 0.01 above",
           Side("expert choice", LOSS), Side("expert choice", TRAINED_LOSS), 0.01),
    _more("z-loss keeps logits small: log Z", "log_z", NONE, "z-loss 0.001"),
)  # fmt: skip


def findings(results: Sequence[Result]) -> list[Finding]:
    """Of the effects that the results can tell."""
    found = []
    for effect in EFFECTS:
        one, other = (
            by_seed(results, side.arm, side.figure) for side in (effect.one, effect.other)
        )
        if one.keys() & other.keys():
            found.append(Finding(effect, _estimate(one, other)))
    return found


def _estimate(one: BySeed, other: BySeed) -> Estimate:
    """The difference; of one model without an interval, where texts are not told apart."""
    found = difference(one, other, paired=True)
    seeds = one.keys() & other.keys()
    if len(seeds) == 1 and len(one[min(seeds)]) == 1:
        return dataclasses.replace(found, low=-math.inf, high=math.inf)
    return found


def by_seed(results: Sequence[Result], arm: str, figure: str) -> BySeed:
    """A figure of an arm by seed; of losses by text as well, which arms have in common."""
    return {
        result.seed: values
        for result in results
        if result.arm == arm and (values := _values(result, figure))
    }


def _values(result: Result, figure: str) -> dict[int, float]:
    if figure == LOSS:
        return dict(enumerate(result.losses))
    if figure == LOW_ENTROPY_LOSS:
        return losses_of(result, LOW_ENTROPY)
    if figure == TRAINED_LOSS:
        return dict(enumerate(result.trained_losses or ()))
    return {0: result.figure(figure)}


def losses_of(result: Result, names: Sequence[str]) -> dict[int, float]:
    """Of the texts of some domains."""
    numbers = {DOMAINS.index(name) for name in names}
    pairs = zip(result.losses, result.domains, strict=True)
    return {row: loss for row, (loss, domain) in enumerate(pairs) if domain in numbers}
