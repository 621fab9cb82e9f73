"""The train step: loss, gradients and optax's update, as one compiled function.

Parameters are float32 masters in the tree that `load_pretrained` returns. Each step makes a copy of
them in the dtype that is computed with, the layers stacked for a scan if so wished, and
differentiates through it. Parameters that are frozen, beside adapters for one, stay in the dtype
that they came in, or packed, and have neither gradients nor a place in the optimiser.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.config import HeadKind
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.models.placement import arrange
from qwen_jax.nn.low_rank import LowRankWeight, cast, merged
from qwen_jax.sharding.axes import parameter_shardings
from qwen_jax.training.balancing import Pooling, balance_loss, router_z_loss
from qwen_jax.training.layers import (
    Params,
    Remat,
    run_layers,
    scan_layers,
    stack_layers,
    stacked_shardings,
)
from qwen_jax.training.loss import cross_entropy
from qwen_jax.training.partition import Trained, combine, partition

Metrics = dict[str, jax.Array]


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
      segment_ids: int [B, T], which of several texts in the row a token belongs to; it sees that
        text only, and its last token predicts nothing.
    """

    input_ids: jax.Array
    targets: jax.Array | None = None
    loss_weights: jax.Array | None = None
    attention_mask: jax.Array | None = None
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None


@flax.struct.dataclass
class TrainState:
    """What a step takes and returns.

    Attributes:
      step: int32 [], how many updates were made.
      params: float32, the tree of the model; with frozen ones, None in their places.
      opt_state: of the optax optimiser.
      frozen: the parameters that are not trained, in any dtype or packed, None in the places of
        the others; None if all are trained. Steps hand on the same arrays.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    frozen: Any = None


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How a step computes; clipping, schedules and decay are the optimiser's.

    Attributes:
      dtype: of the parameters' copy and the activations.
      scan: whether layers of a kind are compiled once and scanned over their stacked weights, or
        compiled one by one, which spares the copy and, on CPU, time.
      remat: what is kept for the backward pass, as `training.layers.run_layers` has it.
      z_loss: coefficient of the softmax's squared log denominator, mean over tokens.
      balance_loss: coefficient of the experts' balancing loss; None for the config's.
      balance_pooling: as `training.balancing.balance_loss` has it.
      router_z_loss: coefficient of the routers' squared log denominator.
      block_size: tokens of a device whose logits it holds at once.

    Raises:
      UserError: a value that none of these can have.
    """

    dtype: str = "bfloat16"
    scan: bool = True
    remat: Remat = "full"
    z_loss: float = 0.0
    balance_loss: float | None = None
    balance_pooling: Pooling = "layer"
    router_z_loss: float = 0.0
    block_size: int = 1024

    def __post_init__(self):
        known = {
            "dtype": ("float32", "bfloat16"),
            "remat": get_args(Remat),
            "balance_pooling": get_args(Pooling),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"{name} = {getattr(self, name)} is not supported; known: {', '.join(values)}"
                )
        for name in ("z_loss", "balance_loss", "router_z_loss"):
            if not (getattr(self, name) or 0.0) >= 0:
                raise UserError(f"{name} = {getattr(self, name)} must not be negative")
        if self.block_size < 1:
            raise UserError(f"block_size = {self.block_size} must be at least 1")


