"""Context parallelism: attention where each device has a part of every text.

Everything here runs inside `jax.shard_map` over a mesh axis of c shards. A text is cut into 2c
chunks and shard i holds chunks i and 2c - 1 - i, so that early queries, which see few keys, share
a shard with late ones, and all shards have the same work. A cache is cut into c runs of slots.

Keys and values travel round the ring of shards (arXiv 2310.01889), and what each shard makes of
those that visit merges by the log-sum-exp, so that no shard ever holds a whole text, in the
backward pass neither; or they are gathered in one go, where they are few.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.nn.attend import Branch, Mask, merge, scale_of
from qwen_jax.nn.cache import write_slots
from qwen_jax.nn.far import turned
from qwen_jax.nn.int8_vectors import Vectors
from qwen_jax.nn.kernels.choose import PLAIN, Kernels
from qwen_jax.nn.rope import Rotation, rotate

Branches = tuple[Branch, ...]
_WHOLE = (Branch(),)

# Bytes of a text's keys and values that a device gathers, in place of passing them round: as much
# as the temporaries of a layer may well be, and one collective in place of one for each shard.
_MOST_GATHERED = 1 << 26

# Attributes of a mask that belong to keys, and travel with them.
_OF_KEYS = ("key_valid", "key_groups", "key_slots", "key_segments")


def zigzag(length: int, shards: int) -> np.ndarray:
    """The order in which a text lies on the shards: `x[:, zigzag(T, c)]`, cut into c parts.

    Returns:
      int32 [length], at each place of the new order the place in the text.

    Raises:
      ValueError: `length` is not a multiple of 2 * `shards`.
    """
    if length % (2 * shards):
        raise ValueError(f"length = {length}: give a multiple of {2 * shards}, twice the shards")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(-1)


def unzigzag(length: int, shards: int) -> np.ndarray:
    """The inverse of `zigzag`: `y[:, unzigzag(T, c)]` is in the order of the text."""
    return np.argsort(zigzag(length, shards)).astype(np.int32)


def context_attend(
    queries: tuple[jax.Array, ...],
    k: Vectors,
    v: Vectors,
    mask: Mask,
    scale: jax.Array | float | None = None,
    *,
    axis_name: str,
    method: Literal["ring", "gather"] | None = None,
    branches: Branches = _WHOLE,
    turn: Rotation | None = None,
    zigzag_keys: bool = True,
    kernels: Kernels = PLAIN,
) -> jax.Array:
    """`attend` for queries and keys that are shared out over a mesh axis, here those of one shard.

    Args:
      queries: one array [B, T, H, d], or one for each of `branches`.
      k, v: [B, S, K, d]; in any order, to be told by the mask. But the kernels of TPUs take slots
        to follow each other, in each half of the keys where `zigzag_keys`.
      mask: of the shard's queries and keys, `key_slots` among them, `relation` None.
      scale: of the shard's queries, as for `attend`.
      axis_name: the mesh axis.
      method: "ring" needs memory for the keys of two shards; "gather" for all of them. None for
        "gather" where those are few.
      branches: of one softmax, which keys each of `queries` is for: all, those of
        `dual_chunk.BRANCHES` with chunks for groups, or of `far.branches`.
      turn: of keys beyond a window, [B, S, r/2], as `far_attend` has it; without gradient.
      zigzag_keys: whether keys lie as `zigzag` has them.
      kernels: what computes the parts.

    Returns:
      [B, T, H, d] in the queries' dtype.

    Raises:
      ValueError: an unknown method, or a mask without `key_slots`.
    """
    if method not in ("ring", "gather", None):
        raise ValueError(f"method = {method!r}: give 'ring' or 'gather'")
    if mask.key_slots is None:
        raise ValueError("mask: give key_slots, since a shard's first key is not at slot 0")
    scale = scale_of(queries[0], scale)
    # Both ways, the keys that a kernel is given follow each other.
    kernels = dataclasses.replace(kernels, in_order=False, keys_in_order=True)
    if method is None:
        gathered = (k.nbytes + v.nbytes) * jax.lax.axis_size(axis_name)
        method = "gather" if gathered <= _MOST_GATHERED else "ring"
    if method == "ring":
        # In zigzag order a shard has two runs of slots.
        runs = 2 if zigzag_keys and kernels.platform == "tpu" else 1
        how = _Ring(axis_name, branches, runs, kernels)
        return _ring_attend(how, queries, k, v, mask, scale, turn)[0]

    def gather(x: jax.Array) -> jax.Array:
        x = jax.lax.all_gather(x, axis_name, axis=1, tiled=True)
        if not zigzag_keys:
            return x
        return x[:, unzigzag(x.shape[1], jax.lax.axis_size(axis_name))]

    k, v, keys, turn = jax.tree.map(gather, (k, v, _keys_of(mask), turn))
    parts = _parts(kernels, branches, queries, k, v, mask.replace(**keys), scale, turn)
    return _merge(parts)[0].astype(queries[0].dtype)


def cache_attend(
    queries: tuple[jax.Array, ...],
    k: Vectors,
    v: Vectors,
    mask: Mask,
    scale: jax.Array | float | None = None,
    *,
    axis_name: str,
    branches: Branches = _WHOLE,
    turn: Rotation | None = None,
) -> jax.Array:
    """`attend` for few queries, the same on all shards, over keys whose slots are shared out.

    Each shard attends to its own keys; only queries' results cross the mesh. It has no gradient.
    For many queries share them out too, and call `context_attend` with `zigzag_keys=False`.

    Args:
      queries, branches, turn, scale: as for `context_attend`, but of all queries.
      k, v: [B, S / c, K, d], slots i * S / c and following on shard i.
      mask: `key_slots` None; other attributes of keys are the shard's own.
      axis_name: the mesh axis.

    Returns:
      [B, T, H, d] in the queries' dtype, the same on all shards.
    """
    slots = first_slot(k, axis_name) + jnp.arange(k.shape[1], dtype=jnp.int32)
    mask = mask.replace(key_slots=jnp.broadcast_to(slots, k.shape[:2]))
    scale = scale_of(queries[0], scale)
    out, lse = _merge(_parts(PLAIN, branches, queries, k, v, mask, scale, turn, jnp.float32))
    weight = jnp.exp(lse - jax.lax.pmax(lse, axis_name))
    out = jax.lax.psum(weight[..., None] * out, axis_name)
    return (out / jax.lax.psum(weight, axis_name)[..., None]).astype(queries[0].dtype)


def first_slot(buffer: Vectors, axis_name: str) -> jax.Array:
    """The slot of the first of a shard's part `buffer` [B, S / c, ...] of a cache; int32."""
    return jax.lax.axis_index(axis_name) * buffer.shape[1]


