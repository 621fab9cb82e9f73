"""Measuring a model: perplexity, tasks, problems of its own; parity with the reference."""
