"""Three ways to give a whole group of tokens to experts, rather than one token after the other.

Here N is the number of tokens in the group, M of those that are not padding, E of experts, k of
experts a token goes to. None is causal: a token's experts depend on the tokens after it.
"""

import jax
import jax.numpy as jnp
from jax import lax

# A score that no path of real ones reaches; three of it still fit in an int32.
_NONE = 2**29
# Whole numbers below 2**24 pass through float32 unharmed; two bits are left for its arithmetic.
_LEVELS = 2**22
# Of the prices that `balanced_assignment` begins with. They decide about its time only.
_TEMPERATURE, _ITERATIONS = 0.1, 10


def expert_choice(
    scores: jax.Array, capacity: int | jax.Array, real: jax.Array | None = None
) -> jax.Array:
    """Each expert takes the tokens that score highest with it (arXiv 2202.09368).

    Experts are full as long as there are tokens; a token has any number of experts, none
    included. Of equal scores the earlier token's wins.

    Args:
      scores: float32 [N, E], finite.
      capacity: tokens that each expert takes; all where there are no more.
      real: bool [N], False for padding, which is never taken; None for all real.

    Returns:
      bool [N, E], whether the token is the expert's.
    """
    N, E = scores.shape
    real = _all_real(N) if real is None else real
    wanted = jnp.where(real, lax.stop_gradient(scores).T, -jnp.inf)
    _, tokens = lax.top_k(wanted, N)
    places = jnp.arange(N) < capacity
    taken = jnp.zeros((E, N), bool).at[jnp.arange(E)[:, None], tokens].set(places)
    return taken.T & real[:, None]


def sinkhorn(logits: jax.Array, iterations: int, real: jax.Array | None = None) -> jax.Array:
    """exp(logits), its rows and columns scaled until tokens and experts all have their share.

    A token goes to the k largest of its row, with a weight from the raw logits (S-BASE of
    arXiv 2202.01169), for which reason no gradient passes.

    Each iteration scales the rows, then the columns; the rows once more are last. So rows sum to
    1 to rounding, however few the iterations: each is a distribution over experts, and as scaling
    a row does not reorder it, the choice is that of columns scaled last. Columns only approach
    M / E. With Δ the largest of |x_ne + x_mf - x_nf - x_me| over the logits x, an iteration
    multiplies the difference of the largest and the smallest logarithm of a column sum by
    tanh(Δ / 4)² at most (Franklin and Lorenz 1989): fast for flat logits, slow for peaked ones.

    Args:
      logits: float32 [N, E], finite.
      iterations: how often; 0 is a softmax.
      real: bool [N], False for padding; None for all real.

    Returns:
      float32 [N, E], 0 in the rows of padding.
    """
    real = _all_real(len(logits)) if real is None else real
    logits = jnp.where(real[:, None], lax.stop_gradient(logits), 0)
    scaled = logits + _column_scales(logits, iterations, real)
    return jnp.where(real[:, None], jax.nn.softmax(scaled, axis=1), 0)


def balanced_assignment(scores: jax.Array, k: int, real: jax.Array | None = None) -> jax.Array:
    """The k experts of each token that score highest in all while every expert is equally used.

    For k = 1 the linear assignment of BASE layers (arXiv 2103.16716). For more it is one problem
    over all choices, rather than an assignment after the other without the experts of the former:
    where E does not divide M these can end in tokens that want more places than are left to them.
    Here each expert gets k M / E choices, rounded up or down. That is always possible: k / E of
    every expert for every token is a solution in fractions, so there is one in whole numbers.

    Scores are rounded to whole numbers; for these the result is exactly the best. So its total
    is within 2 k M r of the best total, with r = 2⁻²² (from 64 experts on 2⁻²⁸ (E + 1)) of the
    widest spread of a token's scores.

    The method is that of successive shortest paths. Tokens begin with their best experts at
    prices that `sinkhorn` finds; then, for each choice that finds its expert full, a chain of
    tokens moves to the next expert each, at the least loss, ending where there is room. A step
    takes O(N E² + E³), one after the other, and there are k M at most: few tens for 128 tokens
    with scores that differ, near k M where many tokens are the same. Under `vmap` all groups wait
    for the slowest.

    Args:
      scores: float32 [N, E]. -inf counts as below the token's best by the widest spread in the
        group; a token with NaN or inf has no preferences.
      k: experts of a token, at most E.
      real: bool [N], False for padding, which takes no place; None for all real.

    Returns:
      int32 [N, k], all different, the highest score first; E in the rows of padding.

    Raises:
      ValueError: a k that is not in 1 to E.
    """
    N, E = scores.shape
    if not 1 <= k <= E:
        raise ValueError(f"k = {k} of {E} experts")
    real = _all_real(N) if real is None else real
    levels = _to_levels(lax.stop_gradient(scores), real)
    count = k * jnp.sum(real, dtype=jnp.int32)
    share = (count + E - 1) // E
    # Where E does not divide the choices, one more token, to which all experts are the same, takes
    # the places too many: of each expert at most one.
    take = jnp.append(jnp.where(real, k, 0), share * E - count)
    gains = jnp.pad(jnp.round(levels).astype(jnp.int32), ((0, 1), (0, 0)))
    order = jnp.argsort(gains - _start_prices(levels, real), axis=1, descending=True)
    chosen = jnp.argsort(order, axis=1) < take[:, None]
    chosen = _settle(gains, chosen, share)[:N]
    _, experts = lax.top_k(jnp.where(chosen, levels, -jnp.inf), k)
    return jnp.where(real[:, None], experts, E).astype(jnp.int32)


