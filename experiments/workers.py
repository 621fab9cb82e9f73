"""Jobs side by side, a process on a core each: models that are too small to use several cores.

A train step of a small model takes no longer on one core than on two, so that as many jobs as there
are cores take the time of one.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import jax

from qwen_jax.errors import UserError
from tools import command_line

# On one core a small model compiles for longer than it trains: a seed of `moe_balance` takes a
# tenth less so. The caller's own flags come behind.
_COMPILE_QUICKLY = "--xla_backend_optimization_level=1"

Job = TypeVar("Job")
Done = TypeVar("Done")


def default_workers() -> int:
    """As many as there are cores; on accelerators, which one process has for itself, one."""
    return len(_cores()) if jax.default_backend() == "cpu" else 1


def is_worker() -> bool:
    """Whether this process is one of several, of which each would draw a bar of its own."""
    return multiprocessing.parent_process() is not None


def run_jobs(work: Callable[[Job], Done], jobs: Sequence[Job], workers: int) -> Iterator[Done]:
    """What `work` returns of each job, as they end; with one process in this one, in order.

    Where this process is told to stop, or a job fails, those that run are sent SIGTERM and waited
    for: training saves and leaves.

    Args:
      work: can be pickled, as can jobs and what it returns.
      jobs: that need nothing of each other.
      workers: processes that run at the same time.

    Raises:
      UserError: there are several processes for accelerators, or one was killed.
    """
    if workers > 1 and jax.default_backend() != "cpu":
        raise UserError(
            f"--workers={workers}: one process has all of a {jax.default_backend()}; leave it out"
        )
    if workers == 1 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    before = signal.signal(signal.SIGTERM, _leave)
    waiting = iter(jobs)
    # A pipe to each, and no queue of all: who is killed while it holds that one's lock stops all.
    processes: dict[Connection, SpawnProcess] = {}
    busy = set()
    try:
        for core, job in zip(itertools.cycle(_cores()), itertools.islice(waiting, workers)):
            pipe, process = _start(work, core)
            processes[pipe] = process
            pipe.send(job)
            busy.add(pipe)
        while busy:
            for pipe in wait(busy):
                result = _received(pipe)
                busy.discard(pipe)
                for job in itertools.islice(waiting, 1):
                    pipe.send(job)
                    busy.add(pipe)
                yield result
    finally:
        # Once more would end what saves.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for process in processes.values():
            process.terminate()
        # What has saved waits for another job, or the end.
        for pipe, process in processes.items():
            pipe.close()
            process.join()
        signal.signal(signal.SIGTERM, before)


def _start(work: Callable[[Any], Any], core: int) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    cache = jax.config.jax_compilation_cache_dir
    process = context.Process(target=_serve, args=(theirs, work, core, cache))
    process.start()
    # Else a process that dies would leave the pipe open.
    theirs.close()
    return ours, process


def _received(pipe: Connection) -> Any:
    try:
        result, error = pipe.recv()
    except (EOFError, ConnectionError):
        raise UserError(
            "a process of --workers was killed, for memory it may be; start again to go on, with "
            "--workers=1 for less memory"
        ) from None
    if error is not None:
        raise error
    return result


def _serve(pipe: Connection, work: Callable[[Any], Any], core: int, cache: str | None) -> None:
    """What a worker does until it is told to stop."""
    # The first process is the one that the terminal's ^C is for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Before JAX counts the cores and reads the flags.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    os.environ["XLA_FLAGS"] = f"{_COMPILE_QUICKLY} {os.environ.get('XLA_FLAGS', '')}"
    jax.config.update("jax_compilation_cache_dir", cache)
    command_line.quiet()
    # The first process has gone where there is an end.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            job = pipe.recv()
            try:
                answer = work(job), None
            except BaseException as error:
                error.add_note(traceback.format_exc())
                answer = None, error
            pipe.send(answer)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _leave(*_: Any) -> None:
    sys.exit(128 + signal.SIGTERM)
