"""The train step: loss, gradients and optax's update, as one compiled function.

Parameters are float32 masters in the tree that `load_pretrained` returns, or, for steps that scan
their layers, with these stacked for good: what is compiled for each array outside the scan would
grow with the layers otherwise. Each step makes a copy of them in the dtype that is computed with,
and differentiates through it. Parameters that are frozen, beside adapters for one, stay as they
came, in any dtype or packed, and have neither gradients nor a place in the optimiser; a step that
scans stacks them for itself.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.config import HeadKind
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.nn.router import RouterOptions
from qwen_jax.training.batch import in_parts
from qwen_jax.training.forward import with_groups
from qwen_jax.training.objective import NEXT_TOKEN, Metrics, Objective, check_no_token_losses
from qwen_jax.training.partition import Trained, combine, partition
from qwen_jax.training.router_figures import of_batch, over_batches
from qwen_jax.training.score_bias import is_score_bias, move, take_apart
from qwen_jax.training.stacking import (
    Params,
    is_stacked,
    shardings_of,
    stack_layers,
    unstack_layers,
)
from qwen_jax.training.step_options import TrainOptions

_DEFAULTS = TrainOptions()


class RouterLearnsNothing(UserWarning):
    """A router whose one chosen expert has weight 1, whatever the router says."""


@flax.struct.dataclass
class TrainState:
    """What a step takes and returns.

    Attributes:
      step: int32 [], how many updates were made.
      params: float32, the tree of the model, or of `stack_layers`; with frozen ones, None in their
        places.
      opt_state: of the optax optimiser.
      frozen: the parameters that are not trained, in any dtype or packed, None in the places of
        the others; None if all are trained. Never stacked; steps hand on the same arrays.
      moved: parameters that steps move without a gradient, None in the places of the others: the
        biases of routers' scores, in a model that has some.
      beside: what an objective reads besides, such as the parameters of another model, in any tree
        and dtype; None for nothing. Steps hand on the same arrays.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    frozen: Any = None
    moved: Any = None
    beside: Any = None

    def whole(self) -> Params:
        """All parameters in the tree of the model; what is stacked is copied."""
        return combine(unstack_layers(combine(self.params, self.moved)), self.frozen)

    def to_run(self) -> Params:
        """All parameters as evaluations take them, stacked where that spares a copy."""
        return combine(self.params, self.moved) if self.frozen is None else self.whole()


def init_train_state(
    model: Decoder,
    optimiser: optax.GradientTransformation,
    *,
    key: jax.Array | None = None,
    params: Params | None = None,
    trained: Trained | None = None,
    stacked: bool = False,
) -> TrainState:
    """The state before the first step, laid out on the model's mesh from the start.

    Args:
      model: what is trained.
      optimiser: of `make_train_step`.
      key: to draw parameters from; the numbers do not depend on the mesh.
      params: to begin with instead, of any float dtype. Those that are trained are copied, so that
        a step's donation leaves them alone; those that are frozen are shared, and never donated.
      trained: of a parameter's slash-separated path, whether it is trained; None for all.
      stacked: whether layers lie stacked, as is best for steps that scan them. A rule that goes by
        an array's axes, or looks at whole arrays, must then be one of `make_optimiser`.

    Raises:
      UserError: packed parameters, which have no gradients, are to be trained, or none is; or
        layers are to be stacked that differ.
      ValueError: both a key and parameters, or neither.
    """
    if (key is None) == (params is None):
        raise ValueError("give a key to draw parameters from, or parameters")
    if trained is not None and params is None:
        raise ValueError("give parameters, to freeze some of them")
    params, frozen = _thawed(params, trained)
    if trained is not None and not jax.tree.leaves(params):
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
        params = stack_layers(model.config, params) if stacked else params
        params, moved = take_apart(params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimiser.init(params), moved=moved)

    def draw(key: jax.Array) -> TrainState:
        ids = jnp.zeros((1, 1), jnp.int32)
        return start(Decoder(model.config).init(key, ids)["params"])

    shardings = None
    if model.mesh is not None:
        shapes = parameter_shapes(model.config) if params is None else _shapes(params)
        state = _abstract_state(model, optimiser, shapes, _shapes(frozen), stacked)
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
    stacked: bool = False,
) -> TrainState:
    """The state as a tree of `jax.ShapeDtypeStruct`, with shardings if the model has a mesh.

    Args:
      model, optimiser, trained, stacked: as for `init_train_state`.
      params: or their shapes, where they are not what the config makes: with adapters, or packed.
    """
    shapes = parameter_shapes(model.config) if params is None else _shapes(params)
    return _abstract_state(model, optimiser, *_thawed(shapes, trained), stacked)


