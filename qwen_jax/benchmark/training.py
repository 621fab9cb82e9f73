"""Train steps, each engine in a process of its own, turn by turn so that a drifting machine hits
all alike.

Of its own, because how a process's memory is managed is a part of the time, and each engine is to
run as its users run it. Run as a module, `python -m qwen_jax.benchmark.training ENGINE DIRECTORY
ROWS LENGTH` makes a step for each line that it reads.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import tqdm

from qwen_jax.errors import UserError

# Both engines' AdamW.
_LEARNING_RATE, _DECAY, _CLIP = 1e-4, 0.1, 1.0
_B1, _B2, _EPS = 0.9, 0.95, 1e-8
# Losses of float32 steps that do the same differ by rounding only.
_TOLERANCE = 1e-3


def measure_training(
    directory: Path, rows: int, length: int, repeats: int
) -> dict[str, list[float]]:
    """Tokens a second of each engine's train steps: float32, AdamW, clipped gradients.

    Args:
      directory: of the checkpoint that both begin with.
      rows, length: of a batch of random tokens, the same in each step.
      repeats: steps that are measured, after two that warm up.

    Returns:
      engine -> one figure a repeat.

    Raises:
      UserError: a process failed, or the engines' losses are not the same.
    """
    with contextlib.ExitStack() as stack:
        children = {
            name: stack.enter_context(_child(name, directory, rows, length)) for name in ENGINES
        }
        figures: dict[str, list[float]] = {name: [] for name in children}
        for repeat in tqdm.trange(repeats + 2, desc="training", disable=None):
            losses = {}
            for name, child in children.items():
                seconds, losses[name] = _ask(name, child)
                if repeat > 1:
                    figures[name].append(rows * length / seconds)
            ours, peer = losses.values()
            if not abs(ours - peer) <= _TOLERANCE * abs(peer):
                raise UserError(
                    f"{directory}: the losses of step {repeat + 1} are {losses}; the engines do "
                    "not do the same, so that their times say nothing"
                )
    return figures


@contextlib.contextmanager
def _child(engine: str, directory: Path, rows: int, length: int):
    child = subprocess.Popen(
        [sys.executable, "-m", __name__, engine, str(directory), str(rows), str(length)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def _ask(engine: str, child: subprocess.Popen) -> tuple[float, float]:
    """Seconds and loss of one more step."""
    try:
        child.stdin.write("\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass
    line = child.stdout.readline()
    if not line:
        last = child.stderr.read().strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"measuring {engine} failed: {last[0]}")
    return tuple(json.loads(line))


def our_step(directory: Path, ids: np.ndarray) -> Callable[[], float]:
    """This package's step, as tools.train makes it on a CPU; a call returns the loss before it."""
    from qwen_jax.training.host_memory import keep_freed_memory

    keep_freed_memory()
    from qwen_jax.pretrained import load_pretrained
    from qwen_jax.training.objective import Batch, TrainOptions
    from qwen_jax.training.optimisers import OptimiserOptions, make_optimiser
    from qwen_jax.training.train_step import init_train_state, make_train_step

    model, params = load_pretrained(directory, "float32")
    options = OptimiserOptions(
        learning_rate=_LEARNING_RATE,
        schedule="constant",
        warmup_steps=0,
        weight_decay=_DECAY,
        b1=_B1,
        b2=_B2,
        eps=_EPS,
        clip_norm=_CLIP,
    )
    optimiser = make_optimiser(options, 1, params)
    state = init_train_state(model, optimiser, params=params)
    del params
    step = make_train_step(
        model, optimiser, TrainOptions(dtype="float32", scan=False, remat="none")
    )
    batch = Batch(ids)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def reference_step(directory: Path, ids: np.ndarray) -> Callable[[], float]:
    """The same with transformers and torch."""
    from qwen_jax.reference import import_reference, load_reference

    torch, _ = import_reference()
    model = load_reference(directory).train()
    # As ours: norms and biases do not decay.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed}, {"params": rest, "weight_decay": 0.0}],
        lr=_LEARNING_RATE,
        betas=(_B1, _B2),
        eps=_EPS,
        weight_decay=_DECAY,
    )
    ids = torch.as_tensor(ids)

    def run() -> float:
        optimiser.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimiser.step()
        return float(loss.detach())

    return run


ENGINES: dict[str, Callable[[Path, np.ndarray], Callable[[], float]]] = {
    "qwen_jax": our_step,
    "transformers": reference_step,
}


def _serve(engine: str, directory: Path, rows: int, length: int, out: IO[str]) -> None:
    from qwen_jax.hf_config import load_config

    vocabulary = load_config(directory).vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length))
    step = ENGINES[engine](directory, ids)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        print(json.dumps([time.perf_counter() - start, loss]), file=out, flush=True)


if __name__ == "__main__":
    try:
        _serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.stdout)
    except UserError as error:
        sys.exit(str(error))
