"""Open-weight Qwen architectures as functional Flax modules."""
