"""Measuring a model: parity with the reference."""
