"""The same operations by this package and by transformers, so that both can be timed alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

import qwen_jax
from qwen_jax.inference.decoding import TokenStream
from qwen_jax.reference import import_reference, load_reference

# Tokens that may be decoded after a prompt.
MOST_STEPS = 128


class Engine(Protocol):
    """A loaded model in float32."""

    def forward(self, ids: np.ndarray) -> None:
        """Logits of every position of `ids` [B, T], waited for."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Runs `ids` [B, T] into a new cache; the likeliest next token [B, 1]."""

    def decode(self, steps: int) -> np.ndarray:
        """The likeliest `steps` tokens [B, steps] after the one that was chosen last."""


class Ours:
    """This package, as `generate` runs it."""

    def __init__(self, directory: Path, mesh: str | None = None):
        self._model, self._params = qwen_jax.load_pretrained(directory, "float32", mesh)

    def forward(self, ids: np.ndarray) -> None:
        out = self._model.apply({"params": self._params}, jnp.asarray(ids))
        out.logits.block_until_ready()

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        prompts = ids.tolist()
        self._stream = TokenStream(self._model, self._params, prompts, 1 + MOST_STEPS, stop_ids=())
        return self.decode(1)

    def decode(self, steps: int) -> np.ndarray:
        return np.array([next(self._stream) for _ in range(steps)]).T


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
