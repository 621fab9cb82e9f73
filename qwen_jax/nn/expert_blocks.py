"""Experts that run block by block, each block some of one expert's choices.

A choice is a token together with one of its experts. In order of their experts, at most `size` of
one expert are a block: it reads that expert alone, runs its rows and adds what they give to its
tokens. So experts without tokens are not read, no choice is dropped, and nothing of size E times N
is held. The backward pass goes over the blocks once more.

Here N is the number of tokens, E of experts, k of experts a token goes to, F an expert's width.
"""

import bisect
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from qwen_jax.nn.linear import linear

# One projection of all experts: an array [E, out, in], or a pytree with E first in each array.
Leaf = Any

# Choices of one expert that run at once.
LARGEST_BLOCK = 128
# To copy an expert out of the whole is most of a small block's time on a CPU: there each expert has
# as few blocks as can be, and each block the rows that it needs.
_SIZES_ON_CPU = (1, 8, 16, 32, 64, LARGEST_BLOCK)


def num_experts(experts: Mapping[str, Leaf]) -> int:
    """E, of projections [E, out, in]."""
    return len(jax.tree.leaves(experts["gate_proj"])[0])


def feed_forward(x: jax.Array, expert: Mapping[str, Leaf]) -> jax.Array:
    """One expert, projections [out, in], on [..., D]."""
    hidden = nn.silu(linear(x, expert["gate_proj"])) * linear(x, expert["up_proj"])
    return linear(hidden, expert["down_proj"])


def count_choices(experts: jax.Array, E: int) -> jax.Array:
    """How often each of E experts occurs; int32, since bfloat16 and float32 stop counting."""
    return jnp.zeros(E, jnp.int32).at[experts.reshape(-1)].add(1, mode="drop")


