"""Attention by the kernels of accelerators: the same as `attend`, where their conditions hold."""
