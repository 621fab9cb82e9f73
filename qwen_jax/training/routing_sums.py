"""What routed tokens add up to: all that balancing and its figures need of a batch.

Sums of a batch's parts add up to the batch's, those of devices to all devices'. Tokens are counted
in groups, since what is even in a whole batch need not be even in a part of it: a group is a set of
rows, or of tokens, of which each token has the number of its own.
"""

from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.nn.router import Routing


@flax.struct.dataclass
class Grouping:
    """Which group each row or token is in.

    Attributes:
      ids: int32 [B] of rows, or [B, T] of tokens, below `count`; None for one group.
      count: how many groups there are, in the whole of a batch that is computed in parts.
    """

    ids: jax.Array | None = None
    count: int = flax.struct.field(pytree_node=False, default=1)


# The group that is always there: all tokens.
GLOBAL = "global"
ALL_TOKENS = {GLOBAL: Grouping()}


@flax.struct.dataclass
class GroupSums:
    """Of each of G groups; of several layers, with a leading axis.

    Attributes:
      counts: int32 [..., G, E], choices of each expert.
      firsts: the same of first choices alone.
      probabilities: float32 [..., G, E], of the router's softmax.
      tokens: int32 [..., G], how many; padding is nowhere counted.
    """

    counts: jax.Array
    firsts: jax.Array
    probabilities: jax.Array
    tokens: jax.Array


@flax.struct.dataclass
class TokenSums:
    """Of what a router says of each token; float32 [...], natural logarithms.

    Attributes:
      entropy: of its softmax.
      top_probability: the largest of it.
      margin: by how much the last chosen expert's probability is above the best one's that is not
        chosen; below 0 where another score than the probability chose.
      logit_variance: of the logits, over experts.
      log_z: the logarithm of the softmax's denominator.
      together: int32 [..., E, E], tokens that chose both experts; on the diagonal, the one.
    """

    entropy: jax.Array
    top_probability: jax.Array
    margin: jax.Array
    logit_variance: jax.Array
    log_z: jax.Array
    together: jax.Array


@flax.struct.dataclass
class RouterSums:
    """Of one layer's router; of several layers, with a leading axis each.

    Attributes:
      groups: by the grouping's name; all tokens are "global".
      log_z_squared: float32 [...], of the squared logarithm of the softmax's denominator.
      each: of every token; None where nobody asked.
    """

    groups: dict[str, GroupSums]
    log_z_squared: jax.Array
    each: TokenSums | None = None

    @property
    def counts(self) -> jax.Array:
        """int32 [..., E], tokens that chose each expert."""
        return self.groups[GLOBAL].counts[..., 0, :]

    @property
    def tokens(self) -> jax.Array:
        """int32 [...], how many."""
        return self.groups[GLOBAL].tokens[..., 0]


def sum_routing(
    routing: Routing,
    real: jax.Array | None = None,
    groupings: Mapping[str, Grouping] = ALL_TOKENS,
    each: bool = False,
) -> RouterSums:
    """The sums of one layer. What a router chose counts, whether or not there was room.

    Args:
      routing: of tokens [B, T].
      real: bool [B, T]; None for all.
      groupings: that tokens are counted in, `ALL_TOKENS` among them.
      each: whether those of every token are wanted.
    """
    logits = routing.logits.astype(jnp.float32)
    E = logits.shape[-1]
    real = jnp.ones(logits.shape[:-1], bool) if real is None else real
    probabilities = jax.nn.softmax(logits, axis=-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    experts = jnp.arange(E, dtype=jnp.int32)
    wanted = routing.experts if routing.wanted is None else routing.wanted
    # Padding has no choice; its probabilities are taken out by the sums.
    first = (wanted[..., :1] == experts) & real[..., None]
    chosen = jnp.any(wanted[..., None] == experts, axis=-2) & real[..., None]
    values = (chosen, first, jnp.where(real[..., None], probabilities, 0), real[..., None])
    dtypes = (jnp.int32, jnp.int32, jnp.float32, jnp.int32)

    def of_groups(grouping: Grouping) -> GroupSums:
        *sums, tokens = (
            _by_group(value, grouping, dtype) for value, dtype in zip(values, dtypes, strict=True)
        )
        return GroupSums(*sums, tokens[:, 0])

    return RouterSums(
        groups={name: of_groups(grouping) for name, grouping in groupings.items()},
        log_z_squared=jnp.sum(log_z**2, where=real),
        each=_of_tokens(logits, probabilities, log_z, chosen, real) if each else None,
    )


def _by_group(values: jax.Array, grouping: Grouping, dtype: jnp.dtype) -> jax.Array:
    """[G, ...] of values [B, T, ...]."""
    if grouping.ids is None:
        return values.sum(axis=(0, 1), dtype=dtype)[None]
    if grouping.ids.ndim == 1:
        values = values.sum(axis=1, dtype=dtype)
    else:
        values = values.reshape(-1, values.shape[-1]).astype(dtype)
    return jax.ops.segment_sum(values, grouping.ids.reshape(-1), grouping.count)


def _of_tokens(
    logits: jax.Array,
    probabilities: jax.Array,
    log_z: jax.Array,
    chosen: jax.Array,
    real: jax.Array,
) -> TokenSums:
    logits, probabilities, log_z = jax.lax.stop_gradient((logits, probabilities, log_z))
    # Experts lead, so that the sums over them are of vectors of tokens.
    by_expert, likely, taken = (jnp.moveaxis(a, -1, 0) for a in (logits, probabilities, chosen))
    apart = by_expert - by_expert.mean(axis=0)
    # One pass over the experts for all of them: as reductions of their own they would take twice
    # the time.
    mean_logit, squares, least, best = jax.lax.reduce(
        (
            likely * by_expert,
            apart**2,
            jnp.where(taken, likely, jnp.inf),
            jnp.where(taken, -jnp.inf, likely),
        ),
        (np.float32(0), np.float32(0), np.float32(np.inf), np.float32(-np.inf)),
        _add_add_min_max,
        (0,),
    )
    # Of a token without a choice, or with all experts, there is no such thing.
    margin = jnp.where(jnp.isfinite(least - best), least - best, 0)
    figures = jnp.stack(
        (
            log_z - mean_logit,
            jnp.exp(logits.max(axis=-1) - log_z),
            margin,
            squares / logits.shape[-1],
            log_z,
        )
    )
    # 0 or 1, so that the products are exact up to 2**24 tokens.
    ones = chosen.reshape(-1, chosen.shape[-1]).astype(jnp.float32)
    return TokenSums(
        *jnp.sum(figures, axis=(1, 2), where=real),
        together=jnp.einsum("ne,nf->ef", ones, ones).astype(jnp.int32),
    )


def _add_add_min_max(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return a[0] + b[0], a[1] + b[1], jnp.minimum(a[2], b[2]), jnp.maximum(a[3], b[3])
