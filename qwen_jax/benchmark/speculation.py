"""What guessing tokens ahead brings: drafters beside plain decoding, turn by turn on one model."""

import dataclasses
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tqdm

from qwen_jax.benchmark.report import markdown, three_digits
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.inference.drafting import Drafter
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.inference.speculation import Counts, SpeculativeStream
from qwen_jax.models.decoder import Decoder

PLAIN = "none"


@dataclasses.dataclass(frozen=True)
class SpeculationRow:
    """One drafter, or none.

    Attributes:
      drafter: its name.
      draft_tokens: of a guess; 0 of none.
      seconds: of each repeat, all prompts from reading to the last token.
      tokens: that were written in each.
      passes, drafted, accepted: as `Counts` has them, of one repeat; of none, a pass a token.
      same: the share of texts that are those of plain decoding: all, but for rounding, if greedy.
      speedup: tokens a second, times those of plain decoding, at the median repeat.
    """

    drafter: str
    draft_tokens: int
    seconds: tuple[float, ...]
    tokens: int
    passes: int
    drafted: int
    accepted: int
    same: float
    speedup: float

    @property
    def rate(self) -> float:
        """Tokens a second at the median repeat."""
        return self.tokens / statistics.median(self.seconds)


def measure_speculation(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    drafters: Mapping[str, Drafter],
    max_new_tokens: int,
    options: SamplingOptions | None = None,
    stop_ids: Iterable[int] | None = None,
    batch_size: int = 1,
    repeats: int = 5,
) -> list[SpeculationRow]:
    """Writes all texts with each drafter and without, turn by turn; the first turn only compiles.

    Args:
      model, params, max_new_tokens, options, stop_ids: as for `TokenStream`.
      prompts: in the order in which they run.
      drafters: by name.
      batch_size: prompts at once; those that are left over run by themselves.
      repeats: measurements of each.

    Returns:
      The row of plain decoding, and one for each drafter.
    """
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    arguments = (options, stop_ids)

    def run(drafter: Drafter | None) -> tuple[float, list[list[int]], Counts]:
        texts, counts = [], Counts()
        start = time.perf_counter()
        for batch in batches:
            if drafter is None:
                stream = TokenStream(model, params, batch, max_new_tokens, *arguments)
            else:
                stream = SpeculativeStream(
                    model, params, batch, max_new_tokens, drafter, *arguments
                )
            texts += _texts(stream, len(batch))
            if drafter is not None:
                counts += stream.counts
        return time.perf_counter() - start, texts, counts

    ways: dict[str, Drafter | None] = {PLAIN: None, **drafters}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for repeat in tqdm.trange(1 + repeats, desc="measuring", disable=None):
        for name, drafter in ways.items():
            took, *found[name] = run(drafter)
            if repeat:
                seconds[name].append(took)
    plain_texts, _ = found[PLAIN]
    rows = [
        _row(name, ways[name], tuple(seconds[name]), *found[name], plain_texts) for name in ways
    ]
    return [dataclasses.replace(row, speedup=row.rate / rows[0].rate) for row in rows]


def _texts(stream: Iterable[list[int | None]], count: int) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in range(count)]
    for step in stream:
        for text, token in zip(texts, step, strict=True):
            if token is not None:
                text.append(token)
    return texts


def _row(
    name: str,
    drafter: Drafter | None,
    seconds: tuple[float, ...],
    texts: list[list[int]],
    counts: Counts,
    plain_texts: list[list[int]],
) -> SpeculationRow:
    tokens = sum(map(len, texts))
    same = sum(a == b for a, b in zip(texts, plain_texts, strict=True)) / len(texts)
    return SpeculationRow(
        drafter=name,
        draft_tokens=0 if drafter is None else drafter.tokens,
        seconds=seconds,
        tokens=tokens,
        passes=tokens if drafter is None else counts.passes,
        drafted=counts.drafted,
        accepted=counts.accepted,
        same=same,
        speedup=1.0,
    )


def as_table(rows: Sequence[SpeculationRow]) -> str:
    """A Markdown table: acceptance, tokens a pass, speed with its spread, speed-up."""
    lines = []
    for row in rows:
        rates = [row.tokens / s for s in row.seconds]
        low, median, high = map(three_digits, (min(rates), row.rate, max(rates)))
        acceptance = f"{row.accepted / row.drafted:.1%}" if row.drafted else "-"
        cells = (
            row.drafter,
            str(row.draft_tokens),
            acceptance,
            f"{row.tokens / row.passes:.2f}",
            f"{median} ({low} to {high})",
            f"{row.speedup:.2f}",
            f"{row.same:.0%}",
        )
        lines.append(cells)
    heads = ["drafter", "at once", "acceptance", "tokens a pass", "tokens/s"]
    return markdown([*heads, "speed-up", "same texts"], lines)
