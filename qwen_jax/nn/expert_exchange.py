"""Tokens sent to the devices of their experts and back, each row to one device, none dropped.

Everything here runs inside `jax.shard_map` over mesh axes of s devices, each with E / s experts
and n tokens of its own, of which each goes to k experts. `ragged_all_to_all` sends parts of uneven
sizes; XLA has it on TPUs only.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.nn.expert_blocks import Leaf, count_choices, num_experts
from qwen_jax.nn.moe import Dispatch, mix_chosen, weigh_outputs

# Of an array to send, one to receive into, and the parts; see `jax.lax.ragged_all_to_all`.
Collective = Callable[..., jax.Array]


class _Parts(NamedTuple):
    """Which rows go where: int32 [s] each, a number for each of the other devices.

    Attributes:
      starts, sizes: of the parts that are sent, in the sender's rows.
      landings: where each begins in its receiver's rows.
      received: sizes of the parts that come in.
    """

    starts: jax.Array
    sizes: jax.Array
    landings: jax.Array
    received: jax.Array


def pays_to_exchange(num_devices: int, num_experts_per_tok: int) -> bool:
    """Whether sending each token to its experts moves less than sending all to all devices.

    A device sends n k (s - 1) / s rows there and back, where gathering all tokens and summing what
    the devices make of them takes n (s - 1) each way.
    """
    return num_experts_per_tok < num_devices


def exchange_and_mix(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    experts: Mapping[str, Leaf],
    axis_name: tuple[str, ...],
    method: Dispatch,
    collective: Collective = jax.lax.ragged_all_to_all,
) -> jax.Array:
    """`nn.moe.mix_chosen` where each device has some of the experts and some of the tokens.

    Args:
      x: [..., D], this device's tokens.
      chosen: int32 [..., k], of all experts; E where a choice was dropped.
      weights: [..., k].
      experts: this device's, as `mix_experts` takes them.
      axis_name: mesh axes of the devices that share the experts out.
      method: how a device runs its experts.
      collective: `ragged_all_to_all` or one of its semantics.

    Returns:
      [..., D] in x's dtype; the device's part of the sum over an expert's width where that is cut.
    """
    tokens = x.reshape(-1, x.shape[-1])
    (n, k), shards = (len(tokens), chosen.shape[-1]), jax.lax.axis_size(axis_name)
    own = num_experts(experts)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    # [device that sends, device that runs, its expert]
    counts = jax.lax.all_gather(count_choices(flat, shards * own), axis_name)
    counts = counts.reshape(shards, shards, own)
    there, back = _plan(counts.sum(axis=-1), jax.lax.axis_index(axis_name))

    # A token has no expert twice, so this is what can come at most, and nothing is dropped.
    room = shards * n * min(k, own)
    rows = _send(collective, axis_name, room, tokens[order // k], there, back)
    arrived = jax.lax.dynamic_index_in_dim(
        counts, jax.lax.axis_index(axis_name), axis=1, keepdims=False
    )
    # By sender and then by expert; past the last there is nothing, and no expert.
    ends = jnp.cumsum(arrived.reshape(-1))
    place = jnp.searchsorted(ends, jnp.arange(room), side="right").astype(jnp.int32)
    expert = jnp.where(place < shards * own, place % own, own)
    ones = jnp.ones((room, 1), x.dtype)
    outputs = mix_chosen(rows, expert[:, None], ones, experts, method, None)

    outputs = _send(collective, axis_name, n * k, outputs, back, there)
    outputs = jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True)
    y = weigh_outputs(outputs.reshape(n, k, -1), weights.reshape(n, k))
    return y.astype(x.dtype).reshape(x.shape)


def _plan(sizes: jax.Array, me: jax.Array) -> tuple[_Parts, _Parts]:
    """The parts to send and, the other way, to return, from rows [sender, receiver]."""
    # Both ways a device's rows lie in the order of the devices that they go to or come from.
    starts = jnp.cumsum(sizes, axis=1) - sizes
    landings = jnp.cumsum(sizes, axis=0) - sizes
    there = _Parts(starts[me], sizes[me], landings[me], sizes[:, me])
    back = _Parts(landings[:, me], sizes[:, me], starts[:, me], sizes[me])
    return there, back


# The gradient of rows that were sent is sent back, the same parts the other way.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _send(
    collective: Collective,
    axis_name: tuple[str, ...],
    room: int,
    rows: jax.Array,
    parts: _Parts,
    reverse: _Parts,
) -> jax.Array:
    """[room, D], what comes in of all devices' `rows`, zeros behind it."""
    empty = jnp.zeros((room, rows.shape[-1]), rows.dtype)
    return collective(rows, empty, *parts, axis_name=axis_name)


def _send_forward(collective, axis_name, room, rows, parts, reverse):
    return _send(collective, axis_name, room, rows, parts, reverse), (len(rows), parts, reverse)


def _send_backward(collective, axis_name, room, residuals: Any, cotangent: jax.Array):
    sent, parts, reverse = residuals
    return _send(collective, axis_name, sent, cotangent, reverse, parts), None, None


_send.defvjp(_send_forward, _send_backward)
