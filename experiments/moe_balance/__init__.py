"""Balancing the experts of a mixture over how many tokens."""
