"""Where the tokens of a call stand, for every layer alike: in rows of one length, or in parts."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.nn.rope import Rotation
from qwen_jax.sharding.axes import Layout


@flax.struct.dataclass
class DualChunk:
    """Where the tokens of a call stand in Dual Chunk Attention.

    Attributes:
      successive, inter: rotations of queries for keys of the chunk before and of older chunks; the
        call's own rotation is for keys, and for queries of the same chunk.
      query_chunks, key_chunks: int32 [B, T] and [B, S].
      scale: float32 [B], of the call's keys and of its scores.
    """

    successive: Rotation
    inter: Rotation
    query_chunks: jax.Array
    key_chunks: jax.Array
    scale: jax.Array


@flax.struct.dataclass
class Far:
    """Where the tokens of a call stand for keys beyond a window, as `nn.far` has it.

    Attributes:
      queries: rotation of queries for those keys.
      turn: of keys [B, S], from their own positions on; None for nothing.
      key_groups: int32 [B, S], 0 for keys that are seen there; None for all.
      window: which keys are beyond it.
    """

    queries: Rotation
    turn: Rotation | None
    key_groups: jax.Array | None
    window: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Tokens:
    """Where the tokens of a call stand, the same for every layer.

    Attributes:
      slots: int32 [B, T], each token's place in the row's key order; a key at slot s is seen by
        queries at slot s and later. With a cache, padding has a slot past its end.
      real: bool [B, T], tokens that are not padding; None when all are real.
      key_valid: bool [B, S], keys that are real tokens; None when slots alone decide.
      segments: int32 [B, T], the text of several in a row that each token belongs to; None for one.
      places: int32 [B, T], where in the call's arguments each token stood, if not here; places
        past their end are padding that only the mesh needs. Tokens see each other by slots, so
        that their order here is free.
      rotation: of the call's tokens.
      query_scale: float32 [B, T], what queries are multiplied by; None for nothing.
      dual_chunk: in models with Dual Chunk Attention.
      far: in models that see distant keys in another way.
      num_tokens: of the caller's, padding included; None for all here.
      layout: where the tokens lie on a mesh; None without one.
    """

    slots: jax.Array
    real: jax.Array | None
    key_valid: jax.Array | None
    rotation: Rotation
    query_scale: jax.Array | None = None
    segments: jax.Array | None = None
    places: jax.Array | None = None
    dual_chunk: DualChunk | None = None
    far: Far | None = None
    num_tokens: int | None = flax.struct.field(pytree_node=False, default=None)
    layout: Layout | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class Part:
    """Some of a call's tokens: rows of one length, and the rows of the cache that they follow.

    Attributes:
      tokens: [b, t] of them, not on a mesh.
      rows: int32 [b], distinct rows of the cache, or any past its end for those that have none;
        None where the tokens are of all rows, in order.
    """

    tokens: Tokens
    rows: jax.Array | None = None

    @property
    def size(self) -> int:
        """b * t."""
        return self.tokens.slots.size

    def of_cache(self, cache: Any) -> Any:
        """The part's rows of a cache; for those past its end, its last."""
        if self.rows is None:
            return cache
        return jax.tree.map(lambda a: jnp.take(a, self.rows, axis=0, mode="clip"), cache)

    def put_back(self, cache: Any, rows: Any) -> Any:
        """`cache` with the part's rows as they are in `rows`."""
        if self.rows is None:
            return rows
        return jax.tree.map(lambda a, b: a.at[self.rows].set(b, mode="drop"), cache, rows)


@flax.struct.dataclass
class Parts:
    """Where the tokens of a call stand whose rows have several lengths.

    The layers have them as one row [1, N, ...], part after part, so that weights are read once and
    no row is filled up to the length of another. Only what looks from token to token takes the
    parts one by one: `over_parts`.
    """

    parts: tuple[Part, ...]

    layout = places = num_tokens = None

    @property
    def real(self) -> jax.Array | None:
        """bool [1, N], tokens that are not padding; None when all are real."""
        masks = [part.tokens.real for part in self.parts]
        if all(mask is None for mask in masks):
            return None
        whole = [
            jnp.ones(part.tokens.slots.shape, bool) if mask is None else mask
            for part, mask in zip(self.parts, masks, strict=True)
        ]
        return jnp.concatenate([mask.reshape(1, -1) for mask in whole], axis=1)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """[1, N, ...] as [b, t, ...] of each part."""
        found, start = [], 0
        for part in self.parts:
            own = x[0, start : start + part.size]
            found.append(own.reshape(*part.tokens.slots.shape, *x.shape[2:]))
            start += part.size
        return found


def over_parts(
    mix: Callable[..., tuple[jax.Array, Any]],
    arrays: tuple[jax.Array, ...],
    tokens: Tokens | Parts,
    cache: Any,
) -> tuple[jax.Array, Any]:
    """`mix(*arrays, tokens, cache)`, or what it makes of each of several parts.

    Args:
      mix: of arrays [b, t, ...], `Tokens` and their rows of the cache, an array [b, t, ...] and
        those rows with the tokens in them.
      arrays: [B, T, ...], or of parts [1, N, ...].
      tokens: where they stand.
      cache: of a layer; None without one, which parts do not have.
    """
    if isinstance(tokens, Tokens):
        return mix(*arrays, tokens, cache)
    outs = []
    for part, own in zip(tokens.parts, zip(*map(tokens.split, arrays), strict=True), strict=True):
        out, rows = mix(*own, part.tokens, part.of_cache(cache))
        cache = part.put_back(cache, rows)
        outs.append(out.reshape(1, part.size, *out.shape[2:]))
    return jnp.concatenate(outs, axis=1), cache
