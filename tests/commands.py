"""Command lines run as processes of their own, forked where all imports have been done once.

Starting Python, JAX and our packages takes seconds, hundreds of times over. One process imports
what all commands do and forks; each child then runs its module as `python -m` would, and ends as
Python does. Nothing here defines flags or starts a thread or a backend.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Compiled programs are shared with the tests.
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}
_PRELOADED = ("qwen_jax.training.run", "qwen_jax.benchmark.report", "scipy.stats", "matplotlib")


def run(
    module: str,
    *arguments: str,
    stdin: str | bytes = "",
    timeout: float = 120,
    **changes: str,
) -> subprocess.CompletedProcess:
    """`python -m MODULE ARGUMENTS` in the repository; output is bytes where `stdin` is.

    With `changes` to the environment, which imports may read, it is a process from the start.
    """
    command = [sys.executable, "-m", module, *arguments]
    encoding = "utf-8" if isinstance(stdin, str) else None
    if changes:
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**ENVIRONMENT, **changes},
            input=stdin,
            capture_output=True,
            encoding=encoding,
            timeout=timeout,
        )
    with tempfile.TemporaryDirectory() as directory:
        files = [str(Path(directory) / name) for name in ("stdin", "stdout", "stderr")]
        Path(files[0]).write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
        request = {"module": module, "arguments": arguments, "files": files, "timeout": timeout}
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (Path(file).read_bytes() for file in files[1:])
    if status == -signal.SIGALRM:
        raise subprocess.TimeoutExpired(command, timeout, out, err)
    if encoding:
        out, err = out.decode(encoding), err.decode(encoding)
    return subprocess.CompletedProcess(command, status, out, err)


def only_line(text: str) -> str:
    """What is written there, one line; a failure shows all of them."""
    assert text.count("\n") == 1, text
    assert text.endswith("\n"), text
    return text[:-1]


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.commands"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(os.killpg, server.pid, signal.SIGKILL)
    return server


def _serve() -> None:
    """Answers each line, a request, with the exit status; returns in a child that is to be it."""
    for name in _PRELOADED:
        importlib.import_module(name)
    # A child that looks for garbage among all of it, as at its end, copies it and takes a second.
    gc.freeze()
    threads = Path("/proc/self/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, "a fork loses the others"
    # Not by sys.stdin, which a child is to find as new.
    requests = os.fdopen(os.dup(0))
    while request := requests.readline():
        child = os.fork()
        if child == 0:
            return _become(**json.loads(request))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return sys.exit()


def _become(module: str, arguments: list[str], files: list[str], timeout: float) -> None:
    for number, (file, flags) in enumerate(
        zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)
    ):
        opened = os.open(file, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = [module, *arguments]
    signal.setitimer(signal.ITIMER_REAL, timeout)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
