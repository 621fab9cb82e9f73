"""Open-weight Qwen architectures as functional Flax modules.

model, params = qwen_jax.load_pretrained("Qwen/Qwen3-0.6B")
tokenizer = qwen_jax.load_tokenizer("Qwen/Qwen3-0.6B")
out = model.apply({"params": params}, [tokenizer.encode("Hello")])
"""

import importlib
from typing import TYPE_CHECKING, Any

from qwen_jax.errors import UserError

if TYPE_CHECKING:
    from qwen_jax.checkpoint.writer import save_pretrained
    from qwen_jax.inference.generation import generate
    from qwen_jax.pretrained import load_pretrained, load_tokenizer

__all__ = ["UserError", "generate", "load_pretrained", "load_tokenizer", "save_pretrained"]

# Where names are found on their first use, so that `import qwen_jax` waits for none of it.
_HOMES = {
    "generate": "qwen_jax.inference.generation",
    "load_pretrained": "qwen_jax.pretrained",
    "load_tokenizer": "qwen_jax.pretrained",
    "save_pretrained": "qwen_jax.checkpoint.writer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
