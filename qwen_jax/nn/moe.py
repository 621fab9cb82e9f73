"""Mixtures of experts: five ways to run the experts that a router chose.

Here N is the number of tokens, E of experts, k of experts a token goes to, F an expert's width.
"""

import enum
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.config import MoeSpec
from qwen_jax.nn.expert_blocks import (
    LARGEST_BLOCK,
    Leaf,
    block_size,
    count_choices,
    feed_forward,
    num_experts,
    run_blocks,
)
from qwen_jax.nn.kernels.mosaic import kernel_precision
from qwen_jax.nn.linear import as_dense
from qwen_jax.nn.low_rank import LowRankWeight, add_update
from qwen_jax.nn.router import Routing, places_of


class Dispatch(enum.StrEnum):
    """How tokens get to their experts. Where nothing is dropped, all compute the same.

    Attributes:
      DENSE: every expert runs every token; E / k times the work, in the fewest products.
      SORTED: tokens in order of their experts, block by block, each block of one expert. Drops
        nothing, holds nothing of size E times N, reads the experts that were chosen only. (But
        XLA on CPU copies bfloat16 weights to float32 beforehand, those of all experts.)
      RAGGED: all tokens in one product over groups of uneven size. Made for TPUs; elsewhere XLA
        spells it out to [E, N * k, D].
      GATHER: SORTED in blocks of one, for the few tokens of a decoding step.
      CAPACITY: each expert has a buffer of one size; the tokens that find it full are dropped.
    """

    DENSE = "dense"
    SORTED = "sorted"
    RAGGED = "ragged"
    GATHER = "gather"
    CAPACITY = "capacity"


