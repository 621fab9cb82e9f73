"""Recipes of training: one Python file a run."""