def write_own_slots(
    buffer: jax.Array, slots: jax.Array, new: jax.Array, *, axis_name: str
) -> jax.Array:
    """`write_slots` into a cache whose slots are shared out, of tokens that all shards have.

    Args:
      buffer: [B, S / c, ...], slots i * S / c and following on shard i.
      slots: int32 [B, T], counted over the whole cache.
      new: [B, T, ...].
      axis_name: the mesh axis.
    """
    size = buffer.shape[1]
    here = slots - first_slot(buffer, axis_name)
    # A place past the end is dropped; one below 0 would count from the end.
    return write_slots(buffer, jnp.where(here < 0, size, here), new)


def write_travelling_slots(
    buffer: jax.Array, slots: jax.Array, new: jax.Array, *, axis_name: str
) -> jax.Array:
    """`write_own_slots` of tokens that are shared out too: they travel round the ring.

    Args:
      buffer: [B, S / c, ...], slots i * S / c and following on shard i.
      slots: int32 [B, T], those of the shard's tokens, counted over the whole cache.
      new: [B, T, ...], the shard's.
      axis_name: the mesh axis.
    """

    def write(buffer: jax.Array, visiting: tuple[jax.Array, jax.Array]) -> jax.Array:
        return write_own_slots(buffer, *visiting, axis_name=axis_name)

    return _travel(write, buffer, (slots, new), axis_name)


def _travel(step: Callable[[Any, Any], Any], state: Any, visiting: Any, axis_name: str) -> Any:
    """`state` after `step(state, visiting)` with what each shard has of `visiting`, in turn."""

    def body(carry, _):
        state, visiting = carry
        # Neither needs the other, so that the next visitor is under way during the work.
        return (step(state, visiting), _pass_on(visiting, axis_name)), None

    rest = jax.lax.axis_size(axis_name) - 1
    (state, visiting), _ = jax.lax.scan(body, (state, visiting), length=rest)
    return step(state, visiting)


def _pass_on(tree: Any, axis_name: str) -> Any:
    """Arrays of the shard before."""
    shards = jax.lax.axis_size(axis_name)
    ring = [(i, (i + 1) % shards) for i in range(shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, ring), tree)


