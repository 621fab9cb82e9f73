"""The router of a mixture of experts: which tokens go to which experts, and with what weight.

Here N is the number of tokens, E of experts, k of experts a token goes to.
"""

import dataclasses
import enum
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.config import MoeSpec
from qwen_jax.errors import UserError
from qwen_jax.nn.assignment import balanced_assignment, expert_choice, sinkhorn
from qwen_jax.nn.expert_blocks import count_choices
from qwen_jax.nn.linear import linear

_SINKHORN_ITERATIONS = 8


class Assignment(enum.StrEnum):
    """How tokens and experts come together. All but the first look at several tokens at once, later
    ones of a text among them, so that they are for training alone.

    Attributes:
      TOP_K: each token takes its k likeliest experts.
      EXPERT_CHOICE: each expert takes its likeliest tokens, as many as its even share (arXiv
        2202.09368). Whether a token is taken depends on those behind it: what a causal model must
        not know leaks into it.
      SINKHORN: each token takes the k largest of its scores, once these are scaled so that all
        experts have as much of all tokens (arXiv 2202.01169).
      BASE: every expert gets its even share exactly, the scores' sum as large as can be (arXiv
        2103.16716, for any k).
    """

    TOP_K = "top_k"
    EXPERT_CHOICE = "expert_choice"
    SINKHORN = "sinkhorn"
    BASE = "base"


@dataclasses.dataclass(frozen=True)
class RouterOptions:
    """What training does to a router beyond what the model's config says; by default nothing.

    Attributes:
      assignment: how tokens and experts come together.
      rows: of tokens that an assignment looks at together; None for all of a call. Not of TOP_K.
      noise: standard deviation of what is added to the logits, normal, of a pass that is given
        random numbers under the name "router" (arXiv 1701.06538, with a fixed deviation).
      capacity_factor: an expert takes so many times its even share of a call's tokens, and those
        that find it full are dropped; None for no bound.

    Raises:
      UserError: a value that none of these can have.
    """

    assignment: Assignment = Assignment.TOP_K
    rows: int | None = None
    noise: float = 0.0
    capacity_factor: float | None = None

    def __post_init__(self):
        if self.assignment not in list(Assignment):
            raise UserError(
                f"assignment = {self.assignment} is not supported; known: {', '.join(Assignment)}"
            )
        if not 0 <= self.noise < math.inf:
            raise UserError(f"noise = {self.noise} must be finite, at least 0")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise UserError(f"capacity_factor = {self.capacity_factor} must be above 0")
        if self.rows is not None:
            if self.rows < 1:
                raise UserError(f"rows = {self.rows} must be at least 1")
            if self.assignment == Assignment.TOP_K:
                raise UserError(f"rows = {self.rows}: with top_k every token chooses by itself")
        if self.assignment == Assignment.EXPERT_CHOICE and self.capacity_factor is not None:
            raise UserError(
                "capacity_factor: with expert_choice an expert takes its share, no more"
            )


@flax.struct.dataclass
class Routing:
    """Where the router sends tokens. Under `jit`, fields that nobody reads cost nothing.

    Attributes:
      logits: [..., E], in the activations' dtype.
      experts: int32 [..., k], those that win first; E where there is none, as where the token was
        dropped. Where experts choose, [..., E].
      weights: of the same shape, in the logits' dtype, what the experts' outputs are multiplied
        with; 0 where there is none.
      counts: int32 [E], real tokens that chose each expert, the dropped ones included.
      dropped: int32 [], how many choices of real tokens found no place.
      wanted: as `experts`, the dropped ones included; None where that is the same.
    """

    logits: jax.Array
    experts: jax.Array
    weights: jax.Array
    counts: jax.Array
    dropped: jax.Array
    wanted: jax.Array | None = None


