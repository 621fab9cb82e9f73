"""Jobs in several processes: each on its core, stopped together, and what is said of one that dies.

Jobs wait for each other by files, so that nothing hangs on how fast a process starts.
"""

import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from experiments.workers import default_workers, is_worker, run_jobs
from qwen_jax.errors import UserError


def appeared(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(path)


def where(folder: Path, job: int) -> tuple[int, int, bool, tuple[int, ...]]:
    (folder / f"{job}").touch()
    # Of two workers each has taken one of the first two jobs.
    appeared(folder / f"{1 - job % 2}")
    return job, os.getpid(), is_worker(), tuple(os.sched_getaffinity(0))


def waiting(folder: Path, job: str) -> str:
    """A job that saves when it is told to stop; another that ends as its name says."""

    def save(*_):
        (folder / "saved").touch()
        sys.exit(128 + signal.SIGTERM)

    if job == "waits":
        signal.signal(signal.SIGTERM, save)
        (folder / "waits").touch()
        appeared(folder / "never")
    if job == "fails":
        appeared(folder / "waits")
        raise UserError("this one fails")
    if job == "dies":
        appeared(folder / "waits")
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "later").touch()
    return job


def test_each_worker_has_a_core_and_all_jobs_are_done(tmp_path):
    found = sorted(run_jobs(functools.partial(where, tmp_path), range(5), 2))
    assert [job for job, *_ in found] == list(range(5))
    processes = {process: cores for _, process, _, cores in found}
    assert len(processes) == 2 and os.getpid() not in processes
    assert all(worker for *_, worker, _ in found)
    ours = os.sched_getaffinity(0)
    assert all(len(cores) == 1 and cores[0] in ours for cores in processes.values())
    assert len(set(processes.values())) == min(2, len(ours))
    assert default_workers() == len(ours)


def test_one_worker_is_this_process_and_keeps_the_order(tmp_path):
    jobs = run_jobs(lambda job: (job, os.getpid()), [3, 1, 2], 1)
    assert next(jobs) == (3, os.getpid())
    assert [job for job, _ in jobs] == [1, 2]
    assert not is_worker()


@pytest.mark.parametrize("with_it", ["fails", "dies"])
def test_a_job_that_ends_badly_stops_the_others(with_it, tmp_path):
    said = {"fails": "this one fails", "dies": "was killed.*--workers=1"}[with_it]
    jobs = run_jobs(functools.partial(waiting, tmp_path), ["waits", with_it, "later"], 2)
    with pytest.raises(UserError, match=said):
        list(jobs)
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "later").exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_all_save_when_the_first_process_is_told_to_stop(how, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def stop():
        appeared(tmp_path / "waits")
        os.kill(os.getpid(), how)

    thread = threading.Thread(target=stop)
    thread.start()
    jobs = run_jobs(functools.partial(waiting, tmp_path), ["waits", "waits", "later"], 2)
    with pytest.raises(KeyboardInterrupt if how == signal.SIGINT else SystemExit) as stopped:
        list(jobs)
    thread.join()
    assert how == signal.SIGINT or stopped.value.code == 143
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "later").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_caller_that_gives_up_leaves_no_process(tmp_path):
    jobs = run_jobs(functools.partial(waiting, tmp_path), ["waits", "returns"], 2)
    assert next(jobs) == "returns"
    appeared(tmp_path / "waits")
    jobs.close()
    assert (tmp_path / "saved").exists()


def test_accelerators_are_for_one_process(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert default_workers() == 1
    with pytest.raises(UserError, match=r"--workers=2: one process has all of a tpu; leave it out"):
        next(run_jobs(str, [1, 2], 2))
