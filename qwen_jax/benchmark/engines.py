"""One set of operations, by this package and by transformers, so that both can be timed alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import qwen_jax
from qwen_jax.nn.cache import init_cache
from qwen_jax.reference import import_reference, load_reference


class Engine(Protocol):
    """A loaded model in float32."""

    def forward(self, ids: np.ndarray) -> None:
        """Logits of every position of `ids` [B, T], waited for."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Runs `ids` [B, T] into a new cache; the likeliest next token [B, 1]."""

    def decode(self, steps: int) -> np.ndarray:
        """The likeliest `steps` tokens [B, steps] after the one that was chosen last."""


class Ours:
    """This package."""

    def __init__(self, directory: Path, mesh: str | None = None):
        self._model, params = qwen_jax.load_pretrained(directory, "float32", mesh)
        self._variables = {"params": params}

        def step(variables: Any, ids: jax.Array, cache: Any) -> tuple[Any, jax.Array]:
            out = self._model.apply(variables, ids, cache=cache, logits_at="last")
            return out.cache, jnp.argmax(out.logits[:, -1], axis=-1)[:, None]

        self._step: Callable = jax.jit(step, donate_argnums=2)

    def forward(self, ids: np.ndarray) -> None:
        self._model.apply(self._variables, ids).logits.block_until_ready()

    def prefill(self, ids: np.ndarray, room: int = 128) -> np.ndarray:
        capacity = ids.shape[1] + room
        config, mesh = self._model.config, self._model.mesh
        cache = init_cache(config, len(ids), capacity, jnp.float32, mesh)
        self._cache, self._token = self._step(self._variables, ids, cache)
        return np.asarray(self._token)

    def decode(self, steps: int) -> np.ndarray:
        tokens = []
        for _ in range(steps):
            self._cache, self._token = self._step(self._variables, self._token, self._cache)
            tokens.append(self._token)
        # Read at the end only, so that one step is dispatched while another runs.
        return np.concatenate(jax.device_get(tokens), axis=1)


class Transformers:
    """The PyTorch reference, with its default attention; no mesh of ours is for it."""

    def __init__(self, directory: Path, mesh: str | None = None):
        del mesh
        self._torch, _ = import_reference()
        self._model = load_reference(directory)

    def forward(self, ids: np.ndarray) -> None:
        with self._torch.inference_mode():
            self._model(self._torch.as_tensor(ids), use_cache=False)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self._cache = None
        self._run(self._torch.as_tensor(ids))
        return self._token.numpy()

    def decode(self, steps: int) -> np.ndarray:
        tokens = []
        for _ in range(steps):
            self._run(self._token)
            tokens.append(self._token)
        return self._torch.cat(tokens, dim=1).numpy()

    def _run(self, ids: Any) -> None:
        with self._torch.inference_mode():
            out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._token = out.past_key_values, out.logits[:, -1:].argmax(-1)


ENGINES: dict[str, Callable[[Path, str | None], Engine]] = {
    "qwen_jax": Ours,
    "transformers": Transformers,
}
