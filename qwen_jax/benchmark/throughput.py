"""Tokens a second over many texts: rows that take one prompt after another, beside batches.

A pass writes all texts once. First every way makes one with each number of rows, which compiles as
well, so that seconds of compiling are left out; then the ways make the rest, turn by turn, each
with the number that was its best.
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tqdm

from qwen_jax.benchmark.batching import ManyTexts
from qwen_jax.benchmark.measure import LEAST_EQUAL, share_equal
from qwen_jax.benchmark.report import markdown, read_records, spread, three_digits, with_aim
from qwen_jax.benchmark.serving import Child
from qwen_jax.errors import UserError

# Of `batching.WRITERS`, each in a process of its own.
WAYS = SLOTS, STATIC, TRANSFORMERS = "slots", "static", "transformers"


@dataclasses.dataclass(frozen=True)
class TextSet:
    """Texts, and what slots should reach with them.

    Attributes:
      prompt_range, answer_range: as `ManyTexts` has them.
      aims: way -> how many times its speed.
    """

    prompt_range: tuple[int, int]
    answer_range: tuple[int, int]
    aims: Mapping[str, float] = dataclasses.field(default_factory=dict)


TEXT_SETS = (
    TextSet((16, 64), (8, 256), {STATIC: 1.4, TRANSFORMERS: 2.0}),
    TextSet((16, 512), (8, 128), {STATIC: 1.15}),
)
LEAST_OCCUPANCY = 0.85
# As records are called.
_WORKLOAD = "throughput"


@dataclasses.dataclass(frozen=True)
class Pass:
    """Attributes:
    what: the texts.
    model: that wrote them.
    way: of `WAYS`.
    size: rows at once.
    searching: whether it was one of those that tell the best size.
    tokens: that were written.
    seconds: without those of compiling.
    compiling: seconds of that.
    shares: of the rows, as `batching.Written` has them.
    equal: the share of tokens that is as in the first pass; None where it is the first.
    """

    what: str
    model: str
    way: str
    size: int
    searching: bool
    tokens: int
    seconds: float
    compiling: float
    shares: dict[str, float]
    equal: float | None

    @property
    def rate(self) -> float:
        """Tokens a second, the reading of prompts included."""
        return self.tokens / self.seconds

    def record(self) -> dict[str, Any]:
        """For a JSONL file."""
        return {"workload": _WORKLOAD, **dataclasses.asdict(self)}


def read_passes(records: Sequence[dict[str, Any]]) -> list[Pass]:
    """Those of `Pass.record` among records."""
    return read_records(records, _WORKLOAD, Pass)


def new_passes(
    texts: ManyTexts, model: str, sizes: Sequence[int], repeats: int, done: Sequence[Pass]
) -> Iterator[Pass]:
    """Makes the passes that are not done yet, each given as soon as it is made.

    Args:
      texts: to write.
      model: its name.
      sizes: numbers of rows to try.
      repeats: passes of each way with its best size, that which told so included.
      done: those of an earlier run, of any texts and models.

    Raises:
      UserError: an engine failed, or they do not write the same.
    """
    found = of_texts(done, texts, model)
    turns = [(way, size, True) for size in dict.fromkeys(sizes) for way in WAYS]
    turns = [turn for turn in turns if turn not in [(p.way, p.size, p.searching) for p in found]]
    with contextlib.ExitStack() as stack:
        engines = _Engines(texts, model, stack)
        for way, size, _ in tqdm.tqdm(turns, desc="sizes", disable=None):
            found.append(engines.run(way, size, searching=True))
            yield found[-1]
        best = best_sizes([p for p in found if p.size in sizes])
        turns = [
            (way, size)
            for repeat in range(repeats)
            for way, size in best.items()
            if len(_with_size(found, way, size)) <= repeat
        ]
        for way, size in tqdm.tqdm(turns, desc="best sizes", disable=None):
            engines.warm_up(way, size)
            yield engines.run(way, size, searching=False)


class _Engines:
    """Processes that are started when they are first asked for something."""

    def __init__(self, texts: ManyTexts, model: str, stack: contextlib.ExitStack):
        self._texts, self._model, self._stack = texts, model, stack
        self._children: dict[str, Child] = {}
        self._warm: set[tuple[str, int]] = set()
        self._expected: tuple[str, list[float]] | None = None

    def warm_up(self, way: str, size: int) -> None:
        """Has the process compile what the pass needs, if it has not made one before."""
        if (way, size) not in self._warm:
            self.run(way, size, searching=False)

    def run(self, way: str, size: int, searching: bool) -> Pass:
        if way not in self._children:
            child = Child(way, self._texts)
            self._children[way] = self._stack.enter_context(child)
        reading = self._children[way].work({"size": size})
        self._warm.add((way, size))
        return Pass(
            what=self._texts.describe(),
            model=self._model,
            way=way,
            size=size,
            searching=searching,
            tokens=len(reading.outcome),
            seconds=reading.seconds["write"],
            compiling=reading.seconds["compile"],
            shares=reading.shares,
            equal=self._compare(way, reading.outcome),
        )

    def _compare(self, way: str, outcome: list[float]) -> float | None:
        if self._expected is None:
            self._expected = way, outcome
            return None
        first, expected = self._expected
        equal = share_equal(outcome, expected)
        if equal < LEAST_EQUAL:
            raise UserError(
                f"{way} and {first} do not write the same, so that their times say nothing: "
                f"{equal:.0%} of {len(expected)} tokens are equal"
            )
        return equal


def of_texts(passes: Sequence[Pass], texts: ManyTexts, model: str) -> list[Pass]:
    """Those of a model that wrote these texts."""
    return [p for p in passes if (p.what, p.model) == (texts.describe(), model)]


def best_sizes(passes: Sequence[Pass]) -> dict[str, int]:
    """Each way's, of the passes that search, which are of the same texts."""
    found = {}
    for way in WAYS:
        own = [p for p in passes if p.searching and p.way == way]
        if own:
            found[way] = max(own, key=lambda p: p.rate).size
    return found


