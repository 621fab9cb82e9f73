"""Which frequencies each RoPE scaling leaves turning, without running a model.

A pair of channels that has not turned once within the trained length is at angles, beyond it, that
the model has never seen.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.files import line_style, replace, save, write_records
from qwen_jax.benchmark.report import markdown
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.nn.rope import attention_factor, inverse_frequencies
from qwen_jax.rope_scaling import parse_rope_flag, with_rope_scaling


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What a scaling makes of the pairs of a model's heads.

    Attributes:
      rope: as `--rope` has it.
      frequencies: radians a token of each pair, unscaled and scaled, at the length of the text.
      temperature: what scores are multiplied by.
      trained, length: tokens.
    """

    rope: str
    frequencies: tuple[tuple[float, float], ...]
    temperature: float
    trained: int
    length: int

    @property
    def turning(self) -> int:
        """Pairs that turn at least once within the trained length, in the model as scaled."""
        return sum(scaled * self.trained >= 2 * math.pi for _, scaled in self.frequencies)

    @property
    def unseen(self) -> int:
        """Pairs at angles at the end of the text that the model as trained has never seen.

        Such a pair did not turn once in training, and now turns further than it then did.
        """
        # But for rounding, where the two are the same.
        return sum(
            plain * self.trained < 2 * math.pi
            and scaled * self.length > plain * self.trained * (1 + 1e-5)
            for plain, scaled in self.frequencies
        )


def scalings(config: ModelConfig, texts: Sequence[str], trained: int, length: int) -> list[Scaling]:
    """What each of several scalings makes of a model.

    Args:
      config: of the model; its own scaling is left aside.
      texts: as `--rope` has them.
      trained, length: tokens.

    Raises:
      UserError: a scaling that the model cannot have.
    """
    plain = with_rope_scaling(config, {"rope_type": "default"})
    before = inverse_frequencies(plain.rope, plain.rotary_dim)
    found = []
    for text in texts:
        scaled = with_rope_scaling(config, parse_rope_flag(text))
        after = np.asarray(inverse_frequencies(scaled.rope, scaled.rotary_dim, length))
        if len(after) != len(before):
            raise UserError(
                f"--rope={text}: {len(after)} pairs where the model has {len(before)}; give a "
                "model that rotates whole heads"
            )
        found.append(
            Scaling(
                text,
                tuple(zip(before.tolist(), after.tolist(), strict=True)),
                float(attention_factor(scaled.rope, length)) ** 2,
                trained,
                length,
            )
        )
    return found


def some_of_each(trained: int, factor: float) -> list[str]:
    """Scalings of every kind by a factor, as `--rope` has them."""
    original = f"original={trained}"
    return [
        "none",
        f"linear:{factor:g}",
        f"ntk:{factor:g}",
        f"stepped_ntk,{original}",
        f"ntk_by_parts:{factor:g},{original}",
        f"yarn:{factor:g},{original}",
        f"yarn_by_rotations:{factor:g},{original}",
        f"dynamic_yarn,{original}",
        f"llama3:{factor:g},{original},low_freq_factor=1,high_freq_factor=4",
        "proportional,partial_rotary_factor=0.75",
        "resonance",
    ]


def write_study(workdir: Path, found: Sequence[Scaling], origin: Mapping[str, Any]) -> str:
    """Writes frequencies.jsonl, .csv, .md and .png; returns the table."""
    rows = [
        {"rope": scaling.rope, "pair": pair, "unscaled": plain, "scaled": scaled}
        for scaling in found
        for pair, (plain, scaled) in enumerate(scaling.frequencies)
    ]
    write_records(workdir / "frequencies", rows, origin)
    text = report(found)
    replace(workdir / "frequencies.md", text + "\n")
    draw(found, workdir / "frequencies.png")
    return text


def report(found: Sequence[Scaling]) -> str:
    """A Markdown table, a scaling a row."""
    trained, length, pairs = found[0].trained, found[0].length, len(found[0].frequencies)
    heads = [
        "scaling",
        f"of {pairs} pairs turn within {trained:,}",
        f"at unseen angles at {length:,}",
        "slowest pair's turns there",
        "scores times",
    ]
    rows = [
        [
            f"`{scaling.rope}`",
            str(scaling.turning),
            str(scaling.unseen),
            f"{scaling.frequencies[-1][1] * length / (2 * math.pi):.3f}",
            f"{scaling.temperature:.3f}",
        ]
        for scaling in found
    ]
    return markdown(heads, rows)


def draw(found: Sequence[Scaling], path: Path) -> None:
    """Each pair's frequency as a share of the unscaled one, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, scaling in enumerate(found):
        shares = [scaled / plain for plain, scaled in scaling.frequencies]
        axes.plot(shares, label=scaling.rope, **line_style(i))
    plain = [pair[0] for pair in found[0].frequencies]
    first = sum(frequency * found[0].trained >= 2 * math.pi for frequency in plain)
    axes.axvspan(first - 0.5, len(plain) - 0.5, alpha=0.12, color="grey")
    axes.text(
        len(plain) - 1, 1.04, f"no full turn in {found[0].trained:,} tokens", ha="right", fontsize=8
    )
    axes.set(xlabel="pair of channels, fastest first", ylabel="frequency to the unscaled one")
    axes.grid(True, alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7, frameon=False)
    save(figure, path)
