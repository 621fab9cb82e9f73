"""Jobs side by side, a process on a core each: models that are too small to use several cores.

A train step of a small model takes no longer on one core than on two, so that as many jobs as there
are cores take the time of one.
"""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import jax

from qwen_jax.errors import UserError
from tools import command_line

Job = TypeVar("Job")
Done = TypeVar("Done")


def default_processes() -> int:
    """As many as there are cores; on accelerators, which one process has for itself, one."""
    return len(_cores()) if jax.default_backend() == "cpu" else 1


def is_worker() -> bool:
    """Whether this process is one of several, of which each would draw a bar of its own."""
    return multiprocessing.parent_process() is not None


def run_jobs(work: Callable[[Job], Done], jobs: Sequence[Job], processes: int) -> Iterator[Done]:
    """What `work` returns of each job, as they end; with one process in this one, in order.

    Where this process is told to stop, or a job fails, those that run are sent SIGTERM and waited
    for: training saves and leaves.

    Args:
      work: can be pickled, as can jobs and what it returns.
      jobs: that need nothing of each other.
      processes: that run at the same time.

    Raises:
      UserError: there are several processes for accelerators, or one was killed.
    """
    if processes > 1 and jax.default_backend() != "cpu":
        raise UserError(
            f"--processes={processes}: one process has all of a {jax.default_backend()}; leave it "
            "out"
        )
    if processes == 1 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("spawn")
    cores, running = context.SimpleQueue(), context.SimpleQueue()
    processes = min(processes, len(jobs))
    for number in range(processes):
        cores.put(_cores()[number % len(_cores())])
    cache = jax.config.jax_compilation_cache_dir
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, context, _begin, (cores, running, cache)
    )
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        # No more than run: what waits in the pool could not be called off.
        waiting = iter(jobs)
        futures = {pool.submit(work, job) for job in itertools.islice(waiting, processes)}
        while futures:
            done, futures = concurrent.futures.wait(
                futures, return_when=concurrent.futures.FIRST_COMPLETED
            )
            futures |= {pool.submit(work, job) for job in itertools.islice(waiting, len(done))}
            for future in done:
                yield future.result()
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while not running.empty():
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.get(), signal.SIGTERM)
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a process of --processes was killed, for memory it may be; start again to go on, "
                "with --processes=1 for less memory"
            ) from None
        raise
    finally:
        pool.shutdown()
        signal.signal(signal.SIGTERM, before)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _begin(cores: Any, running: Any, cache: str | None) -> None:
    """Before a worker's first job, and before JAX counts its cores."""
    # The first process is the one that the terminal's ^C is for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running.put(os.getpid())
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    jax.config.update("jax_compilation_cache_dir", cache)
    command_line.quiet()


def _leave(*_: Any) -> None:
    sys.exit(128 + signal.SIGTERM)