def _thawed(params: Any, trained: Trained | None) -> tuple[Any, Any]:
    """What a step changes, and what is frozen; None for nothing."""
    if trained is None:
        return params, None
    return partition(params, lambda name: trained(name) or is_score_bias(name))


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def _abstract_state(
    model: Decoder,
    optimiser: optax.GradientTransformation,
    params: Any,
    frozen: Any,
    stacked: bool,
) -> TrainState:
    if stacked:
        params = jax.eval_shape(functools.partial(stack_layers, model.config), params)
    params = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(jnp.float32)), params)
    params, moved = take_apart(params)
    opt_state = jax.eval_shape(optimiser.init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, moved=moved)
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
    return state.replace(moved=_placed(model, moved), frozen=_placed(model, frozen))


def _placed(model: Decoder, shapes: Any) -> Any:
    """Shapes of parameters with where they lie on the model's mesh."""
    return jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        shapes,
        shardings_of(model.config, model.mesh, shapes),
    )


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A compiled function that makes one update; see `make_train_step`.

    It takes over the memory of the state that it is given, but for what is frozen or beside, which
    is read only: whoever else holds it keeps it, and nothing copies it.
    """

    compiled: Callable[..., tuple[TrainState, Metrics]]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """The state after an update, and the metrics of the batch before it."""
        after, metrics = self.compiled(*_taken_apart(state), batch)
        return after.replace(frozen=state.frozen, beside=state.beside), metrics

    def trace(self, state: TrainState, batch: Any) -> jax.stages.Traced:
        """As `jax.jit`'s, for arrays or their shapes."""
        return self.compiled.trace(*_taken_apart(state), batch)


def _taken_apart(state: TrainState) -> tuple[TrainState, Any, Any]:
    """What a step changes, and what it reads only."""
    return state.replace(frozen=None, beside=None), state.frozen, state.beside


def make_train_step(
    model: Decoder,
    optimiser: optax.GradientTransformation,
    options: TrainOptions = _DEFAULTS,
    state: TrainState | None = None,
    objective: Objective = NEXT_TOKEN,
) -> TrainStep:
    """The train step of a model.

    Where the loss or a gradient is not finite no update is made: parameters and optimiser stay as
    they are, and `step` counts on.

    The metrics are those of the objective; "grad_norm", of the gradients before the optimiser clips
    them; and "finite", whether the update was made.

    Args:
      model: what is trained.
      optimiser: of the state.
      options: how a step computes.
      state: or its shapes, where the model has a mesh and some parameters are frozen or lie
        stacked: the step lays out what it returns as that is.
      objective: what is made small.

    Raises:
      UserError: the model's head does not predict tokens, or the options ask for a loss that the
        objective has not. When the step is called: rows that do not divide by `microbatches`.
    """
    if model.config.head is not HeadKind.VOCABULARY:
        raise UserError(
            f"the model has a {model.config.head.value} head, which predicts no tokens; train a "
            "language model"
        )
    if not objective.token_losses:
        check_no_token_losses(model, options)
    _check_routers(model, options)
    model = model.clone(router=options.router)
    shardings = None
    if model.mesh is not None:
        state = abstract_train_state(model, optimiser) if state is None else state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state.replace(beside=None))

    def step(state: TrainState, frozen: Any, beside: Any, batch: Any) -> tuple[TrainState, Metrics]:
        places = None if shardings is None else shardings.params

        # Those that are frozen come as they were loaded.
        kept = frozen
        if frozen is not None and is_stacked(state.params):
            kept = stack_layers(model.config, frozen)

        if objective.of_texts:
            batch = with_groups(model, batch, options)

        def loss(params: Params, batch: Any, whole: Any) -> tuple[jax.Array, Any]:
            params = combine(combine(params, state.moved), kept)
            return objective.loss(model, params, batch, options, whole, beside)

        def ahead(parts: Any) -> Any:
            params = combine(combine(state.params, state.moved), kept)
            return objective.ahead(model, params, parts, options, beside)

        gradients, sums = _gradients(loss, ahead, state.params, batch, options.microbatches, places)
        metrics = objective.metrics(model, sums, options)
        moves = metrics.pop("score_bias_moves", None)
        with jax.named_scope("update"):
            norm = optax.tree.norm(gradients)
            finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
            updates, opt_state = optimiser.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            moved = state.moved if moves is None else move(model.config, state.moved, moves)
            params, opt_state, moved = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, opt_state, moved),
                (state.params, state.opt_state, state.moved),
            )
        metrics |= {"grad_norm": norm, "finite": finite}
        return TrainState(state.step + 1, params, opt_state, moved=moved), metrics

    if shardings is None:
        return TrainStep(jax.jit(step, donate_argnums=0))
    everywhere = NamedSharding(model.mesh, PartitionSpec())
    moving = shardings.replace(frozen=None)
    compiled = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(moving, shardings.frozen, None, None),
        out_shardings=(moving, everywhere),
    )
    return TrainStep(compiled)