def block_size(choices: int, E: int) -> int:
    """Twice an expert's even share, so that most experts fill one block; a power of two."""
    return min(max(1 << (2 * choices // E).bit_length(), 8), LARGEST_BLOCK)


@flax.struct.dataclass
class _Blocks:
    """Blocks of at most `size` choices of one expert, experts ascending.

    Attributes:
      order: int32 [N * k], the choices (token * k + slot) in order of their experts.
      expert, start, stop: int32 [most], each block's expert, and its choices in `order`.
      number: int32 [], how many blocks there are.
    """

    order: jax.Array
    expert: jax.Array
    start: jax.Array
    stop: jax.Array
    number: jax.Array


# Up to so many pairs of block and expert (32 KB), all are compared; more would take memory that
# grows with the experts times the tokens.
_MOST_COMPARED = 8192


def _plan_blocks(chosen: jax.Array, E: int, size: int) -> _Blocks:
    flat = chosen.reshape(-1)
    sizes = count_choices(flat, E)
    ends = jnp.cumsum(sizes)
    blocks = -(-sizes // size)
    block_ends = jnp.cumsum(blocks)
    # Every expert but those without tokens may leave one block that is not full.
    most = flat.size // size + min(E, flat.size)
    index = jnp.arange(most, dtype=jnp.int32)
    # Few are compared: on TPUs a gather is an operation, and memory, for each number that it takes.
    if most * E <= _MOST_COMPARED:
        expert = jnp.sum(block_ends <= index[:, None], axis=1, dtype=jnp.int32)
        of_expert = expert[:, None] == jnp.arange(E)
    else:
        expert = jnp.searchsorted(block_ends, index, side="right").astype(jnp.int32)
        of_expert = None

    def take(table: jax.Array) -> jax.Array:
        if of_expert is None:
            return table[expert]
        return jnp.sum(jnp.where(of_expert, table, 0), axis=1)

    start = take(ends - sizes) + (index - take(block_ends - blocks)) * size
    return _Blocks(
        order=jnp.argsort(flat, stable=True).astype(jnp.int32),
        expert=expert,
        start=start,
        stop=jnp.minimum(start + size, take(ends)),
        number=block_ends[-1],
    )


def _take_expert(experts: dict[str, Leaf], index: jax.Array) -> dict[str, Leaf]:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), experts)


def _rows(blocks: _Blocks, i: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The choices of block i, and which of them are within it."""
    at = blocks.start[i] + jnp.arange(size)
    return blocks.order.at[at].get(mode="clip"), at < blocks.stop[i]


def _run_block(x: jax.Array, weights: jax.Array, expert: dict[str, Leaf]) -> jax.Array:
    return feed_forward(x, expert) * weights[:, None]


def _send(valid: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """`index` where `valid`, elsewhere distinct places past the end of an array of `size`."""
    return jnp.where(valid, index, size + jnp.arange(len(index)))


# Differentiating the loop would keep, or sum, an array of all experts' weights for each block, so
# the backward pass is a loop of its own.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def run_blocks(
    x: jax.Array, weights: jax.Array, experts: dict[str, Leaf], chosen: jax.Array, size: int
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs.

    Args:
      x: [N, D].
      weights: [N, k], what the outputs are multiplied with.
      experts: `gate_proj` and `up_proj` [E, F, D], `down_proj` [E, D, F].
      chosen: int32 [N, k], experts that differ within a token; E for none.
      size: of a block; on a CPU, unless it is 1, that of the backward pass only.

    Returns:
      float32 [N, D].
    """
    if size == 1 or len(x) == 1:
        return _loop_over_blocks(x, weights, experts, chosen, (1,))
    # No expert has a token twice.
    sizes = _SIZES_ON_CPU[: bisect.bisect_left(_SIZES_ON_CPU, len(x)) + 1]
    of_any = functools.partial(_loop_over_blocks, sizes=sizes)
    alike = functools.partial(_loop_over_blocks, sizes=(size,))
    return jax.lax.platform_dependent(x, weights, experts, chosen, cpu=of_any, default=alike)


def _loop_over_blocks(
    x: jax.Array,
    weights: jax.Array,
    experts: dict[str, Leaf],
    chosen: jax.Array,
    sizes: tuple[int, ...],
) -> jax.Array:
    """`run_blocks` where each block runs at the least of ascending `sizes` that holds it."""
    k = weights.shape[1]
    blocks = _plan_blocks(chosen, num_experts(experts), sizes[-1])

    def body(size: int, i: jax.Array, out: jax.Array) -> jax.Array:
        choices, valid = _rows(blocks, i, size)
        tokens = choices // k
        expert = _take_expert(experts, blocks.expert[i])
        y = _run_block(x[tokens], weights.reshape(-1)[choices], expert)
        # A token meets an expert once, so the rows of a block are of different tokens.
        places = _send(valid, tokens, len(x))
        return out.at[places].add(y.astype(jnp.float32), mode="drop", unique_indices=True)

    out = jnp.zeros(x.shape, jnp.float32)
    if len(sizes) == 1:
        return jax.lax.fori_loop(0, blocks.number, functools.partial(body, sizes[0]), out)
    # Which of the sizes a block takes; those beyond the last block none.
    lengths = blocks.stop - blocks.start
    kind = jnp.sum(lengths[:, None] > jnp.asarray(sizes), axis=1, dtype=jnp.int32)
    kind = jnp.where(jnp.arange(len(kind)) < blocks.number, kind, len(sizes))
    order, ends = jnp.argsort(kind), jnp.cumsum(count_choices(kind, len(sizes)))
    for n, size in enumerate(sizes):
        start = ends[n - 1] if n else 0
        run = functools.partial(body, size)
        out = jax.lax.fori_loop(start, ends[n], lambda i, out, run=run: run(order[i], out), out)
    return out


@flax.struct.dataclass
class _Saved:
    """What the backward pass of `run_blocks` needs.

    Attributes:
      x, weights, experts, chosen: its arguments.
      learned: places among the leaves of `experts` of those whose gradient is asked for.
    """

    x: jax.Array
    weights: jax.Array
    experts: dict[str, Leaf]
    chosen: jax.Array
    learned: tuple[int, ...] = flax.struct.field(pytree_node=False)


def _run_blocks_forward(x, weights, experts, chosen, size):
    # The gradient of all experts is as large as they are: none for those that are frozen, beside
    # adapters, or packed.
    learned = tuple(i for i, leaf in enumerate(jax.tree.leaves(experts)) if leaf.perturbed)
    arguments = custom_vjp_primal_tree_values((x, weights, experts, chosen))
    return run_blocks(*arguments, size), _Saved(*arguments, learned)


def _run_blocks_backward(size, saved, cotangent):
    """Runs each block again and pulls its cotangent back.

    Blocks come in order of their experts, so the gradient of one expert is summed in float32 and
    written over its place in the whole; no other array has the size of all experts.
    """
    x, weights, learned = saved.x, saved.weights, saved.learned
    blocks = _plan_blocks(saved.chosen, num_experts(saved.experts), size)
    if isinstance(cotangent, SymbolicZero):
        cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
    k = weights.shape[1]
    leaves, structure = jax.tree.flatten(saved.experts)

    def body(i, carry):
        dx, dweights, dexpert, dlearned = carry
        choices, valid = _rows(blocks, i, size)
        tokens, index = choices // k, blocks.expert[i]
        expert = jax.tree.leaves(_take_expert(saved.experts, index))

        def run(x, weights, parts):
            changed = dict(zip(learned, parts, strict=True))
            all_parts = [changed.get(j, part) for j, part in enumerate(expert)]
            return _run_block(x, weights, structure.unflatten(all_parts))

        # Zeros in the rows of other experts, lest an overflow there meets the zero cotangent.
        rows = jnp.where(valid[:, None], x[tokens], 0)
        y, pull = jax.vjp(run, rows, weights.reshape(-1)[choices], [expert[j] for j in learned])
        dy = jnp.where(valid[:, None], cotangent[tokens], 0).astype(y.dtype)
        dx_rows, dweights_rows, parts = pull(dy)
        dx = dx.at[_send(valid, tokens, len(x))].add(
            dx_rows.astype(jnp.float32), mode="drop", unique_indices=True
        )
        dweights = dweights.at[_send(valid, choices, weights.size)].set(
            dweights_rows, mode="drop", unique_indices=True
        )
        same = (i > 0) & (blocks.expert[i - 1] == index)
        dexpert = [
            jnp.where(same, before, 0) + part.astype(jnp.float32)
            for before, part in zip(dexpert, parts, strict=True)
        ]
        dlearned = [
            jax.lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), index, 0)
            for whole, part in zip(dlearned, dexpert, strict=True)
        ]
        return dx, dweights, dexpert, dlearned

    start = (
        jnp.zeros(x.shape, jnp.float32),
        jnp.zeros(weights.size, weights.dtype),
        [jnp.zeros(leaves[j].shape[1:], jnp.float32) for j in learned],
        [jnp.zeros_like(leaves[j]) for j in learned],
    )
    dx, dweights, _, dlearned = jax.lax.fori_loop(0, blocks.number, body, start)
    gradients = dict(zip(learned, dlearned, strict=True))
    dexperts = structure.unflatten([gradients.get(j) for j in range(len(leaves))])
    return dx.astype(x.dtype), dweights.reshape(weights.shape), dexperts, None


run_blocks.defvjp(_run_blocks_forward, _run_blocks_backward, symbolic_zeros=True)
