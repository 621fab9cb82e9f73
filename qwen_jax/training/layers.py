"""The decoder's layers as training runs them: stacked and scanned, or one by one; with remat."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.tokens import Tokens
from qwen_jax.training.routing_sums import ALL_TOKENS, Grouping, RouterSums, sum_routing
from qwen_jax.training.stacking import Params, segments

Remat = Literal["none", "dots", "full"]

# What is kept for the backward pass beside each layer's input.
_KEPT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is asked of the routers on the way, and what they are given.

    Attributes:
      groupings: that tokens are counted in.
      each: whether the sums of every token are wanted.
      key: of their noise; None for none.
    """

    groupings: Mapping[str, Grouping] = dataclasses.field(default_factory=lambda: ALL_TOKENS)
    each: bool = False
    key: jax.Array | None = None

    def rngs(self, layer: int | jax.Array) -> dict[str, jax.Array]:
        """Random numbers of a layer's router, as `apply` takes them."""
        return {} if self.key is None else {"router": jax.random.fold_in(self.key, layer)}


_WATCH = Watch()


def run_layers(
    model: Decoder,
    params: Params,
    x: jax.Array,
    tokens: Tokens,
    remat: Remat = "none",
    watch: Watch = _WATCH,
) -> tuple[jax.Array, RouterSums | None]:
    """The layers one after another, each compiled on its own.

    Args:
      model: whose layers.
      params: as `load_pretrained` returns them.
      x, tokens: as `Decoder.begin` returns them.
      remat: what is kept for the backward pass: "none" keeps everything, "dots" the results of
        products with weights, "full" the layers' inputs only.
      watch: of the routers.

    Returns:
      [B, T, D] before the final norm, and the routers' sums of the sparse layers, first to last;
      None if there are none.
    """
    router = []
    for i in range(model.config.num_hidden_layers):
        layer = _layer_function(model, i, remat, watch, in_loop=False)
        x, sums = layer(params[f"layers_{i}"], x, tokens, watch.rngs(i))
        if sums is not None:
            router.append(sums)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *router) if router else None


def scan_layers(
    model: Decoder,
    stacked: Params,
    x: jax.Array,
    tokens: Tokens,
    remat: Remat = "none",
    watch: Watch = _WATCH,
) -> tuple[jax.Array, RouterSums | None]:
    """`run_layers` on the parameters of `stack_layers`, by a scan over each segment's repeats."""
    router = []
    for segment in segments(model.config):
        layers = [
            _layer_function(model, segment.index(0, place), remat, watch, in_loop=True)
            for place in range(segment.period)
        ]

        def body(x, repeat, layers=layers, segment=segment):
            number, places = repeat
            sums = []
            for place, layer in enumerate(layers):
                rngs = watch.rngs(segment.index(number, place))
                x, own = layer(places[place], x, tokens, rngs)
                if own is not None:
                    sums.append(own)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums) if sums else None

        places = [stacked[segment.stack(place)] for place in range(segment.period)]
        x, sums = jax.lax.scan(body, x, (jnp.arange(segment.repeats), places))
        if sums is not None:
            # [repeats, sparse layers of the pattern, ...]
            router.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sums))
    return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *router) if router else None


def _layer_function(
    model: Decoder, index: int, remat: Remat, watch: Watch, in_loop: bool
) -> Callable[..., tuple[jax.Array, RouterSums | None]]:
    layer = model.layer(index)

    def run(params, x, tokens, rngs):
        x, _, routing = layer.apply({"params": params}, x, tokens, None, rngs=rngs)
        if routing is None:
            return x, None
        return x, sum_routing(routing, tokens.real, watch.groupings, watch.each)

    return rematerialise(run, remat, in_loop)


def rematerialise(run: Callable[..., Any], remat: Remat, in_loop: bool) -> Callable[..., Any]:
    """`run`, of which the backward pass keeps what `run_layers` says of `remat`."""
    if remat == "none":
        return run
    # Within a loop there is nothing outside of it that XLA could share the second run with.
    return jax.checkpoint(run, policy=_KEPT[remat], prevent_cse=not in_loop)
