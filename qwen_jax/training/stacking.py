"""The layers of a model as a scan takes them: stacked, those of a pattern that repeats together.

A scan compiles a layer once, however many there are. Layers differ, so a model is cut into
segments, each a pattern of layers that repeats; the segment's scan runs over the repeats. The name
of a stack says which layers lie in it, so that each can be found again by itself.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.sharding.axes import parameter_sharding

Params = Mapping[str, Any]

_STACK = re.compile(r"layers_(\d+)_to_(\d+)_by_(\d+)(?=/|$)")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers from `start` on: a pattern of `period` layers, `repeats` times."""

    start: int
    period: int
    repeats: int

    def index(self, repeat: int, place: int) -> int:
        """The layer at a place of the pattern in one of its repeats."""
        return self.start + repeat * self.period + place

    def stack(self, place: int) -> str:
        """The name of the stack of the layers at a place of the pattern."""
        last = self.index(self.repeats - 1, place)
        return f"layers_{self.start + place}_to_{last}_by_{self.period}"


def segments(config: ModelConfig) -> tuple[Segment, ...]:
    """The segments that have the fewest layers to compile, and of those the fewest segments.

    A layer is what mixes tokens in it, and whether its feed-forward block has experts.
    """
    sparse = config.moe.layers if config.moe else ()
    kinds = [(kind, i in sparse) for i, kind in enumerate(config.layer_types)]
    count = len(kinds)
    # For each layer the cost of all from it on, and their segments.
    best: list[tuple[int, int, tuple[Segment, ...]]] = [(0, 0, ())] * (count + 1)
    for start in reversed(range(count)):
        options = []
        for period in range(1, count - start + 1):
            pattern, stop = kinds[start : start + period], start + period
            while True:
                compiled, number, rest = best[stop]
                segment = Segment(start, period, (stop - start) // period)
                options.append((period + compiled, number + 1, (segment, *rest)))
                if kinds[stop : stop + period] != pattern:
                    break
                stop += period
        best[start] = min(options, key=lambda option: option[:2])
    return best[0][2]


def stack_layers(config: ModelConfig, params: Params) -> dict[str, Any]:
    """`params` with the layers of each segment stacked, such as `layers_0_to_27_by_1`.

    In place of `layers_0`, `layers_1` and so on there is a stack for each place of each segment's
    pattern, with the leaves of all repeats, [repeats, ...]. Other entries stay.

    Raises:
      UserError: layers of a segment differ, as where some of them have adapters.
    """
    stacked = {key: value for key, value in params.items() if not key.startswith("layers_")}
    for segment in segments(config):
        for place in range(segment.period):
            indices = [segment.index(r, place) for r in range(segment.repeats)]
            layers = [params[f"layers_{i}"] for i in indices]
            for i, layer in zip(indices, layers, strict=True):
                _check_alike(indices[0], layers[0], i, layer)
            stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
            stacked[segment.stack(place)] = stack
    return stacked


def unstack_layers(params: Params) -> dict[str, Any]:
    """The inverse of `stack_layers`; parameters that are not stacked stay as they are."""
    apart = {}
    for name, tree in params.items():
        layers = stacked_names(name)
        if layers is None:
            apart[name] = tree
            continue
        leaves, structure = jax.tree.flatten(tree)
        columns = [jnp.unstack(leaf) for leaf in leaves]
        for r, layer in enumerate(layers):
            apart[layer] = jax.tree.unflatten(structure, [column[r] for column in columns])
    return apart


def is_stacked(params: Params) -> bool:
    """Whether parameters are of `stack_layers`."""
    return any(_STACK.match(name) for name in params)


def stacked_names(name: str) -> list[str] | None:
    """Of a slash-separated path in a stack, that of each of its layers; None of any other path."""
    match = _STACK.match(name)
    if match is None:
        return None
    first, last, step = map(int, match.groups())
    return [f"layers_{i}{name[match.end() :]}" for i in range(first, last + 1, step)]


def shardings_of(config: ModelConfig, mesh: Mesh, params: Params) -> Any:
    """Where the leaves of parameters lie, stacked or not: each layer's as by itself."""

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sharding = parameter_sharding(config, mesh, name)
        if stacked_names(name) is None:
            return sharding
        return NamedSharding(mesh, PartitionSpec(None, *sharding.spec))

    return jax.tree_util.tree_map_with_path(place, params)


def _check_alike(i: int, one: Params, j: int, other: Params) -> None:
    """Refuses two layers whose arrays differ in name or shape."""

    def arrays(layer: Params) -> set[tuple[str, tuple[int, ...]]]:
        leaves = jax.tree_util.tree_leaves_with_path(layer)
        keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
        return {(keystr(path), leaf.shape) for path, leaf in leaves}

    differing = sorted(arrays(one) ^ arrays(other))
    if differing or jax.tree.structure(one) != jax.tree.structure(other):
        what = differing[0][0] if differing else "how a weight is packed"
        raise UserError(
            f"layers {i} and {j} cannot be scanned together: {what} is not the same in both; "
            "give them the same adapters, or set scan to False"
        )