def _with_size(passes: Sequence[Pass], way: str, size: int) -> list[Pass]:
    return [p for p in passes if (p.way, p.size) == (way, size)]


def throughput_tables(passes: Sequence[Pass], aims: Mapping[str, float]) -> str:
    """Two Markdown tables of the passes of one model and text: by size, and the best of each way.

    Args:
      passes: with one or more of each way.
      aims: as `TextSet` has them.
    """
    sizes = sorted({p.size for p in passes})
    searched = {(p.way, p.size): p for p in passes if p.searching}
    heads = [f"{passes[0].what}: rows", *(f"{way}, tokens/s" for way in WAYS)]
    heads += ["slots occupied", "writing"]
    rows = []
    for size in sizes:
        own = {way: searched.get((way, size)) for way in WAYS}
        cells = [three_digits(p.rate) if p else "-" for p in own.values()]
        shares = own[SLOTS].shares if own[SLOTS] else {}
        cells += [f"{shares[name]:.0%}" if shares else "-" for name in ("occupancy", "writing")]
        rows.append([str(size), *cells])
    return f"{markdown(heads, rows)}\n\n{_best_table(passes, aims)}"


def _best_table(passes: Sequence[Pass], aims: Mapping[str, float]) -> str:
    best = best_sizes(passes)
    own = {way: _with_size(passes, way, size) for way, size in best.items()}
    ours = statistics.median(p.rate for p in own[SLOTS])
    rows = []
    for way, size in best.items():
        rates = [p.rate for p in own[way]]
        ratio = occupied = "-"
        if way == SLOTS:
            share = statistics.median(p.shares["occupancy"] for p in own[way])
            occupied = with_aim(share, LEAST_OCCUPANCY, ".0%")
        else:
            ratio = with_aim(ours / statistics.median(rates), aims.get(way), ".2f")
        equal = [p.equal for p in passes if p.way == way and p.equal is not None]
        cells = [way, str(size), spread(rates), ratio, occupied]
        rows.append([*cells, f"{min(equal):.1%}" if equal else "-"])
    heads = ["best of", "rows", "tokens/s", "slots to it", "slots occupied", "tokens equal"]
    return markdown(heads, rows)
