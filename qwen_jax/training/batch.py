"""What a step learns from: tokens in rows, and what each of them is to predict."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.training.routing_sums import Grouping


@flax.struct.dataclass
class Batch:
    """Tokens to learn from.

    Attributes:
      input_ids: int [B, T].
      targets: int [B, T], what each token is to predict; None for the token after it.
      loss_weights: float [B, T], of the targets; where those are None of the input ids, each as
        what is predicted. None for 1.
      attention_mask: [B, T], 1 for real tokens; padding is neither predicted nor learned from.
      positions: int [B, T]; None for 0..T-1.
      groups: by name, which rows or tokens the routers' losses and figures count together; those of
        `training.forward.with_groups`. None for all together.
      domains: int32 [B], the domain of each row, for figures; None for none.
      segment_ids: int [B, T], which of several texts in the row a token belongs to; it sees that
        text only, and its last token predicts nothing.
    """

    input_ids: jax.Array
    targets: jax.Array | None = None
    loss_weights: jax.Array | None = None
    attention_mask: jax.Array | None = None
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    groups: dict[str, Grouping] | None = None
    domains: jax.Array | None = None


def in_parts(batch: Any, count: int) -> Any:
    """A batch's rows as `count` parts along a leading axis, of any arrays [B, ...].

    Every `count`-th row goes to a part, so that a device's rows stay its own.

    Raises:
      UserError: the parts would not be of one size.
    """
    check_parts(len(jax.tree.leaves(batch)[0]), count)
    return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), batch)


def check_parts(rows: int, count: int) -> None:
    """Checks that so many rows divide into as many parts.

    Raises:
      UserError: they do not.
    """
    if rows % count:
        raise UserError(f"microbatches = {count} do not divide the batch's {rows} rows")


def targets_of(batch: Batch, count: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """What each token is to predict, [B, T], next and further on, and the float32 weights."""
    ids, targets, weights = batch.input_ids, batch.targets, batch.loss_weights
    weights = jnp.ones(ids.shape) if weights is None else weights.astype(jnp.float32)
    if targets is None:
        targets, weights = shift(ids), shift(weights) * follows(batch)
    else:
        weights *= real_tokens(batch)
    found = [(targets, weights)]
    while len(found) < count:
        targets, weights = shift(targets), shift(weights) * follows(batch)
        found.append((targets, weights))
    return [targets for targets, _ in found], [weights for _, weights in found]


def follows(batch: Batch) -> jax.Array:
    """bool [B, T], whether a token of the same text stands behind each real one."""
    real = real_tokens(batch)
    found = real & shift(real)
    if batch.segment_ids is not None:
        found &= shift(batch.segment_ids) == batch.segment_ids
    return found


def real_tokens(batch: Batch) -> jax.Array:
    """bool [B, T], False at padding."""
    if batch.attention_mask is None:
        return jnp.ones(batch.input_ids.shape, bool)
    return batch.attention_mask.astype(bool)


def key_of(batch: Batch) -> jax.Array:
    """A key that comes of the batch's token ids: other tokens, other random numbers, no state."""
    ids = batch.input_ids.astype(jnp.uint32)
    # Odd factors, so that the order of tokens counts and none is lost.
    factors = 2 * jnp.arange(ids.size, dtype=jnp.uint32).reshape(ids.shape) + 1
    mixed = (ids + 1) * factors * jnp.uint32(2654435761)
    return jax.random.key(jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32))


def shift(a: jax.Array) -> jax.Array:
    """What stands one place further on in each row; 0 behind its end."""
    return jnp.pad(a[:, 1:], ((0, 0), (0, 1)))
