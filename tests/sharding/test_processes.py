"""Two processes of two devices each, which only share a folder and a network."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optax
import pytest

import qwen_jax
from qwen_jax.training.objective import Batch, TrainOptions
from qwen_jax.training.train_step import init_train_state, make_train_step
from tests.reference import random_reference, save_reference

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    reference = random_reference("qwen3", num_hidden_layers=2)
    return save_reference(reference, tmp_path_factory.mktemp("checkpoint"))


def start(checkpoint, folder, *more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    }
    program = [sys.executable, str(Path(__file__).with_name("process.py"))]
    return [
        subprocess.Popen(
            [*program, str(checkpoint), str(folder), address, str(number), *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def test_two_processes_load_train_save_restore_and_generate_as_one_does(checkpoint, tmp_path):
    children = start(checkpoint, tmp_path)
    outputs = [child.communicate(timeout=400) for child in children]
    for child, (_, errors) in zip(children, outputs, strict=True):
        assert child.returncode == 0, errors
    # Gloo writes on standard output as well.
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second

    model, params = qwen_jax.load_pretrained(checkpoint)
    optimiser = optax.sgd(0.1)
    step = make_train_step(model, optimiser, TrainOptions(dtype="float32"))
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8))
    written = [qwen_jax.generate(model, params, PROMPTS, max_new_tokens=4)]
    state, metrics = step(init_train_state(model, optimiser, params=params), Batch(ids))
    written.append(qwen_jax.generate(model, state.params, PROMPTS, max_new_tokens=4))
    assert first["written"] == written
    assert first["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-6)


def test_when_one_dies_the_other_ends_and_says_which(checkpoint, tmp_path):
    begun = time.monotonic()
    survivor, dying = start(checkpoint, tmp_path, "dies")
    _, errors = survivor.communicate(timeout=200)
    assert dying.wait(timeout=10) == 9
    assert survivor.returncode != 0
    assert "Task 1" in errors
    assert time.monotonic() - begun < 120
