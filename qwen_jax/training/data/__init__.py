"""Data room of training: records, their tokens and losses, rows of them, batches with a state."""

from qwen_jax.training.data.options import DataOptions, SourceOptions, TokenOptions

__all__ = ["DataOptions", "SourceOptions", "TokenOptions"]
