"""Pictures of balance and specialisation: of the study's arms, and of checkpoints."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.files import line_style, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _panels(rows: int, columns: int, width: float, height: float) -> "tuple[Figure, np.ndarray]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 1, height * rows + 0.8), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_loads(loads: Mapping[str, Sequence[tuple[int, np.ndarray]]], path: Path) -> None:
    """Each expert's load by step, a panel for each arm and layer.

    Args:
      loads: arm -> pairs of a step and [L, E], as multiples of the even share.
      path: of the picture.
    """
    layers = len(next(iter(loads.values()))[0][1])
    figure, panels = _panels(layers, len(loads), 3.2, 2.4)
    for column, (arm, pairs) in enumerate(loads.items()):
        steps = [step for step, _ in pairs]
        values = np.array([load for _, load in pairs])
        for layer in range(layers):
            axes: Axes = panels[layer, column]
            axes.plot(steps, values[:, layer], linewidth=0.7)
            axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(0, max(10, float(values.max()) * 1.1))
            axes.set_title(f"{arm}, layer {layer}", fontsize=8)
            axes.tick_params(labelsize=7)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("load, multiples of the even share", fontsize=9)
    save(figure, path)


Interval = tuple[float, float, float]


def draw_trade(points: Mapping[str, tuple[Interval, Interval]], path: Path, loss: str) -> None:
    """Imbalance against loss, a cross of intervals for each arm.

    Args:
      points: arm -> MaxVio and loss, each with the ends of its interval.
      path: of the picture.
      loss: what it is.
    """
    figure, panels = _panels(1, 1, 9, 5.5)
    axes = panels[0, 0]
    for i, (arm, (vio, nats)) in enumerate(points.items()):
        colour = line_style(i)["color"]
        marker = "osD^v"[i // 10 % 5]
        axes.plot(vio[0], nats[0], marker=marker, color=colour, linestyle="", label=arm)
        axes.plot(vio[1:], [nats[0]] * 2, color=colour, linewidth=0.8)
        axes.plot([vio[0]] * 2, nats[1:], color=colour, linewidth=0.8)
    axes.set_xscale("log")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="MaxVio of the held-out texts, mean of layers", ylabel=loss)
    axes.grid(True, alpha=0.3)
    figure.legend(loc="outside right", fontsize=7)
    save(figure, path)


def draw_domains(
    shares: Mapping[str, np.ndarray], domains: Sequence[str], path: Path, columns: int | None = None
) -> None:
    """What part of each domain's choices each expert has, a panel for each.

    Args:
      shares: title -> [domains, E], rows that sum to 1; the colours end at 4 times the even share.
      domains: names of the rows.
      path: of the picture.
      columns: panels beside each other; None for all.
    """
    columns = columns or len(shares)
    rows = -(-len(shares) // columns)
    width = max(2.4, 0.02 * next(iter(shares.values())).shape[1] + 1.5)
    figure, panels = _panels(rows, columns, width, 0.4 + 0.16 * len(domains))
    for axes in panels.flat[len(shares) :]:
        axes.set_visible(False)
    image = None
    for number, (axes, (title, values)) in enumerate(
        zip(panels.flat, shares.items(), strict=False)
    ):
        even = values * values.shape[1]
        # Experts of the same domain stand together.
        order = np.lexsort((-even.max(axis=0), even.argmax(axis=0)))
        image = axes.imshow(even[:, order], vmin=0, vmax=4, aspect="auto", cmap="viridis")
        axes.set_title(title, fontsize=7)
        axes.set_xticks([])
        first = number % columns == 0
        axes.set_yticks(range(len(domains)), domains if first else [""] * len(domains), fontsize=7)
    figure.supxlabel("experts, by the domain that they serve most", fontsize=8)
    figure.colorbar(image, ax=panels, label="multiples of the even share", extend="max")
    save(figure, path)


def draw_layers(
    figures: Mapping[str, Mapping[str, np.ndarray]], names: Mapping[str, str], path: Path
) -> None:
    """Figures by layer, a panel for each figure and a line for each model or arm.

    Args:
      figures: model -> figure -> [L].
      names: figure -> what its axis says.
      path: of the picture.
    """
    count = len(next(iter(next(iter(figures.values())).values())))
    by_layer = {model: {"layer": range(count), **own} for model, own in figures.items()}
    _draw_lines(by_layer, names, "layer", path)


def draw_together(pairs: Mapping[str, np.ndarray], path: Path) -> None:
    """Which experts are chosen together: a graph, experts on a circle, a panel for each.

    A line joins two experts that are together more often than by chance, as wide as it is more;
    a dot is as large as its expert's load.

    Args:
      pairs: title -> [E, E], tokens that chose both experts, and on the diagonal the one.
      path: of the picture.
    """
    columns = min(4, len(pairs))
    figure, panels = _panels(-(-len(pairs) // columns), columns, 3.2, 3.2)
    for axes in panels.flat[len(pairs) :]:
        axes.set_visible(False)
    for axes, (title, together) in zip(panels.flat, pairs.items(), strict=False):
        lift, load = _lift(together)
        E = len(load)
        angles = 2 * math.pi * np.arange(E) / E
        x, y = np.cos(angles), np.sin(angles)
        # Of many experts the strongest pairs alone.
        ends = np.argwhere(np.triu(lift > 1.5, 1))
        ends = ends[np.argsort(-lift[tuple(ends.T)])][: 3 * E]
        for i, j in ends:
            wide = min(float(np.log2(lift[i, j])), 4)
            axes.plot(x[[i, j]], y[[i, j]], color="C0", alpha=0.5, linewidth=wide)
        axes.scatter(x, y, s=10 + 1500 * load / E, color="C1", zorder=3)
        if E <= 64:
            for i in range(E):
                axes.annotate(
                    str(i), (1.14 * x[i], 1.14 * y[i]), fontsize=6, ha="center", va="center"
                )
        axes.set_title(title, fontsize=8)
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.set_xlim(-1.3, 1.3)
        axes.set_ylim(-1.3, 1.3)
    save(figure, path)


def _lift(together: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much more often than by chance experts are together [E, E], and their loads' shares [E].

    By chance is in proportion to both loads, with as many pairs in all.
    """
    load = np.diag(together).astype(float)
    load = load / max(load.sum(), 1)
    pairs = together - np.diag(np.diag(together))
    expected = np.outer(load, load)
    np.fill_diagonal(expected, 0)
    total = max(expected.sum(), 1e-12)
    expected *= pairs.sum() / total
    return np.where(expected > 0, pairs / np.maximum(expected, 1e-9), 0), load


