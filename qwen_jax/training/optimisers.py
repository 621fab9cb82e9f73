"""optax optimisers from plain settings: schedules, decay masks, clipping."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import optax

from qwen_jax.errors import UserError
from qwen_jax.training.checks import Bounds, check_fields
from qwen_jax.training.stacking import stacked_names

Name = Literal["adamw", "muon", "adafactor"]
Schedule = Literal["constant", "cosine", "wsd"]

# Matrices that Muon leaves to AdamW: tables of vectors, and filters of one channel each.
_NOT_LINEAR_MAPS = r"(embed_tokens|lm_head|[qkv]_conv)/weight$"
_OUT_IN = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
_MUON, _ADAMW = "muon", "adamw"


@dataclasses.dataclass(frozen=True)
class OptimiserOptions:
    """How gradients become updates.

    Attributes:
      name: "adamw" (arXiv 1711.05101); "muon" (arXiv 2502.16982) for the matrices of the layers,
        their updates scaled to AdamW's size, and AdamW for the rest; "adafactor" (arXiv 1804.04235)
        with factored second moments and updates relative to a parameter's size.
      learning_rate: at its highest.
      schedule: after the warm-up "constant"; "cosine" down to the end of the run; or "wsd", stable
        and then straight down over the last `decay_steps` (arXiv 2404.06395).
      warmup_steps: of the learning rate's rise, straight from its `warmup_steps`-th part.
      decay_steps: of "wsd".
      final_learning_rate: at the end of a decay, as a share of the highest.
      weight_decay: times the learning rate, what each step takes off the decayed parameters.
      decay_except: patterns of slash-separated parameter paths that are not decayed, beside norms,
        biases and other vectors. Layers that are scanned together are decayed alike.
      clip_norm: the norm that all gradients together have at most; None for any.
      b1, b2, eps: of AdamW; b2 and eps of Adafactor are its own.
      momentum: of Muon.
    """

    name: Name = "adamw"
    learning_rate: float = 3e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_learning_rate: float = 0.0
    weight_decay: float = 0.1
    decay_except: tuple[str, ...] = ()
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95

    def __post_init__(self):
        some = Bounds(least=0)
        # At 1 a mean of gradients would never take any in.
        mean = Bounds(least=0, below=1)
        check_fields(
            self,
            name=get_args(Name),
            schedule=get_args(Schedule),
            learning_rate=some,
            warmup_steps=some,
            decay_steps=some,
            final_learning_rate=Bounds(least=0, most=1),
            weight_decay=some,
            clip_norm=Bounds(above=0),
            b1=mean,
            b2=mean,
            eps=Bounds(above=0),
            momentum=mean,
        )
        if self.decay_steps and self.schedule != "wsd":
            raise UserError(
                f"decay_steps = {self.decay_steps} is of schedule wsd, not of "
                f"{self.schedule}; leave it out"
            )
        if self.final_learning_rate and self.schedule == "constant":
            raise UserError(
                f"final_learning_rate = {self.final_learning_rate} is of schedules that decay, not "
                "of constant; leave it out"
            )


def make_schedule(options: OptimiserOptions, num_steps: int) -> optax.Schedule:
    """The learning rate by the number of updates made before.

    Args:
      options: of the optimiser.
      num_steps: updates of the whole run.

    Raises:
      UserError: the schedule's parts are longer than the run.
    """
    peak, warmup, decay = options.learning_rate, options.warmup_steps, options.decay_steps
    if options.schedule == "wsd" and not decay:
        raise UserError("decay_steps = 0: schedule wsd needs steps to decay over")
    if warmup + decay > num_steps:
        parts = f"warmup_steps = {warmup}" + f" and decay_steps = {decay}" * bool(decay)
        raise UserError(f"{parts} are more than the run's {num_steps} steps")
    final = peak * options.final_learning_rate
    match options.schedule:
        case "constant":
            after = [optax.constant_schedule(peak)]
        case "cosine":
            steps = max(num_steps - warmup, 1)
            after = [optax.cosine_decay_schedule(peak, steps, options.final_learning_rate)]
        case "wsd":
            after = [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)]
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    starts = [warmup, num_steps - decay][: len(after)]
    return optax.join_schedules([rise, *after], starts)


def make_optimiser(
    options: OptimiserOptions, num_steps: int, params: Mapping[str, Any]
) -> optax.GradientTransformation:
    """The optax optimiser of a run of `num_steps` updates.

    Args:
      options: of the optimiser.
      num_steps: updates of the whole run.
      params: what is trained, or its shapes.

    Raises:
      UserError: a pattern of `decay_except` that no parameter has, or as `make_schedule`.
    """
    schedule = make_schedule(options, num_steps)
    _check_patterns(options, params)

    def is_decayed(name: str, leaf: jax.Array) -> bool:
        excepted = any(re.search(pattern, name) for pattern in options.decay_except)
        return leaf.ndim > 1 and not excepted

    adamw = optax.adamw(
        schedule,
        options.b1,
        options.b2,
        options.eps,
        weight_decay=options.weight_decay,
        mask=functools.partial(_by_name, is_decayed),
    )
    # Decay and learning rate as AdamW has them: optax's own chains of the other two decay norms
    # along with matrices, or by a rate that does not follow the schedule.
    finish = (
        optax.add_decayed_weights(options.weight_decay, functools.partial(_by_name, is_decayed)),
        optax.scale_by_learning_rate(schedule),
    )
    match options.name:
        case "adamw":
            rule = adamw
        case "muon":
            muon = optax.chain(
                _muon(options.momentum),
                _scale_to_adamw(),
                *finish,
            )
            kinds = functools.partial(_by_name, _kind)
            rule = optax.partition({_MUON: muon, _ADAMW: adamw}, kinds)
        case "adafactor":
            rule = optax.chain(
                # Factors the two longest axes, of 128 at least, which a stack's first is not.
                optax.scale_by_factored_rms(),
                _layer_by_layer(optax.clip_by_block_rms(1.0)),
                _layer_by_layer(optax.scale_by_param_block_rms()),
                *finish,
            )
    if options.clip_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), rule)


def _muon(beta: float) -> optax.GradientTransformation:
    """optax's, for each layer of a stack in turn.

    It takes all axes before the last two for one, which along a mesh of experts would gather them
    where another axis comes first; and what it computes with is as large as what it is given.
    """

    def axes(tree: Any) -> Any:
        return jax.tree.map(lambda _: _OUT_IN, tree)

    rule = optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=axes)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def one(path: tuple[Any, ...], update: jax.Array, mean: jax.Array) -> Any:
            def run(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                (update,), after = rule.update([pair[0]], state._replace(mu=[pair[1]]))
                return update, after.mu[0]

            name = jax.tree_util.keystr(path, simple=True, separator="/")
            pair = update, mean
            return run(pair) if stacked_names(name) is None else jax.lax.map(run, pair)

        pairs = jax.tree_util.tree_map_with_path(one, updates, state.mu)
        updates, means = (
            jax.tree.map(lambda _, pair, i=i: pair[i], updates, pairs) for i in range(2)
        )
        return updates, state._replace(count=state.count + 1, mu=means)

    return optax.GradientTransformation(rule.init, update)


def _layer_by_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule without a state that looks at whole arrays, in stacks at those of each layer."""

    def update(updates: Any, params: Any) -> Any:
        def one(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
            def run(update: jax.Array, param: jax.Array) -> jax.Array:
                return rule.update(update, rule.init(param), param)[0]

            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return (run if stacked_names(name) is None else jax.vmap(run))(update, param)

        return jax.tree_util.tree_map_with_path(one, updates, params)

    return optax.stateless(update)


def _scale_to_adamw() -> optax.GradientTransformation:
    """Orthogonal updates [..., out, in] to the root mean square 0.2, about that of AdamW's."""

    def scale(update: jax.Array, _: jax.Array) -> jax.Array:
        return 0.2 * max(update.shape[-2:]) ** 0.5 * update

    return optax.stateless_with_tree_map(scale)


def _kind(name: str, leaf: jax.Array) -> str:
    is_map = leaf.ndim > 1 and not re.search(_NOT_LINEAR_MAPS, name)
    return _MUON if is_map else _ADAMW


def _check_patterns(options: OptimiserOptions, params: Mapping[str, Any]) -> None:
    names = [name for path in _paths(params) for name in stacked_names(path) or [path]]
    for pattern in options.decay_except:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"decay_except: no parameter's path has {pattern}; one is {names[0]}")


def _by_name(function: Callable[[str, Any], Any], params: Any) -> Any:
    """A tree like `params` of what `function` makes of each path and leaf.

    Of a stack it is what it makes of each layer's.

    Raises:
      UserError: layers of a stack differ in it.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = stacked_names(name)
        if layers is None:
            return function(name, leaf)
        own = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        first, *others = (function(layer, own) for layer in layers)
        for layer, other in zip(layers[1:], others, strict=True):
            if other != first:
                raise UserError(
                    f"the optimiser treats {layers[0]} and {layer} in two ways, and they are "
                    "scanned together; let its patterns be of both, or set step.scan to False"
                )
        return first

    return jax.tree_util.tree_map_with_path(one, params)


def _paths(params: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