def _all_real(N: int) -> jax.Array:
    return jnp.ones(N, bool)


def _column_scales(logits: jax.Array, iterations: int, real: jax.Array) -> jax.Array:
    """[E], logarithms of what Sinkhorn's iterations multiply the columns with, up to a constant."""
    # Not minus infinity, which without any real token would become NaN.
    mask = jnp.where(real, 0, -1e30)[:, None]

    def step(_, columns: jax.Array) -> jax.Array:
        rows = jax.nn.logsumexp(logits + columns, axis=1, keepdims=True)
        columns = -jax.nn.logsumexp(logits - rows + mask, axis=0)
        return columns - jnp.max(columns)

    return lax.fori_loop(0, iterations, step, jnp.zeros(logits.shape[1], logits.dtype))


def _to_levels(scores: jax.Array, real: jax.Array) -> jax.Array:
    """float32 [N, E]: 0 for a token's best expert, down to minus the number of levels."""
    losses = jnp.max(scores, axis=1, keepdims=True) - scores
    usable = jnp.isfinite(losses) & real[:, None]
    losses = jnp.where(usable, losses, 0)
    spread = jnp.max(losses)
    highest = min(_LEVELS, _NONE // (2 * scores.shape[1] + 2))
    levels = losses * (highest / jnp.where(spread > 0, spread, 1))
    return -jnp.where(usable | ~real[:, None], levels, highest)


def _start_prices(levels: jax.Array, real: jax.Array) -> jax.Array:
    """int32 [E], near to the prices at which every expert is wanted equally."""
    deviation = jnp.std(levels, where=real[:, None] | ~jnp.any(real))
    temperature = jnp.maximum(_TEMPERATURE * deviation, 1)
    prices = -temperature * _column_scales(levels / temperature, _ITERATIONS, real)
    return jnp.round(jnp.minimum(prices, 4 * _LEVELS)).astype(jnp.int32)


def _settle(gains: jax.Array, chosen: jax.Array, share: jax.Array) -> jax.Array:
    """The best of all choices where each expert has `share` tokens and each token as many experts.

    Args:
      gains: int32 [N, E].
      chosen: bool [N, E], the best choices at any prices of experts.
      share: int32 [].
    """
    E = gains.shape[1]

    def shift_one(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chosen, loads = state
        leaving = jnp.where(chosen, gains, _NONE)
        joining = jnp.where(chosen, _NONE, -gains)
        moves = jnp.min(leaving[:, :, None] + joining[:, None, :], axis=0)
        losses, origins = _shortest_paths(moves, loads > share)
        last = jnp.argmin(jnp.where(loads < share, losses, 2 * _NONE))
        first, joined = _trace(origins, last)
        tokens = jnp.argmin(leaving[:, origins] + joining, axis=0)
        chosen = chosen.at[tokens, jnp.where(joined, origins, E)].set(False, mode="drop")
        chosen = chosen.at[tokens, jnp.where(joined, jnp.arange(E), E)].set(True, mode="drop")
        return chosen, loads.at[first].add(-1).at[last].add(1)

    def is_crowded(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(state[1] > share)

    loads = jnp.sum(chosen, axis=0, dtype=jnp.int32)
    return lax.while_loop(is_crowded, shift_one, (chosen, loads))[0]


def _shortest_paths(lengths: jax.Array, sources: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[E] distances from the nearest source (Bellman-Ford), and int32 [E] the node before.

    Args:
      lengths: int32 [E, E], from row to column, without negative cycles.
      sources: bool [E]. Where a path begins, the node before is the node itself.
    """

    def relax(state):
        distances, before, _ = state
        through = distances[:, None] + lengths
        nearest = jnp.min(through, axis=0)
        # Only what is strictly shorter, so that cycles of length 0 do not close.
        shorter = nearest < distances
        before = jnp.where(shorter, jnp.argmin(through, axis=0).astype(jnp.int32), before)
        return jnp.where(shorter, nearest, distances), before, jnp.any(shorter)

    nodes = jnp.arange(len(lengths), dtype=jnp.int32)
    start = jnp.where(sources, 0, _NONE), nodes, jnp.array(True)
    return lax.while_loop(lambda state: state[2], relax, start)[:2]


def _trace(before: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first node of the path to `last`, and bool [E] the path's other nodes."""

    def step_back(state):
        node, passed = state
        return before[node], passed.at[node].set(True)

    start = last, jnp.zeros(len(before), bool)
    return lax.while_loop(lambda state: before[state[0]] != state[0], step_back, start)
