"""Evaluations as pictures."""

from collections.abc import Sequence
from pathlib import Path

from qwen_jax.evaluation.problems import ALL, ANSWERS, Answer, mode_name, score


def draw_problems(answers: Sequence[Answer], title: str, path: Path) -> None:
    """The share of right answers by kind, a bar for each mode, with 95% intervals, as a PNG."""
    from matplotlib.figure import Figure

    shares = {(f.name, f.metric): f for f in score(answers)}
    kinds = [*dict.fromkeys(a.kind for a in answers if a.task == ANSWERS), ALL]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for offset, thinking in ((-0.2, True), (0.2, False)):
        mode = mode_name(thinking)
        own = [shares[f"{ANSWERS}, {kind}", f"right, {mode}"] for kind in kinds]
        places = [i + offset for i in range(len(kinds))]
        # Rounding may put the share outside its interval by an ulp.
        spread = [[max(0, f.value - f.low) for f in own], [max(0, f.high - f.value) for f in own]]
        axes.bar(places, [f.value for f in own], 0.38, yerr=spread, capsize=3, label=mode)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(ylim=(0, 1.05), ylabel="right", title=title)
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
