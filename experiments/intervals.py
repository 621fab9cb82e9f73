"""How sure a difference between two scalings is, by resampling what was measured."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

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


def difference(one: BySeed, other: BySeed | None, paired: bool, seed: int = 0) -> Estimate:
    """The mean of `one` less that of `other`, over models of the same seeds.

    The interval is the wider of two: Student's of the seeds' own means, each a model, and of the
    texts by resampling them. Of one seed it is that of the texts alone.

    Args:
      one, other: figures by seed and text; None for nothing that is taken off.
      paired: whether both have the same texts, which are then resampled together.
      seed: of the resampling.

    Raises:
      ValueError: they have no seed in common.
    """
    rng = np.random.default_rng(seed)
    seeds = sorted(one.keys() if other is None else one.keys() & other.keys())
    if not seeds:
        raise ValueError("there is no seed in common")
    means, drawn = [], []
    for number in seeds:
        sides = [one[number]] if other is None else [one[number], other[number]]
        if paired and other is not None:
            texts = sorted(sides[0].keys() & sides[1].keys())
            arrays = [np.array([sides[0][text] - sides[1][text] for text in texts])]
        else:
            arrays = [np.array(list(side.values())) for side in sides]
        resampled = [
            array[rng.integers(len(array), size=(_RESAMPLES, len(array)))].mean(axis=1)
            for array in arrays
        ]
        whole = [array.mean() for array in arrays]
        means.append(whole[0] - sum(whole[1:]))
        drawn.append(resampled[0] - sum(resampled[1:]))
    mean = float(np.mean(means))
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    if len(means) > 1:
        half = scipy.stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5
        low, high = min(low, mean - half), max(high, mean + half)
    return Estimate(mean, float(low), float(high))