def _keys_of(mask: Mask) -> dict[str, jax.Array | None]:
    return {name: getattr(mask, name) for name in _OF_KEYS}


def _parts(
    kernels: Kernels,
    branches: Branches,
    queries,
    k,
    v,
    mask: Mask,
    scale,
    turn: Rotation | None,
    dtype=None,
    by="auto",
):
    """What attention returns for each of `queries`."""
    return [
        kernels.attend(q, _keys_for(branch, k, turn), v, branch.mask(mask), scale, by, dtype)
        for q, branch in zip(queries, branches, strict=True)
    ]


def _keys_for(branch: Branch, k: Vectors, turn: Rotation | None) -> Vectors:
    return turned(k, turn) if branch.beyond else k


def _merge(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    return parts[0] if len(parts) == 1 else merge(*zip(*parts, strict=True))


class _Ring(NamedTuple):
    """How the ring works: its mesh axis, and `runs` of keys of each shard one after another."""

    axis_name: str
    branches: Branches
    runs: int
    kernels: Kernels


def _runs(how: _Ring, visiting: Any) -> list[Any]:
    """Arrays of keys [B, S, ...] in as many parts."""
    size = visiting[0].shape[1] // how.runs
    return [
        jax.tree.map(lambda x, i=i: x[:, i * size : (i + 1) * size], visiting)
        for i in range(how.runs)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attend(how: _Ring, queries, k, v, mask: Mask, scale, turn: Rotation | None):
    """Out and log-sum-exp of the shard's queries over the keys of all shards."""

    def step(so_far, visiting):
        parts = [so_far]
        for k, v, keys, turn in _runs(how, visiting):
            visited = mask.replace(**keys)
            # Block by block even where it is short, to pass over what no query sees.
            how_to = how.kernels, how.branches
            parts += _parts(*how_to, queries, k, v, visited, scale, turn, jnp.float32, "blockwise")
        return _merge(parts)

    shape = (*queries[0].shape[:3], v.shape[-1])
    nothing = jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], jnp.finfo(jnp.float32).min)
    out, lse = _travel(step, nothing, (k, v, _keys_of(mask), turn), how.axis_name)
    return out.astype(queries[0].dtype), lse


def _ring_forward(how: _Ring, queries, k, v, mask, scale, turn):
    results = _ring_attend(how, queries, k, v, mask, scale, turn)
    return results, (queries, k, v, mask, scale, turn, results)


def _ring_backward(how: _Ring, residuals, cotangents):
    """Gradients; those of keys and values follow them round the ring, a step behind."""
    queries, k, v, mask, scale, turn, results = residuals

    def step(so_far, visiting):
        of_queries, of_keys = so_far
        of_keys = _pass_on(of_keys, how.axis_name)
        of_runs = []
        for k, v, keys, turn in _runs(how, visiting):
            d_queries, d_keys = [], []
            for q, branch in zip(queries, how.branches, strict=True):
                own, visited = _keys_for(branch, k, turn), branch.mask(mask.replace(**keys))
                d_q, d_scale, d_k, d_v = how.kernels.gradients_of_part(
                    q, own, v, visited, scale, results, cotangents
                )
                if branch.beyond and turn is not None:
                    # The transpose of a rotation turns back.
                    d_k = rotate(d_k, turn.replace(sin=-turn.sin))
                d_queries.append((d_q, d_scale))
                d_keys.append((d_k, d_v))
            of_queries = jax.tree.map(jnp.add, of_queries, d_queries)
            of_runs.append(jax.tree.map(lambda *x: sum(x), *d_keys))
        d_visiting = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *of_runs)
        return of_queries, jax.tree.map(jnp.add, of_keys, d_visiting)

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, jnp.float32)

    nothing = [(zeros(q), zeros(scale)) for q in queries], (zeros(k), zeros(v))
    of_queries, of_keys = _travel(step, nothing, (k, v, _keys_of(mask), turn), how.axis_name)
    # After as many steps as shards they are with the last to visit: one more and they are home.
    d_k, d_v = _pass_on(of_keys, how.axis_name)
    d_queries, d_scales = zip(*of_queries, strict=True)
    d_queries = tuple(d.astype(q.dtype) for d, q in zip(d_queries, queries, strict=True))
    return d_queries, d_k.astype(k.dtype), d_v.astype(v.dtype), None, sum(d_scales), None


_ring_attend.defvjp(_ring_forward, _ring_backward)
