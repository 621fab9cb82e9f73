"""Eight domains as unlike as texts can be: what experts may specialise in, and must be shared over.

A batch balances well by itself where domains are mixed; a micro-batch of one domain does not, least
of all where the domain has few symbols, over which all experts then have to be spread.
"""

import dataclasses
import functools
import hashlib
import math
import string
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

DOMAINS = (
    "dna",
    "arithmetic",
    "brackets",
    "markov_a",
    "markov_b",
    "markov_c",
    "python",
    "english",
)
LOW_ENTROPY = DOMAINS[:3]

# Ids are ASCII codes.
VOCAB_SIZE = 128

# What a stream of random numbers is for; not 0, which seeds cannot tell from no entry at all.
_SOURCES, _TRAINING, _HELD_OUT = 1, 2, 3

_MARKOV_POOL = string.ascii_letters[:32]
_MARKOV_SYMBOLS = 24
_MARKOV_CONCENTRATION = 0.1
# Closer to 0, more rows would be one symbol over and over.
_DNA_CONCENTRATION = 0.5
_DNA_ORDER = 3

_BRACKETS = ("()", "[]", "{}")
_OPENS = 0.4
_DEEPEST = 8

_PYTHON_MODULES = 18
_TRAINED_SHARE = 0.9


@dataclasses.dataclass(frozen=True, eq=False)
class MarkovSource:
    """Symbols of which each is drawn by those before it.

    Attributes:
      symbols: int32 [K], their ids.
      transitions: float64 [K^n, K], the probability of each behind each n symbols; the index of
        these is a number of n digits to the base K, the newest symbol last.
    """

    symbols: np.ndarray
    transitions: np.ndarray

    @property
    def order(self) -> int:
        """How many symbols the next is drawn by."""
        return round(math.log(len(self.transitions), len(self.symbols)))

    @functools.cached_property
    def stationary(self) -> np.ndarray:
        """float64 [K^n], how often each n symbols stand in an endless text."""
        states, symbols = self.transitions.shape
        step = np.zeros((states, states))
        behind = np.arange(states * symbols) % states
        np.add.at(step, (np.arange(states * symbols) // symbols, behind), self.transitions.ravel())
        # One equation follows from the others; that the shares sum to 1 takes its place.
        equations = step.T - np.eye(states)
        equations[-1] = 1
        return np.linalg.solve(equations, np.eye(states)[-1])

    @functools.cached_property
    def entropy_rate(self) -> float:
        """Of an endless text, in nats per symbol: the least loss where n symbols can be seen."""
        p = self.transitions
        surprise = -np.log(p, out=np.zeros_like(p), where=p > 0)
        return float(self.stationary @ (p * surprise).sum(axis=-1))

    @functools.cached_property
    def _edges(self) -> np.ndarray:
        """float64 [K^n * K], sorted: cumulative probabilities, the index of the row added to each.

        One search then draws for rows of different states at once.
        """
        edges = np.cumsum(self.transitions, axis=-1)
        edges[:, -1] = 1
        return (edges + np.arange(len(edges))[:, None]).ravel()

    @functools.cached_property
    def _stationary_edges(self) -> np.ndarray:
        edges = np.cumsum(self.stationary)
        edges[-1] = 1
        return edges

    def rows(self, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """int32 [count, length], windows of an endless text."""
        states, symbols = self.transitions.shape
        order = self.order
        state = np.searchsorted(self._stationary_edges, rng.random(count), side="right")
        found = np.empty((max(length, order), count), np.int64)
        for place in range(order):
            found[place] = state // symbols ** (order - 1 - place)
        chances = rng.random((len(found) - order, count))
        for place, chance in enumerate(chances, order):
            # Where the search ends is a number of n + 1 digits, the newest symbol last.
            grown = np.searchsorted(self._edges, state + chance, side="right")
            found[place] = grown
            state = grown % states
        return self.symbols[found[:length].T % symbols]


@dataclasses.dataclass(frozen=True)
class Domains:
    """Where texts come from, by name.

    dna: four symbols, each drawn by the three before it. arithmetic: sums of numbers below 100, a
    line each. brackets: nested, of three kinds. markov_a to markov_c: 24 symbols each, of the same
    32, each drawn by the one before it. python and english: `real_text`.

    Rows of arithmetic and brackets begin with a fresh text, all others anywhere in one.

    Attributes:
      seed: of what follows what in dna and markov_*; the others are the same for every seed.
    """

    seed: int

    @functools.cached_property
    def _sources(self) -> dict[str, MarkovSource]:
        return {
            name: _markov_source(name, np.random.default_rng([self.seed, _SOURCES, number]))
            for number, name in enumerate(DOMAINS)
            if name == "dna" or name.startswith("markov_")
        }

    def source(self, name: str) -> MarkovSource:
        """That of dna, or of one of markov_*."""
        return self._sources[name]

    def rows(
        self, name: str, count: int, length: int, rng: np.random.Generator, held_out: bool = False
    ) -> np.ndarray:
        """Rows of one domain.

        Args:
          name: one of `DOMAINS`.
          count: of rows.
          length: of each, in tokens.
          rng: what they are drawn from.
          held_out: whether real texts are those that are never trained on. The other domains have
            no end, and are told apart by `rng` alone.

        Returns:
          int32 [count, length], ASCII codes.
        """
        match name:
            case "arithmetic":
                return _arithmetic(count, length, rng)
            case "brackets":
                return _brackets(count, length, rng)
            case "python" | "english":
                return _windows(real_text(name), count, length, rng, held_out)
        return self.source(name).rows(count, length, rng)


def entropy_rate(seed: int, name: str) -> float:
    """Of dna or one of markov_*, in nats per token.

    It is the least loss on every token but the first; the second and third of dna, of which a row
    does not hold the three tokens before, have a somewhat higher one.
    """
    return Domains(seed).source(name).entropy_rate


@functools.cache
def real_text(name: str) -> np.ndarray:
    """int32 [N], one of two texts that come with Python, but for characters beyond ASCII.

    Args:
      name: "python" for the source of the standard library's first 18 public modules of one file,
        by name (`abc` to `code` in Python 3.11); "english" for the topics that `help()` explains,
        each paragraph once.
    """
    if name == "english":
        # Topics quote each other: what is held out would have been trained on.
        whole = "\n\n".join(text for _, text in sorted(topics.items()))
        parts = list(dict.fromkeys(whole.split("\n\n")))
    else:
        library = Path(sysconfig.get_path("stdlib"))
        public = sorted(module for module in sys.stdlib_module_names if module[0] != "_")
        files = [path for module in public if (path := library / f"{module}.py").is_file()]
        parts = [path.read_text("utf-8") for path in files[:_PYTHON_MODULES]]
    text = "\n\n".join(parts).encode("ascii", "ignore")
    return np.frombuffer(text, np.uint8).astype(np.int32)


def texts_digest() -> str:
    """16 hexadecimal digits of both real texts, which differ between versions of Python."""
    digest = hashlib.sha256()
    for name in ("python", "english"):
        # No text has a 0.
        digest.update(real_text(name).astype(np.uint8).tobytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class TrainingBatches:
    """Batches to train on by their number, for grain.

    Attributes:
      seed: of the sources, and of what is drawn from them.
      steps: how many batches there are.
      microbatch_rows: rows of each domain in each batch.
      length: of a row, in tokens.
    """

    seed: int
    steps: int
    microbatch_rows: int = 4
    length: int = 32

    @functools.cached_property
    def _domains(self) -> Domains:
        return Domains(self.seed)

    def __len__(self) -> int:
        """How many batches there are."""
        return self.steps

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """A micro-batch of each domain, one behind another in an order that is drawn.

        Returns:
          `input_ids`, int32 [8 * microbatch_rows, length], and `domains`, int32
          [8 * microbatch_rows], the index in `DOMAINS` of each row.
        """
        if not 0 <= number < self.steps:
            raise IndexError(f"batch {number} of {self.steps}")
        rng = np.random.default_rng([self.seed, _TRAINING, number])
        return _batch(self._domains, self.microbatch_rows, self.length, rng, held_out=False)


def held_out_batches(
    seed: int, tokens: int = 16_384, microbatch_rows: int = 4, length: int = 32
) -> list[dict[str, np.ndarray]]:
    """Batches to measure on, of the form of `TrainingBatches` of the same seed and sources.

    Args:
      seed: of the sources, and of what is drawn from them.
      tokens: of all batches; what a last one has too many stays.
      microbatch_rows: rows of each domain in each batch.
      length: of a row, in tokens.
    """
    domains = Domains(seed)
    return [
        _batch(
            domains,
            microbatch_rows,
            length,
            np.random.default_rng([seed, _HELD_OUT, number]),
            held_out=True,
        )
        for number in range(-(-tokens // (len(DOMAINS) * microbatch_rows * length)))
    ]


def _batch(
    domains: Domains, microbatch_rows: int, length: int, rng: np.random.Generator, held_out: bool
) -> dict[str, np.ndarray]:
    order = rng.permutation(len(DOMAINS))
    rows = [domains.rows(DOMAINS[i], microbatch_rows, length, rng, held_out) for i in order]
    return {
        "input_ids": np.concatenate(rows),
        "domains": np.repeat(order.astype(np.int32), microbatch_rows),
    }


def _markov_source(name: str, rng: np.random.Generator) -> MarkovSource:
    if name == "dna":
        symbols, order, concentration = _ids("ACGT"), _DNA_ORDER, _DNA_CONCENTRATION
    else:
        symbols = rng.choice(_ids(_MARKOV_POOL), _MARKOV_SYMBOLS, replace=False)
        order, concentration = 1, _MARKOV_CONCENTRATION
    size = len(symbols)
    return MarkovSource(symbols, rng.dirichlet(np.full(size, concentration), size**order))


def _arithmetic(count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    # The shortest line, "0+0=0\n", has 6 characters.
    picks = rng.integers(10_000, size=(count, -(-length // 6)))
    sums = _sums()
    return _table("".join(sums[i] for i in row)[:length] for row in picks.tolist())


@functools.cache
def _sums() -> tuple[str, ...]:
    return tuple(f"{a}+{b}={a + b}\n" for a in range(100) for b in range(100))


def _brackets(count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    opens = (rng.random((count, length)) < _OPENS).tolist()
    kinds = rng.integers(len(_BRACKETS), size=(count, length)).tolist()
    return _table(_nested(*row) for row in zip(opens, kinds, strict=True))


def _nested(opens: list[bool], kinds: list[int]) -> str:
    found: list[str] = []
    due: list[str] = []
    for may_open, kind in zip(opens, kinds, strict=True):
        if not due or (may_open and len(due) < _DEEPEST):
            opening, closing = _BRACKETS[kind]
            found.append(opening)
            due.append(closing)
        else:
            found.append(due.pop())
    return "".join(found)


def _windows(
    text: np.ndarray, count: int, length: int, rng: np.random.Generator, held_out: bool
) -> np.ndarray:
    cut = int(_TRAINED_SHARE * len(text))
    begin, end = (cut, len(text)) if held_out else (0, cut)
    starts = rng.integers(begin, end - length + 1, count)
    return text[starts[:, None] + np.arange(length)]


def _ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)


def _table(rows: Iterable[str]) -> np.ndarray:
    texts = list(rows)
    return _ids("".join(texts)).reshape(len(texts), -1)