def mix_experts(
    x: jax.Array,
    routing: Routing,
    experts: Mapping[str, Leaf],
    method: Dispatch,
    capacity: int | None = None,
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, each `down(silu(gate(x)) * up(x))`.

    An expert's output is multiplied with its weight in x's dtype, as the reference does; the sum
    over experts is taken in float32, where the reference adds in x's dtype.

    Args:
      x: [..., D].
      routing: of the same tokens.
      experts: `gate_proj` and `up_proj` [E, F, D], `down_proj` [E, D, F].
      method: how.
      capacity: the size that `limit_capacity` cut `routing` to, for `Dispatch.CAPACITY`.

    Returns:
      [..., D], in x's dtype.

    Raises:
      ValueError: a capacity without the method that takes it, or the method without it.
    """
    if (capacity is not None) != (method is Dispatch.CAPACITY):
        raise ValueError(f"capacity = {capacity} with dispatch {method.value!r}")
    return mix_chosen(x, routing.experts, routing.weights, experts, method, capacity)


def mix_chosen(
    x, chosen, weights, experts, method: Dispatch, capacity: int | None, shards: int = 1
) -> jax.Array:
    """`mix_experts` of what a routing says: the experts and their weights, each [..., k].

    Where these are the experts of one of several `shards`, the choices are those of all, E for
    another shard's.
    """
    E = num_experts(experts)
    tokens = jnp.asarray(x).reshape(-1, x.shape[-1])
    chosen, weights = (a.reshape(len(tokens), -1) for a in (chosen, weights))
    match method:
        case Dispatch.SORTED | Dispatch.GATHER:
            size = 1 if method is Dispatch.GATHER else block_size(chosen.size // shards, E)
            out = run_blocks(tokens, weights, dict(experts), chosen, size)
        case Dispatch.DENSE:
            out = _run_all(tokens, chosen, weights, _as_dense(experts, x.dtype), E)
        case Dispatch.RAGGED:
            out = _run_ragged(tokens, chosen, weights, _as_dense(experts, x.dtype), E)
        case Dispatch.CAPACITY:
            out = _run_buffers(tokens, chosen, weights, _as_dense(experts, x.dtype), E, capacity)
    return out.astype(x.dtype).reshape(x.shape)


def _as_dense(experts: Mapping[str, Leaf], dtype: jnp.dtype) -> dict[str, Leaf]:
    """Every leaf with arrays to multiply with, for products that run all experts at once."""
    return {name: as_dense(leaf, dtype) for name, leaf in experts.items()}


def weigh_outputs(outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """float32 sum over the k outputs [N, k, D] of each token."""
    return jnp.sum((outputs * weights[..., None]).astype(jnp.float32), axis=1)


def _run_all(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: dict[str, Leaf], E: int
) -> jax.Array:
    # A copy of the tokens for each expert keeps E a batch axis of the products; without, XLA on
    # CPU first makes transposed copies of the weights.
    copies = jnp.broadcast_to(x, (E, *x.shape))
    outputs = jax.vmap(feed_forward, out_axes=1)(copies, experts)
    # A token's k experts differ, so the sum only puts each weight in its place.
    combine = jnp.sum(jax.nn.one_hot(chosen, E, dtype=x.dtype) * weights[..., None], axis=1)
    return weigh_outputs(outputs, combine)


def _run_ragged(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: dict[str, Leaf], E: int
) -> jax.Array:
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = count_choices(flat, E)

    def multiply(rows: jax.Array, weight: jax.Array) -> jax.Array:
        # On TPUs it is a kernel.
        with kernel_precision(rows.dtype):
            return jax.lax.ragged_dot(rows, jnp.swapaxes(weight, 1, 2), sizes)

    def project(rows: jax.Array, leaf: Leaf) -> jax.Array:
        if not isinstance(leaf, LowRankWeight):
            return multiply(rows, leaf)
        update = multiply(multiply(rows.astype(leaf.a.dtype), leaf.a), leaf.b)
        scale = leaf.scale.at[flat[order]].get(mode="clip")
        return add_update(multiply(rows, leaf.base), update, scale[:, None])

    rows = x[order // chosen.shape[1]]
    hidden = nn.silu(project(rows, experts["gate_proj"])) * project(rows, experts["up_proj"])
    outputs = project(hidden, experts["down_proj"])
    # Rows beyond the last group belong to no expert.
    outputs = jnp.where((flat[order] < E)[:, None], outputs, 0)
    back = jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True)
    return weigh_outputs(back.reshape(*chosen.shape, -1), weights)


def _run_buffers(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    experts: dict[str, Leaf],
    E: int,
    capacity: int,
) -> jax.Array:
    places = places_of(chosen, E)
    tokens = jnp.broadcast_to(jnp.arange(len(x))[:, None], chosen.shape)
    buffers = jnp.zeros((E, capacity, x.shape[-1]), x.dtype)
    buffers = buffers.at[chosen, places].set(x[tokens], mode="drop")
    outputs = jax.vmap(feed_forward)(buffers, experts)
    return weigh_outputs(outputs.at[chosen, places].get(mode="fill", fill_value=0), weights)


def choose_dispatch(
    num_tokens: int, spec: MoeSpec, platform: str, packed: bool = False
) -> Dispatch:
    """The fastest method that drops nothing and fits in memory at any size.

    On a CPU SORTED, whose blocks there are as small as GATHER's. Elsewhere GATHER while there are
    no more choices than experts, so that few experts are read twice; then SORTED, and on a TPU
    RAGGED from where an expert fills the largest of its blocks. XLA copies all experts into the
    layout of RAGGED's kernel, which is less than to read them for many blocks, and more than to
    read them for one. `benchmark.dispatch` measured the first two on CPU; the choice for
    accelerators is one of bytes, not of time.

    Args:
      num_tokens: N, padding included.
      spec: of the layer.
      platform: as `jax.default_backend()` names it.
      packed: whether the experts are, of which RAGGED would unpack all at once.
    """
    if platform != "cpu" and num_tokens * spec.num_experts_per_tok <= spec.num_experts:
        return Dispatch.GATHER
    fills_blocks = num_tokens * spec.num_experts_per_tok >= LARGEST_BLOCK * spec.num_experts
    return Dispatch.RAGGED if platform == "tpu" and fills_blocks and not packed else Dispatch.SORTED
