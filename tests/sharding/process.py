"""One of two processes of a run: loads, writes text, trains a step, saves, restores, writes again.

Arguments: checkpoint, folder for results, address of the first process, number of this one, and
"dies" where the second is to end without a word before the step.
"""

import json
import os
import sys
from pathlib import Path

import jax

checkpoint, folder = map(Path, sys.argv[1:3])
address, number = sys.argv[3:5]
dies = sys.argv[5:] == ["dies"]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    address, num_processes=2, process_id=int(number), heartbeat_timeout_seconds=20
)

import numpy as np  # noqa: E402
import optax  # noqa: E402

import qwen_jax  # noqa: E402
from qwen_jax.checkpoint.orbax_format import save_orbax  # noqa: E402
from qwen_jax.training.objective import (  # noqa: E402
    Batch,
    TrainOptions,
)
from qwen_jax.training.train_step import (  # noqa: E402
    init_train_state,
    make_train_step,
)

PROMPTS = [[5, 6, 7], [8, 9]]


def main() -> None:
    """Prints a line of JSON: the loss, and the ids written before and after the step."""
    model, params = qwen_jax.load_pretrained(checkpoint, mesh="fsdp:2,tensor:2")
    written = [qwen_jax.generate(model, params, PROMPTS, max_new_tokens=4)]
    optimiser = optax.sgd(0.1)
    state = init_train_state(model, optimiser, params=params)
    step = make_train_step(model, optimiser, TrainOptions(dtype="float32"))
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8))
    if dies and number == "1":
        os._exit(9)
    state, metrics = step(state, Batch(ids))
    loss = float(metrics["loss"])
    target = folder / "trained"
    save_orbax(target, state.params)
    if number == "0":
        (target / "config.json").write_text((checkpoint / "config.json").read_text())
    jax.experimental.multihost_utils.sync_global_devices("saved")
    model, params = qwen_jax.load_pretrained(target, mesh="tensor:4")
    written.append(qwen_jax.generate(model, params, PROMPTS, max_new_tokens=4))
    print(json.dumps({"loss": loss, "written": written}))


main()
