"""The feed-forward block that is a mixture of experts, on one device or shared out on a mesh."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig, MoeSpec
from qwen_jax.errors import UserError
from qwen_jax.nn.expert_blocks import Leaf, num_experts
from qwen_jax.nn.expert_exchange import exchange_and_mix, pays_to_exchange
from qwen_jax.nn.linear import Linear, fetch_param
from qwen_jax.nn.low_rank import base_of
from qwen_jax.nn.mlp import SwiGLU
from qwen_jax.nn.moe import Dispatch, choose_dispatch, mix_chosen, mix_experts
from qwen_jax.nn.quantized import QuantizedWeight
from qwen_jax.nn.router import (
    Assignment,
    RouterOptions,
    Routing,
    assign,
    capacity_of,
    limit_capacity,
    route,
    router_logits,
)
from qwen_jax.sharding.axes import HIDDEN, TOKENS, Layout, num_shards, on_shards, parameter_axes


class SparseMoe(nn.Module):
    """The router, its experts, and where the config has one, the expert that all tokens go to.

    Attributes:
      config: with `moe`.
      dispatch: how the experts run; None for `choose_dispatch`'s choice.
      router: what training does to the router.
    """

    config: ModelConfig
    dispatch: Dispatch | None = None
    router: RouterOptions = RouterOptions()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        real: jax.Array | None = None,
        layout: Layout | None = None,
        places: jax.Array | None = None,
        num_tokens: int | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Runs the tokens of one call.

        Args:
          x: [B, T, D].
          real: bool [B, T], False at padding; None for all real.
          layout: where the tokens lie on a mesh; None without one.
          places: int32 [B, T], each token's place in its text, if not here.
          num_tokens: of the call, without what the mesh added; None for all.

        Returns:
          [B, T, D], and where the tokens went.
        """
        config, spec = self.config, self.config.moe
        E, F, D = spec.num_experts, spec.intermediate_size, config.hidden_size
        std = config.initializer_range
        noise = None
        if self.router.noise and self.has_rng("router"):
            shape = (*x.shape[:-1], E)
            noise = self.router.noise * jax.random.normal(self.make_rng("router"), shape)
        gate = _Gate(E, D, std, spec.score_bias, name="gate")()
        with jax.named_scope("router"):
            routing = _route_on_shards(x, gate, spec, self.router, real, layout, noise)
        experts = _Experts(E, F, D, std, name="experts")()
        at_once = math.prod(x.shape[:-1])
        num_tokens = at_once if num_tokens is None else num_tokens
        if layout is not None:
            at_once //= layout.num_expert_groups
        packed = any(isinstance(base_of(leaf), QuantizedWeight) for leaf in experts.values())
        method, factor = self.dispatch, self.router.capacity_factor
        if method is None and factor is not None:
            method = Dispatch.CAPACITY
        if method is None:
            platform = jax.default_backend() if layout is None else layout.platform
            method = choose_dispatch(at_once, spec, platform, packed)
        method = Dispatch(method)
        capacity = None
        if (factor is not None) != (method is Dispatch.CAPACITY):
            raise UserError(
                f"capacity_factor = {factor} with dispatch = {method.value}: give a "
                f"factor with dispatch = {Dispatch.CAPACITY.value}, and only there"
            )
        if factor is not None:
            capacity = capacity_of(num_tokens, spec, factor)
            routing = limit_capacity(routing, capacity, real, places)
        with jax.named_scope("experts"):
            y = _mix_on_shards(x, routing, experts, method, capacity, layout)
        if spec.shared_intermediate_size is not None:
            gate = nn.sigmoid(Linear(1, stddev=std, name="shared_expert_gate")(x))
            shared = SwiGLU(config, spec.shared_intermediate_size, name="shared_expert")
            y = y + gate * shared(x, layout)
        return y, routing


class _Weight(nn.Module):
    """Declares `weight` of `shape`."""

    shape: tuple[int, ...]
    stddev: float

    @nn.compact
    def __call__(self) -> Leaf:
        return fetch_param(self, "weight", nn.initializers.normal(self.stddev), self.shape)


class _Gate(nn.Module):
    """Declares the router: `weight` [E, D], and with `biased` what its scores are raised by."""

    E: int
    D: int
    stddev: float
    biased: bool

    @nn.compact
    def __call__(self) -> tuple[Leaf, jax.Array | None]:
        weight = fetch_param(self, "weight", nn.initializers.normal(self.stddev), (self.E, self.D))
        if not self.biased:
            return weight, None
        return weight, fetch_param(self, "score_bias", nn.initializers.zeros, (self.E,))


class _Experts(nn.Module):
    """Declares the three projections of all experts, as `mix_experts` takes them."""

    E: int
    F: int
    D: int
    stddev: float

    @nn.compact
    def __call__(self) -> dict[str, Leaf]:
        wide, narrow = (self.E, self.F, self.D), (self.E, self.D, self.F)
        shapes = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
        return {name: _Weight(shape, self.stddev, name=name)() for name, shape in shapes.items()}