def make_evaluation(
    model: Decoder,
    options: TrainOptions = _DEFAULTS,
    objective: Objective = NEXT_TOKEN,
    at_rest: bool = True,
) -> Callable[..., dict[str, Any]]:
    """A function of (params, batches, beside=None): the objective's metrics over all batches.

    Their names begin with "eval_", and experts' counts are left out. What is of a batch or of its
    parts is a mean over the batches: "balance_loss", and of routers' figures, "router", some such
    as "max_vio_batch".

    Args:
      model: what is trained.
      options: of its steps.
      objective: what is made small.
      at_rest: whether routers take each token's likeliest experts, as they do when a model is used,
        and not as training has them.
    """
    model = model.clone(router=RouterOptions() if at_rest else options.router)

    def run(params: Params, beside: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        if objective.of_texts:
            batch = with_groups(model, batch, options)
        sums = objective.loss(model, params, batch, options, None, beside)[1]
        metrics = objective.metrics(model, sums, options)
        own = {name: metrics[name] for name in ("balance_loss",) if name in metrics}
        return sums, own | of_batch(metrics.get("router", {}))

    compiled = jax.jit(run)

    def evaluate(params: Params, batches: Iterable[Any], beside: Any = None) -> dict[str, Any]:
        # Sums are as large as all pairs of experts: those of one batch at a time.
        sums, found = None, []
        for batch in batches:
            more, own = compiled(params, beside, batch)
            sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
            found.append(own)
        metrics = objective.metrics(model, sums, options)
        for name in ("expert_counts", "score_bias_moves"):
            metrics.pop(name, None)
        figures = metrics.pop("router", None)
        if "balance_loss" in metrics:
            metrics["balance_loss"] = np.mean([own["balance_loss"] for own in found])
        evaluated = {f"eval_{name}": float(value) for name, value in metrics.items()}
        if figures is not None:
            evaluated["eval_router"] = over_batches(figures, found)
        return evaluated

    return evaluate


def _check_routers(model: Decoder, options: TrainOptions) -> None:
    """Refuses a bias that is not there, and warns of a router that would learn nothing."""
    moe, balance = model.config.moe, options.balance
    if moe is None:
        return
    if balance.bias_rate and not moe.score_bias:
        raise UserError(
            f"balance.bias_rate = {balance.bias_rate}: the model's routers have no bias of their "
            "scores; set score_bias of its config's moe, in a run changes.score_bias"
        )
    if moe.num_experts_per_tok == 1 and moe.renormalise:
        warnings.warn(
            "num_experts_per_tok = 1 with renormalise (norm_topk_prob): each expert's weight is 1, "
            "so that routers learn nothing from the loss of tokens; unset renormalise, or choose "
            "more experts",
            RouterLearnsNothing,
            stacklevel=3,
        )


def _gradients(
    loss: Callable[[Params, Any, Any], tuple[jax.Array, Any]],
    ahead: Callable[[Any], Any],
    params: Params,
    batch: Any,
    count: int,
    places: Any,
) -> tuple[Params, Any]:
    """Of the loss by `params`, in `count` parts, laid out as `places` say; and the batch's sums."""

    def part(batch: Any, whole: Any) -> tuple[Params, Any]:
        gradients, sums = jax.grad(loss, has_aux=True)(params, batch, whole)
        if places is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, places)
        return gradients, sums

    if count == 1:
        return part(batch, None)
    parts = in_parts(batch, count)
    whole = ahead(parts)

    def body(total: Any, batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, part(batch, whole)), None

    shapes = jax.eval_shape(part, jax.tree.map(lambda a: a[0], parts), whole)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(body, zeros, parts)[0]