def draw_history(
    lines: Mapping[str, Mapping[str, Sequence[float]]], names: Mapping[str, str], path: Path
) -> None:
    """Figures by step, a panel for each figure and a line for each arm.

    Args:
      lines: arm -> figure, "step" among them -> values.
      names: figure -> what its axis says.
      path: of the picture.
    """
    _draw_lines(lines, names, "step", path)


def _draw_lines(
    lines: Mapping[str, Mapping[str, Sequence[float]]], names: Mapping[str, str], x: str, path: Path
) -> None:
    """A panel for each of `names`, with a line over the figure `x` for each model or arm."""
    columns = min(3, len(names))
    figure, panels = _panels(-(-len(names) // columns), columns, 3.8, 3)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    marker = "." if x == "layer" else None
    for axes, (name, label) in zip(panels.flat, names.items(), strict=False):
        for i, (line, own) in enumerate(lines.items()):
            axes.plot(own[x], own[name], marker=marker, label=line, **line_style(i))
        axes.set(xlabel=x, ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, alpha=0.3)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    save(figure, path)


def draw_sweep(
    sweeps: Mapping[str, Sequence[tuple[float, Interval, Interval]]], path: Path, loss: str
) -> None:
    """MaxVio and loss by a coefficient or a rate, a line for each way to balance.

    Args:
      sweeps: way -> its settings, each with MaxVio and the loss and the ends of their intervals.
      path: of the picture.
      loss: what it is.
    """
    figure, panels = _panels(1, 2, 4.6, 3.4)
    for axes, index, label in zip(panels.flat, (1, 2), ("MaxVio", loss), strict=True):
        for i, (way, points) in enumerate(sweeps.items()):
            x = [point[0] for point in points]
            mean, low, high = np.array([point[index] for point in points]).T
            error = [mean - low, high - mean]
            axes.errorbar(x, mean, yerr=error, label=way, marker="o", capsize=3, **line_style(i))
        axes.set_xscale("log")
        axes.set(xlabel="coefficient, or rate of the bias", ylabel=label)
        axes.grid(True, alpha=0.3)
    panels[0, 0].set_yscale("log")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    save(figure, path)
