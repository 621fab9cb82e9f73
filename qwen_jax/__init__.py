"""Open-weight Qwen architectures as functional Flax modules.

model, params = qwen_jax.load_pretrained("Qwen/Qwen3-0.6B")
tokenizer = qwen_jax.load_tokenizer("Qwen/Qwen3-0.6B")
out = model.apply({"params": params}, [tokenizer.encode("Hello")])
"""

from qwen_jax.checkpoint.writer import save_pretrained
from qwen_jax.errors import UserError
from qwen_jax.inference.decoding import generate
from qwen_jax.pretrained import load_pretrained, load_tokenizer

__all__ = ["UserError", "generate", "load_pretrained", "load_tokenizer", "save_pretrained"]
