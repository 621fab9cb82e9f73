"""Wiring: which blocks in which order."""
