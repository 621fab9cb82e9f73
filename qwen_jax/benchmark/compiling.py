"""How long JAX takes from Python to programs that can run, by its own account."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax

_PREFIX = "/jax/core/compile/"
# Compiling, or where a program is kept on disk reading it.
_GETTING = "backend_compile_duration"


@dataclasses.dataclass
class Compiling:
    """What has happened within `watch_compiling` until now.

    Attributes:
      tracing, getting: when, in seconds of `time.perf_counter`, Python was made into a compiler's
        input, and this into a program, compiled or read from disk.
    """

    tracing: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    getting: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @property
    def tracing_s(self) -> float:
        """Seconds of tracing and lowering."""
        return length_of_union(self.tracing)

    @property
    def getting_s(self) -> float:
        """Seconds of compiling, or of reading what has been."""
        return length_of_union(self.getting)

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return length_of_union([*self.tracing, *self.getting])


@contextlib.contextmanager
def watch_compiling() -> Iterator[Compiling]:
    """Gives what is filled while it lasts."""
    found = Compiling()

    def listen(event: str, duration: float, **_: object) -> None:
        if event.startswith(_PREFIX):
            end = time.perf_counter()
            spans = found.getting if event == _PREFIX + _GETTING else found.tracing
            spans.append((end - duration, end))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def length_of_union(spans: Sequence[tuple[float, float]]) -> float:
    """How much spans of time cover: programs are traced inside of one another."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
