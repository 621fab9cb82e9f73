"""The base that RoPE needs for a length of text, without any model.

Men et al. (arXiv 2405.14591): a query prefers keys that are like it over others only while, at
their distance m, the sum over pairs of cos(m * frequency) is not negative. A base reaches as far as
the first distance at which it is.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from experiments.files import replace, save, write_records
from qwen_jax.benchmark.report import markdown
from qwen_jax.config import RopeSpec
from qwen_jax.errors import UserError
from qwen_jax.nn.rope import inverse_frequencies

# The paper's smallest bases by length of text, for 128 channels, and the power in its Figure 1.
PUBLISHED = {
    1024: 4.3e3,
    2048: 1.6e4,
    4096: 2.7e4,
    8192: 8.4e4,
    16384: 3.1e5,
    32768: 6.4e5,
}
PUBLISHED_POWER = 1.628
# Length of text and base that models of 128 channels a head were trained with, as published.
MODELS = {
    "Qwen1": (8192, 1e4),
    "Qwen2.5": (32768, 1e6),
    "Qwen3": (32768, 1e6),
    "Qwen2.5-1M": (262144, 1e7),
}
# Distances that are looked at together.
_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Bound:
    """Attributes:
    head_dim: rotated channels.
    length: of text, in tokens.
    first: the smallest base tried that reaches it; None if none does.
    safe: the smallest of those from which on all that were tried reach it; None if none.
    published: the paper's, where it has one.
    """

    head_dim: int
    length: int
    first: float | None
    safe: float | None
    published: float | None


def reach(theta: float, head_dim: int, most: int) -> int:
    """The longest text, up to `most` tokens, that has no distance with a negative sum.

    Args:
      theta: RoPE's base.
      head_dim: rotated channels.
      most: tokens.
    """
    frequencies = inverse_frequencies(RopeSpec(theta=theta), head_dim).astype(np.float64)
    for start in range(0, most, _BLOCK):
        distances = np.arange(start, min(start + _BLOCK, most))
        negative = np.cos(distances[:, None] * frequencies).sum(axis=-1) < 0
        if negative.any():
            # A text of n tokens has distances up to n - 1.
            return int(distances[negative.argmax()])
    return most


def bounds(
    head_dim: int, lengths: Sequence[int], bases: Sequence[float], reaches: Sequence[int]
) -> list[Bound]:
    """For each length the smallest of `bases`, ascending, that reaches it.

    Args:
      head_dim: rotated channels.
      lengths: of text.
      bases: that were tried.
      reaches: of each of them.
    """
    found = []
    for length in lengths:
        enough = np.asarray(reaches) >= length
        failing = np.flatnonzero(~enough)
        safe = 0 if len(failing) == 0 else failing[-1] + 1
        found.append(
            Bound(
                head_dim,
                length,
                float(bases[enough.argmax()]) if enough.any() else None,
                float(bases[safe]) if safe < len(bases) else None,
                PUBLISHED.get(length) if head_dim == 128 else None,
            )
        )
    return found


def exponent(found: Sequence[Bound]) -> float | None:
    """Of the power of the length that the smallest base grows with, by least squares.

    None where fewer than two lengths are reached.
    """
    pairs = [(bound.length, bound.first) for bound in found if bound.first is not None]
    if len(pairs) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(pairs).T), 1)[0])


def write_study(
    workdir: Path,
    head_dims: Sequence[int],
    lengths: Sequence[int],
    per_decade: int,
    origin: Mapping[str, Any],
) -> str:
    """Tries bases and writes base_bound.jsonl, .csv, .md and .png; returns the table.

    Args:
      workdir: where they go.
      head_dims: rotated channels of a head.
      lengths: of text.
      per_decade: bases between a number and its tenfold.
      origin: what the results were made with.

    Raises:
      UserError: an odd number of channels, or lengths that no base reaches.
    """
    for head_dim in head_dims:
        if head_dim % 2:
            raise UserError(f"--head_dims={head_dim} should be even")
    # What cannot be written is found before the bases are tried.
    workdir.mkdir(parents=True, exist_ok=True)
    bases = np.logspace(2, 9, 7 * per_decade + 1)
    lengths = sorted(lengths)
    found: dict[int, list[Bound]] = {}
    for head_dim in head_dims:
        rows = tqdm.tqdm(bases, desc=f"bases of {head_dim} channels", disable=None)
        reaches = [reach(float(theta), head_dim, lengths[-1]) for theta in rows]
        found[head_dim] = bounds(head_dim, lengths, bases, reaches)
    text = report(found)
    rows = [dataclasses.asdict(bound) for own in found.values() for bound in own]
    write_records(workdir / "base_bound", rows, origin)
    replace(workdir / "base_bound.md", text + "\n")
    draw(found, workdir / "base_bound.png")
    return text


def report(found: dict[int, list[Bound]]) -> str:
    """A Markdown table of the bounds, and the powers that they grow with."""
    cells = [
        [
            str(bound.head_dim),
            f"{bound.length:,}",
            *(
                "-" if base is None else f"{base:.2g}"
                for base in (bound.first, bound.safe, bound.published)
            ),
        ]
        for own in found.values()
        for bound in own
    ]
    heads = ["channels", "length", "smallest base", "all from", "published"]
    powers = ", ".join(
        f"{power:.2f} with {dim} channels"
        for dim, own in found.items()
        if (power := exponent(own)) is not None
    )
    return (
        f"{markdown(heads, cells)}\n\nThe smallest base grows with the length to the power of "
        f"{powers}; published is {PUBLISHED_POWER}."
    )


def draw(found: dict[int, list[Bound]], path: Path) -> None:
    """Smallest base by length, with the paper's and what models have, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for head_dim, own in found.items():
        own = [bound for bound in own if bound.first is not None]
        axes.plot(
            [bound.length for bound in own],
            [bound.first for bound in own],
            marker="o",
            label=f"smallest base, {head_dim} channels",
        )
    axes.plot(PUBLISHED.keys(), PUBLISHED.values(), "k--", label="published, 128 channels")
    for name, place in MODELS.items():
        axes.plot(*place, "*", markersize=13, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="length of text, tokens", ylabel="RoPE's base")
    axes.grid(True, alpha=0.3)
    axes.legend()
    save(figure, path)
