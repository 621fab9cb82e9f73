"""The decoder's layers as training runs them: stacked and scanned, or one by one; with remat.

A scan compiles a layer once, however many there are. Layers differ, so a model is cut into
segments, each a pattern of layers that repeats; the segment's scan runs over the repeats.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.tokens import Tokens
from qwen_jax.sharding.axes import parameter_sharding
from qwen_jax.training.balancing import RouterSums, sum_routing

Params = Mapping[str, Any]
Remat = Literal["none", "dots", "full"]

# What is kept for the backward pass beside each layer's input.
_KEPT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers from `start` on: a pattern of `period` layers, `repeats` times."""

    start: int
    period: int
    repeats: int

    def index(self, repeat: int, place: int) -> int:
        """The layer at a place of the pattern in one of its repeats."""
        return self.start + repeat * self.period + place


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
    """`params` with the layers of each segment stacked.

    In place of `layers_0`, `layers_1` and so on there is `segments_{s}/layers_{place}` with the
    leaves of all repeats, [repeats, ...]. Other entries stay.

    Raises:
      UserError: layers of a segment differ, as where some of them have adapters.
    """
    stacked = {key: value for key, value in params.items() if not key.startswith("layers_")}
    for s, segment in enumerate(segments(config)):
        places = {}
        for place in range(segment.period):
            layers = [params[_layer(segment.index(r, place))] for r in range(segment.repeats)]
            for r, layer in enumerate(layers):
                _check_alike(segment.index(0, place), layers[0], segment.index(r, place), layer)
            places[_layer(place)] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        stacked[f"segments_{s}"] = places
    return stacked


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


def stacked_shardings(config: ModelConfig, mesh: Mesh, stacked: Params) -> dict[str, Any]:
    """Where the leaves of `stack_layers` lie: each layer's as by itself."""

    def place(path: tuple[Any, ...], leaf: jax.Array) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sharding = parameter_sharding(config, mesh, name)
        if not name.startswith("segments_"):
            return sharding
        return NamedSharding(mesh, PartitionSpec(None, *sharding.spec))

    return jax.tree_util.tree_map_with_path(place, stacked)


def _layer(index: int) -> str:
    return f"layers_{index}"


def run_layers(
    model: Decoder, params: Params, x: jax.Array, tokens: Tokens, remat: Remat = "none"
) -> tuple[jax.Array, RouterSums | None]:
    """The layers one after another, each compiled on its own.

    Args:
      model: whose layers.
      params: as `load_pretrained` returns them.
      x, tokens: as `Decoder.begin` returns them.
      remat: what is kept for the backward pass: "none" keeps everything, "dots" the results of
        products with weights, "full" the layers' inputs only.

    Returns:
      [B, T, D] before the final norm, and the routers' sums of the sparse layers, first to last;
      None if there are none.
    """
    router = []
    for i in range(model.config.num_hidden_layers):
        x, sums = _layer_function(model, i, remat, in_loop=False)(params[_layer(i)], x, tokens)
        if sums is not None:
            router.append(sums)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *router) if router else None


def scan_layers(
    model: Decoder, stacked: Params, x: jax.Array, tokens: Tokens, remat: Remat = "none"
) -> tuple[jax.Array, RouterSums | None]:
    """`run_layers` on the parameters of `stack_layers`, by a scan over each segment's repeats."""
    router = []
    for s, segment in enumerate(segments(model.config)):
        layers = [
            _layer_function(model, segment.index(0, place), remat, in_loop=True)
            for place in range(segment.period)
        ]

        def body(x, places, layers=layers):
            sums = []
            for place, layer in enumerate(layers):
                x, own = layer(places[_layer(place)], x, tokens)
                if own is not None:
                    sums.append(own)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums) if sums else None

        x, sums = jax.lax.scan(body, x, stacked[f"segments_{s}"])
        if sums is not None:
            # [repeats, sparse layers of the pattern, ...]
            router.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sums))
    return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *router) if router else None


def _layer_function(
    model: Decoder, index: int, remat: Remat, in_loop: bool
) -> Callable[[Params, jax.Array, Tokens], tuple[jax.Array, RouterSums | None]]:
    layer = model.layer(index)

    def run(params, x, tokens):
        x, _, routing = layer.apply({"params": params}, x, tokens, None)
        return x, None if routing is None else sum_routing(routing, tokens.real)

    return rematerialise(run, remat, in_loop)


def rematerialise(run: Callable[..., Any], remat: Remat, in_loop: bool) -> Callable[..., Any]:
    """`run`, of which the backward pass keeps what `run_layers` says of `remat`."""
    if remat == "none":
        return run
    # Within a loop there is nothing outside of it that XLA could share the second run with.
    return jax.checkpoint(run, policy=_KEPT[remat], prevent_cse=not in_loop)
