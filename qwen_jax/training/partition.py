"""A parameter tree in two: what is trained, and what is frozen."""

from collections.abc import Callable
from typing import Any

import jax

# Of a slash-separated path: whether the array there is trained.
Trained = Callable[[str], bool]


def partition(params: Any, trained: Trained) -> tuple[Any, Any]:
    """Two trees like `params`, each with None where the other has the array.

    To JAX and optax a None is no leaf: it has no gradient, and no state.
    """
    places = jax.tree_util.tree_map_with_path(
        lambda path, _: trained(jax.tree_util.keystr(path, simple=True, separator="/")), params
    )
    return (
        jax.tree.map(lambda leaf, is_trained: leaf if is_trained else None, params, places),
        jax.tree.map(lambda leaf, is_trained: None if is_trained else leaf, params, places),
    )


def combine(trained: Any, frozen: Any) -> Any:
    """The inverse of `partition`; `trained` as it is where there is nothing else (None)."""
    if frozen is None:
        return trained
    return jax.tree.map(
        lambda one, other: other if one is None else one,
        trained,
        frozen,
        is_leaf=lambda node: node is None,
    )