def route(
    x: jax.Array,
    weight: jax.Array,
    spec: MoeSpec,
    real: jax.Array | None = None,
    bias: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> Routing:
    """The k likeliest experts of each token.

    The softmax is over all experts and in float32; the chosen probabilities are then divided by
    their sum, or with `spec.renormalise` unset left as they are.

    Args:
      x: [..., D].
      weight: [E, D].
      spec: how many experts, and what their weights are.
      real: bool [...], False for padding, which is routed but not counted; None for all real.
      bias: [E], added to the probabilities that are compared, and not to those that weigh (arXiv
        2408.15664); None for none.
      noise: [..., E], added to the logits; None for none.
    """
    logits = router_logits(x, weight, noise)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    if bias is None:
        weights, experts = jax.lax.top_k(probabilities, spec.num_experts_per_tok)
    else:
        scores = jax.lax.stop_gradient(probabilities + bias.astype(jnp.float32))
        experts = jax.lax.top_k(scores, spec.num_experts_per_tok)[1]
        weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    if spec.renormalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return _routing(logits, experts.astype(jnp.int32), weights, spec, real)


def router_logits(x: jax.Array, weight: Any, noise: jax.Array | None = None) -> jax.Array:
    """[..., D] -> [..., E], with the noise."""
    logits = linear(x, weight)
    return logits if noise is None else logits + noise.astype(logits.dtype)


def assign(
    logits: jax.Array, spec: MoeSpec, options: RouterOptions, real: jax.Array | None = None
) -> Routing:
    """The routing of an assignment that looks at several tokens at once.

    Weights are the router's own probabilities, whatever the scores that were compared.

    Args:
      logits: [B, T, E].
      spec: how many experts, and what their weights are.
      options: `assignment`, which is not TOP_K, and `rows`.
      real: bool [B, T], False for padding, which gets no expert; None for all real.

    Raises:
      UserError: rows that do not divide by `options.rows`.
    """
    (B, T, E), k = logits.shape, spec.num_experts_per_tok
    rows = B if options.rows is None else options.rows
    if B % rows:
        raise UserError(f"router.rows = {rows} do not divide the batch's {B} rows")

    def groups(a: jax.Array) -> jax.Array:
        return a.reshape(B // rows, rows * T, *a.shape[2:])

    real = jnp.ones((B, T), bool) if real is None else real
    scores = jax.lax.stop_gradient(logits.astype(jnp.float32))
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    experts = jax.vmap(lambda scores, real: _assigned(scores, real, k, options.assignment))(
        groups(scores), groups(real)
    ).reshape(B, T, -1)
    weights = jnp.take_along_axis(probabilities, jnp.minimum(experts, E - 1), axis=-1)
    weights = jnp.where(experts < E, weights, 0)
    if spec.renormalise:
        # A token that no expert took has none to divide by.
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
    return _routing(logits, experts, weights, spec, real)


def _assigned(scores: jax.Array, real: jax.Array, k: int, assignment: Assignment) -> jax.Array:
    """int32 [N, k], or [N, E] where experts choose, E for none: of one group's scores [N, E]."""
    E = scores.shape[-1]
    match Assignment(assignment):
        case Assignment.BASE:
            return balanced_assignment(scores, k, real)
        case Assignment.SINKHORN:
            scaled = sinkhorn(scores, _SINKHORN_ITERATIONS, real)
            experts = jax.lax.top_k(scaled, k)[1].astype(jnp.int32)
            return jnp.where(real[:, None], experts, E)
        case Assignment.EXPERT_CHOICE:
            shares = jax.nn.softmax(scores, axis=-1)
            # Of real tokens: what a mesh adds to rows and columns makes no places.
            capacity = jnp.maximum(jnp.sum(real, dtype=jnp.int32) * k // E, 1)
            taken = expert_choice(shares, capacity, real)
            return jnp.where(taken, jnp.arange(E, dtype=jnp.int32), E)
    raise ValueError(f"{assignment} looks at one token at a time")


def _routing(logits, experts, weights, spec: MoeSpec, real) -> Routing:
    counted = experts if real is None else jnp.where(real[..., None], experts, spec.num_experts)
    return Routing(
        logits=logits,
        experts=experts,
        weights=weights.astype(logits.dtype),
        counts=count_choices(counted, spec.num_experts),
        dropped=jnp.zeros((), jnp.int32),
    )


def capacity_of(num_tokens: int, spec: MoeSpec, capacity_factor: float) -> int:
    """Tokens that an expert takes: `capacity_factor` times its even share, rounded up."""
    return math.ceil(capacity_factor * num_tokens * spec.num_experts_per_tok / spec.num_experts)


def limit_capacity(
    routing: Routing,
    capacity: int,
    real: jax.Array | None = None,
    places: jax.Array | None = None,
) -> Routing:
    """`routing` without the choices that find their expert full.

    Tokens are served in their order, whatever the rank of the choice, so that no token loses its
    place to a later one of the same text. Padding is dropped too, takes no place and is not
    counted. A dropped choice adds nothing: the token passes by the residual.

    Args:
      routing: of tokens [...].
      capacity: places of each expert.
      real: bool [...], False for padding; None for all real.
      places: int32 [B, T], of tokens [B, T] their order in each row; None for the array's.
    """
    E = routing.logits.shape[-1]
    wanted = routing.experts
    if real is not None:
        wanted = jnp.where(real[..., None], wanted, E)
    if places is None:
        before = places_of(wanted, E)
    else:
        order = jnp.argsort(places, axis=1)[..., None]
        before = places_of(jnp.take_along_axis(wanted, order, axis=1), E)
        before = jnp.take_along_axis(before, jnp.argsort(order, axis=1), axis=1)
    kept = (before < capacity) & (wanted < E)
    return routing.replace(
        experts=jnp.where(kept, wanted, E),
        weights=jnp.where(kept, routing.weights, 0),
        dropped=jnp.sum((wanted < E) & ~kept, dtype=jnp.int32),
        wanted=wanted,
    )


def places_of(experts: jax.Array, E: int) -> jax.Array:
    """How many choices before this one, in the order of the array, are of the same expert."""
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = count_choices(flat, E)
    first = (jnp.cumsum(sizes) - sizes)[flat[order]]
    places = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size, dtype=jnp.int32) - first)
    return places.reshape(experts.shape)