def init_train_state(
    model: Decoder,
    optimiser: optax.GradientTransformation,
    *,
    key: jax.Array | None = None,
    params: Params | None = None,
    trained: Trained | None = None,
) -> TrainState:
    """The state before the first step, laid out on the model's mesh from the start.

    Args:
      model: what is trained.
      optimiser: of `make_train_step`.
      key: to draw parameters from; the numbers do not depend on the mesh.
      params: to begin with instead, of any float dtype. Those that are trained are copied, so that
        a step's donation leaves them alone; those that are frozen are shared, and never donated.
      trained: of a parameter's slash-separated path, whether it is trained; None for all.

    Raises:
      UserError: packed parameters, which have no gradients, are to be trained, or none is.
      ValueError: both a key and parameters, or neither.
    """
    if (key is None) == (params is None):
        raise ValueError("give a key to draw parameters from, or parameters")
    frozen = None
    if trained is not None:
        if params is None:
            raise ValueError("give parameters, to freeze some of them")
        params, frozen = partition(params, trained)
        if not jax.tree.leaves(params):
            raise UserError("no parameter is trained; add adapters, or train all")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"parameter {name} is {leaf.dtype}, which has no gradient; load the checkpoint "
                "with dense weights"
            )

    def start(params: Params) -> TrainState:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimiser.init(params))

    def draw(key: jax.Array) -> TrainState:
        ids = jnp.zeros((1, 1), jnp.int32)
        return start(Decoder(model.config).init(key, ids)["params"])

    shardings = None
    if model.mesh is not None:
        shapes = parameter_shapes(model.config) if params is None else _shapes(params)
        state = _abstract_state(model, optimiser, shapes, _shapes(frozen))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        frozen = jax.device_put(frozen, shardings.frozen)
        shardings = shardings.replace(frozen=None)
    make, source = (start, params) if key is None else (draw, key)
    return jax.jit(make, out_shardings=shardings)(source).replace(frozen=frozen)


def abstract_train_state(
    model: Decoder,
    optimiser: optax.GradientTransformation,
    params: Params | None = None,
    trained: Trained | None = None,
) -> TrainState:
    """The state as a tree of `jax.ShapeDtypeStruct`, with shardings if the model has a mesh.

    Args:
      model, optimiser, trained: as for `init_train_state`.
      params: or their shapes, where they are not what the config makes: with adapters, or packed.
    """
    shapes = parameter_shapes(model.config) if params is None else _shapes(params)
    parts = (shapes, None) if trained is None else partition(shapes, trained)
    return _abstract_state(model, optimiser, *parts)


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def _abstract_state(
    model: Decoder, optimiser: optax.GradientTransformation, params: Any, frozen: Any = None
) -> TrainState:
    params = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(jnp.float32)), params)
    opt_state = jax.eval_shape(optimiser.init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    if model.mesh is None:
        return state.replace(frozen=frozen)

    # An optimiser keeps trees like the parameters' within its state: what is at the end of a
    # parameter's path and of its shape lies where the parameter does. The rest is small.
    places = {
        path: (leaf.shape, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(_placed(model, params))
    }
    everywhere = NamedSharding(model.mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        ends = (path[start:] for start in range(len(path)))
        shape, sharding = next((places[end] for end in ends if end in places), (None, None))
        return leaf.update(sharding=sharding if leaf.shape == shape else everywhere)

    state = jax.tree_util.tree_map_with_path(place, state)
    return state.replace(frozen=_placed(model, frozen))


def _placed(model: Decoder, shapes: Any) -> Any:
    """Shapes of parameters with where they lie on the model's mesh."""
    return jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        shapes,
        parameter_shardings(model.config, model.mesh, shapes),
    )


def train_shardings(model: Decoder, optimiser: optax.GradientTransformation) -> TrainState | None:
    """Where each leaf of the state lies on the model's mesh; None without one."""
    if model.mesh is None:
        return None
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_train_state(model, optimiser))


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A compiled function that makes one update; see `make_train_step`.

    It takes over the memory of the state that it is given, but for the frozen parameters, which are
    read only: whoever else holds them keeps them, and nothing copies them.
    """

    compiled: Callable[..., tuple[TrainState, Metrics]]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The state after an update, and the metrics of the batch before it."""
        after, metrics = self.compiled(state.replace(frozen=None), state.frozen, batch)
        return after.replace(frozen=state.frozen), metrics

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """As `jax.jit`'s, for arrays or their shapes."""
        return self.compiled.trace(state.replace(frozen=None), state.frozen, batch)


def make_train_step(
    model: Decoder,
    optimiser: optax.GradientTransformation,
    options: TrainOptions = TrainOptions(),
    state: TrainState | None = None,
) -> TrainStep:
    """The train step of a model.

    The metrics are those of `objective`, and "grad_norm", of the gradients before the optimiser
    clips them.

    Args:
      model: what is trained.
      optimiser: of the state.
      options: how a step computes.
      state: or its shapes, where some parameters are frozen and the model has a mesh: the step
        lays out what it returns as that is.

    Raises:
      UserError: the model's head does not predict tokens.
    """
    if model.config.head is not HeadKind.VOCABULARY:
        raise UserError(
            f"the model has a {model.config.head.value} head, which predicts no tokens; train a "
            "language model"
        )
    shardings = None
    if model.mesh is not None:
        state = abstract_train_state(model, optimiser) if state is None else state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss(params: Params) -> tuple[jax.Array, Metrics]:
            return objective(model, combine(params, frozen), batch, options)

        gradients, metrics = jax.grad(loss, has_aux=True)(state.params)
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, shardings.params)
        with jax.named_scope("update"):
            metrics["grad_norm"] = optax.tree.norm(gradients)
            updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    if shardings is None:
        return TrainStep(jax.jit(step, donate_argnums=0))
    everywhere = NamedSharding(model.mesh, PartitionSpec())
    moving = shardings.replace(frozen=None)
    compiled = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(moving, shardings.frozen, None),
        out_shardings=(moving, everywhere),
    )
    return TrainStep(compiled)


