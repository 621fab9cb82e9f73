"""Prefill and decode speed, the engines turn by turn so that a drifting machine hits all alike."""

import time
from pathlib import Path

import numpy as np
import tqdm

from qwen_jax.benchmark.engines import ENGINES


def measure_throughput(
    directory: Path,
    vocab_size: int,
    prompt: int,
    steps: int,
    repeats: int,
    mesh: str | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of each engine, batch 1.

    Args:
      directory: of the checkpoint.
      vocab_size: random prompts are drawn from it.
      prompt: tokens to prefill.
      steps: tokens to decode after them.
      repeats: measurements of each, after one that warms up.
      mesh: of the devices for this package's models.

    Returns:
      engine -> {"prefill": [...], "decode": [...]}, one figure a repeat.
    """
    engines = {name: make(directory, mesh) for name, make in ENGINES.items()}
    ids = np.random.default_rng(0).integers(0, vocab_size, (1, prompt))
    figures = {name: {"prefill": [], "decode": []} for name in engines}
    for repeat in tqdm.trange(repeats + 1, desc="measuring", disable=None):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.prefill(ids)
            middle = time.perf_counter()
            engine.decode(steps)
            end = time.perf_counter()
            if repeat:
                figures[name]["prefill"].append(prompt / (middle - start))
                figures[name]["decode"].append(steps / (end - middle))
    return figures