def _route_on_shards(
    x: jax.Array,
    gate: tuple[Leaf, jax.Array | None],
    spec: MoeSpec,
    options: RouterOptions,
    real: jax.Array | None,
    layout: Layout | None,
    noise: jax.Array | None,
) -> Routing:
    """`route` on each device for its own tokens, the counts summed over all.

    What is assigned jointly is so for the tokens of all devices.
    """
    weight, bias = gate
    whole = jax.tree.map(lambda a: (None,) * a.ndim, weight)
    if options.assignment != Assignment.TOP_K:
        if bias is not None:
            raise UserError(
                f"router.assignment = {options.assignment}: the model's router has a bias of its "
                "scores, which only top_k reads; take another model or top_k"
            )
        logits = on_shards(router_logits, layout, (HIDDEN, whole, HIDDEN), HIDDEN)
        return assign(logits(x, weight, noise), spec, options, real)
    if layout is None:
        return route(x, weight, spec, real, bias, noise)

    def shard(x, weight, real, bias, noise):
        routing = route(x, weight, spec, real, bias, noise)
        return routing.replace(counts=jax.lax.psum(routing.counts, layout.axes_of(*TOKENS)))

    out_axes = Routing(HIDDEN, HIDDEN, HIDDEN, counts=(None,), dropped=())
    in_axes = (HIDDEN, whole, TOKENS, (None,), HIDDEN)
    return on_shards(shard, layout, in_axes, out_axes)(x, weight, real, bias, noise)


def _mix_on_shards(
    x: jax.Array,
    routing: Routing,
    experts: Mapping[str, Leaf],
    method: Dispatch,
    capacity: int | None,
    layout: Layout | None,
) -> jax.Array:
    """`mix_experts` where the experts are shared out.

    Either each device runs its experts on the tokens of all devices that it shares them with, and
    each token's home sums what they made of it; or, on TPUs, each token goes to its experts alone.
    Nothing is dropped, whatever the load.
    """
    if layout is None:
        return mix_experts(x, routing, experts, method, capacity)
    sharing, parts = layout.axes_of("experts"), layout.axes_of("width")
    exchanges = (
        method is Dispatch.RAGGED
        and layout.platform == "tpu"
        and pays_to_exchange(num_shards(layout.mesh, "experts"), routing.experts.shape[-1])
    )

    def shard(x, chosen, weights, experts):
        if exchanges:
            y = exchange_and_mix(x, chosen, weights, experts, sharing, method)
            return jax.lax.psum(y, parts)
        if sharing:
            x, chosen, weights = (
                jax.lax.all_gather(a, sharing, axis=0, tiled=True) for a in (x, chosen, weights)
            )
            E = num_experts(experts)
            mine = chosen - jax.lax.axis_index(sharing) * E
            chosen = jnp.where((mine >= 0) & (mine < E), mine, E)
        shards = num_shards(layout.mesh, "experts")
        y = mix_chosen(x, chosen, weights, experts, method, capacity, shards)
        y = jax.lax.psum(y, parts)
        if sharing:
            y = jax.lax.psum_scatter(y, sharing, scatter_dimension=0, tiled=True)
        return y

    weights = {name: _axes_in_use(name, leaf, layout) for name, leaf in experts.items()}
    mix = on_shards(shard, layout, (HIDDEN, HIDDEN, HIDDEN, weights), HIDDEN)
    return mix(x, routing.experts, routing.weights, dict(experts))


def _axes_in_use(name: str, leaf: Leaf, layout: Layout) -> Any:
    """The logical axes of the arrays of all experts' projection `name`, put together to be used."""
    parameter = f"experts/{name}/weight"

    def axes(path: tuple[Any, ...], _: jax.Array) -> tuple[str | None, ...]:
        inside = jax.tree_util.keystr(path, simple=True, separator="/")
        logical = parameter_axes(f"{parameter}/{inside}" if inside else parameter)
        return tuple(None if axis == "hidden" else axis for axis in logical)

    base = base_of(leaf)
    if isinstance(base, QuantizedWeight) and parameter_axes(parameter)[-1] == "width":
        shards, groups = num_shards(layout.mesh, "width"), base.scales.shape[-1]
        whole = groups % shards == 0 and groups * base.group_size == base.shape[-1]
        if shards > 1 and (base.group_of is not None or not whole):
            raise UserError(
                f"{parameter}: packed in {groups} groups of {base.group_size} inputs, which "
                f"{shards} shards of its width would cut through or find out of order; load it "
                "dense, or give a mesh with a smaller tensor axis"
            )
    return jax.tree_util.tree_map_with_path(axes, leaf)
