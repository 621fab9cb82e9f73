"""Train steps of AdamW by this package and by transformers, so that both can be timed alike."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

# Both engines' AdamW.
_LEARNING_RATE, _DECAY, _CLIP = 1e-4, 0.1, 1.0
_B1, _B2, _EPS = 0.9, 0.95, 1e-8


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


TRAINERS: dict[str, Callable[[Path, np.ndarray], Callable[[], float]]] = {
    "qwen_jax": our_step,
    "transformers": reference_step,
}
