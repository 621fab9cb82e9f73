"""How sure a difference between two scalings is, by resampling what was measured."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

_RESAMPLES = 1000

# seed -> number of a text -> a figure of it.
BySeed = Mapping[int, Mapping[int, float]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and the interval that holds it with 95%."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean of `values`, by resampling them."""
    array = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(_RESAMPLES, len(array)))
    low, high = np.quantile(array[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def difference(one: BySeed, other: BySeed, paired: bool, seed: int = 0) -> Estimate:
    """The mean of `one` less that of `other`, models and texts of each resampled.

    A seed is a model of its own, so that seeds are resampled first; with few of them the interval
    is a rough one. The two are of the same models.

    Args:
      one, other: figures by seed and text, of the same seeds.
      paired: whether both have the same texts, which are then resampled together.
      seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    columns = []
    for number in sorted(one.keys() & other.keys()):
        a, b = one[number], other[number]
        if paired:
            texts = sorted(a.keys() & b.keys())
            own = np.array([a[text] - b[text] for text in texts])
            picks = rng.integers(len(own), size=(_RESAMPLES, len(own)))
            columns.append((own.mean(), own[picks].mean(axis=1)))
            continue
        sides = [np.array(list(side.values())) for side in (a, b)]
        means = [
            side[rng.integers(len(side), size=(_RESAMPLES, len(side)))].mean(axis=1)
            for side in sides
        ]
        columns.append((sides[0].mean() - sides[1].mean(), means[0] - means[1]))
    drawn = np.stack([column for _, column in columns])
    seeds = rng.integers(len(columns), size=(len(columns), _RESAMPLES))
    resampled = drawn[seeds, np.arange(_RESAMPLES)].mean(axis=0)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(np.mean([mean for mean, _ in columns])), float(low), float(high))