def objective(
    model: Decoder, params: Params, batch: Batch, options: TrainOptions
) -> tuple[jax.Array, Metrics]:
    """What training makes small: float32 [], to be differentiated by `params`.

    Means are over the whole batch, whatever device has it: over the loss weights for the
    vocabulary's terms, over real tokens for the routers'.

    Returns:
      The objective, and the metrics "loss" (the mean cross entropy in nats), "tokens" (the sum of
      loss weights) and "z_loss"; with experts "balance_loss", "router_z_loss" and "expert_counts",
      int32 [sparse layers, E]. Losses are before their coefficients.
    """
    config = model.config
    with jax.named_scope("cast"):
        params = cast(params, options.dtype)
        if options.scan:
            params = stack_layers(config, params)
            if model.mesh is not None:
                places = stacked_shardings(config, model.mesh, params)
                params = jax.lax.with_sharding_constraint(params, places)
    x, tokens = model.apply(
        {"params": params},
        batch.input_ids,
        batch.attention_mask,
        batch.positions,
        batch.segment_ids,
        method="begin",
    )
    run = scan_layers if options.scan else run_layers
    x, router = run(model, params, x, tokens, options.remat)
    x = model.apply({"params": params}, x, method="finish")
    targets, weights = _targets(batch)
    head = params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"]
    with jax.named_scope("loss"):
        if isinstance(head, LowRankWeight):
            head = merged(head, head.dtype)
        total, sums = cross_entropy(
            x,
            head,
            arrange(tokens, targets),
            arrange(tokens, weights),
            z_loss=options.z_loss,
            block_size=options.block_size,
            layout=tokens.layout,
        )
    count = weights.sum()
    # A batch with nothing to learn has loss 0 and no gradients.
    share = jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
    loss = total * share
    metrics = {
        "loss": sums["cross_entropy"] * share,
        "tokens": count,
        "z_loss": sums["log_z_squared"] * share,
    }
    if router is not None:
        balance = balance_loss(router, options.balance_pooling)
        squares = router_z_loss(router)
        coefficient = options.balance_loss
        if coefficient is None:
            coefficient = config.moe.aux_loss_coef
        loss += coefficient * balance + options.router_z_loss * squares
        metrics |= {
            "balance_loss": balance,
            "router_z_loss": squares,
            "expert_counts": router.counts,
        }
    return loss, metrics


def _targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What each token is to predict, and the float32 weight of that."""
    ids, targets, weights = batch.input_ids, batch.targets, batch.loss_weights
    weights = jnp.ones(ids.shape) if weights is None else weights.astype(jnp.float32)
    real = jnp.ones(ids.shape, bool)
    if batch.attention_mask is not None:
        real = batch.attention_mask.astype(bool)
    if targets is None:
        targets, weights = _shift(ids), _shift(weights)
        weights *= _shift(real)
        if batch.segment_ids is not None:
            weights *= _shift(batch.segment_ids) == batch.segment_ids
    return targets, weights * real


def _shift(a: jax.Array) -> jax.Array:
    """What stands one place further on in each row; 0 behind its end."""
    return jnp.pad(a[:, 1:], ((0, 0), (0, 1)))
