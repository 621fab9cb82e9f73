"""The mesh, and the tables that say which axes of arrays lie along which axes of it.

Arrays have logical axes ("heads", "batch"), meshes have mesh axes ("tensor", "fsdp"). `RULES` maps
the first to the second, `PARAMETERS` names the logical axes of every parameter. To spread a model
in another way, change a line here.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

# Outermost first: devices that are neighbours along `tensor` are nearest to each other.
#   data     copies of the model, each with its part of the batch
#   fsdp     the same, with the parameters cut up and put together a layer at a time
#   expert   the same, with the experts shared out; tokens travel to them
#   context  each with its part of every text
#   tensor   each with its part of every layer: heads, feed-forward channels, vocabulary
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

# The mesh axis that texts and caches are cut along.
CONTEXT = "context"

# Logical axis -> the mesh axes that it is cut along. The batch takes every axis but those that cut
# a token's own work, so that no two devices compute the same.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": (CONTEXT,),
    "slots": (CONTEXT,),
    "hidden": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "value_heads": ("tensor",),
    "key_heads": ("tensor",),
    "width": ("tensor",),
    "vocabulary": ("tensor",),
    "experts": ("expert",),
}

# The axes of token ids, and of the activations that pass from layer to layer.
TOKENS = ("batch", "length")
HIDDEN = (*TOKENS, None)

# Heads that serve several others. Where there are too few for the mesh, each device has all of
# their weights, and what they make is repeated (see `repeats`).
_SHARED_HEADS = ("kv_heads", "key_heads")

# End of a parameter's path -> the logical axes of the parameter; weights are [out, in].
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    r"(embed_tokens|lm_head)/weight": ("vocabulary", "hidden"),
    r"self_attn/(q|gate)_proj/weight": ("heads", "hidden"),
    r"self_attn/(q|gate)_proj/bias": ("heads",),
    r"self_attn/(k|v)_proj/weight": ("kv_heads", "hidden"),
    r"self_attn/(k|v)_proj/bias": ("kv_heads",),
    r"self_attn/o_proj/weight": ("hidden", "heads"),
    r"self_attn/o_proj/bias": (None,),
    r"linear_attn/(q|k)_proj/weight": ("key_heads", "hidden"),
    r"linear_attn/(q|k)_conv/weight": ("key_heads", None),
    r"linear_attn/(v|z|a|b)_proj/weight": ("value_heads", "hidden"),
    r"linear_attn/v_conv/weight": ("value_heads", None),
    r"linear_attn/(A_log|dt_bias)": ("value_heads",),
    r"linear_attn/out_proj/weight": ("hidden", "value_heads"),
    r"experts/(gate|up)_proj/weight": ("experts", "width", "hidden"),
    r"experts/down_proj/weight": ("experts", "hidden", "width"),
    r"(mlp|shared_expert)/(gate|up)_proj/weight": ("width", "hidden"),
    r"(mlp|shared_expert)/down_proj/weight": ("hidden", "width"),
    r"mlp/(gate|shared_expert_gate)/weight": (None, "hidden"),
    r"mlp/gate/score_bias": (None,),
    r"mtp/fc/weight": (None, "hidden"),
    r"(score|score_\d|project|risk|category)/weight": (None, "hidden"),
    r"(score|score_\d)/bias": (None,),
    r"\w*norm\w*/weight": (None,),
}

# Cut in storage only: put together in the layer that uses them.
_GATHERED = ("hidden",)


def as_mesh(mesh: Mesh | str | None) -> Mesh | None:
    """The mesh that a user means, with all of `MESH_AXES`; None for None.

    Args:
      mesh: such as "fsdp:4,tensor:2", which takes the first 8 devices; or a mesh of JAX's, some of
        whose axes may be missing.

    Raises:
      UserError: an unknown axis, a size that is none, more devices than there are, or none of a
        process that runs this.
    """
    if mesh is None:
        return None
    if isinstance(mesh, Mesh):
        _check_names("mesh", mesh.axis_names)
        places = [mesh.axis_names.index(axis) for axis in MESH_AXES if axis in mesh.axis_names]
        devices = mesh.devices.transpose(places).reshape(
            [mesh.shape.get(axis, 1) for axis in MESH_AXES]
        )
        return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    sizes = read_mesh(mesh)
    needed, available = math.prod(sizes.values()), len(jax.devices())
    if needed > available:
        virtual = f", or set JAX_NUM_CPU_DEVICES={needed}" * (jax.default_backend() == "cpu")
        raise UserError(
            f"mesh {mesh} needs {needed} devices, here are {available}; give a smaller one{virtual}"
        )
    devices = jax.devices()[:needed]
    if len({device.process_index for device in devices}) < jax.process_count():
        raise UserError(
            f"mesh {mesh} leaves out all devices of some of the {jax.process_count()} processes; "
            f"give one of {available} devices"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


def read_mesh(text: str) -> dict[str, int]:
    """Sizes of all mesh axes from text such as "fsdp:4,tensor:2"; 1 for those not in it.

    Raises:
      UserError: it is not of that form, or names an axis that is unknown, or twice.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    named = []
    for part in text.split(","):
        name, colon, size = (piece.strip() for piece in part.partition(":"))
        if not (colon and size.isdecimal() and int(size) >= 1):
            raise UserError(
                f"mesh {text}: {part.strip() or 'nothing'!r} should be an axis and its size, "
                "such as fsdp:4"
            )
        named.append(name)
        sizes[name] = int(size)
    _check_names(f"mesh {text}", named)
    return sizes


def _check_names(what: str, names: Any) -> None:
    for name in names:
        if name not in MESH_AXES:
            raise UserError(f"{what}: axis {name} is unknown; known: {', '.join(MESH_AXES)}")
    if len(set(names)) < len(names):
        raise UserError(f"{what}: an axis is named twice")


def num_shards(mesh: Mesh, logical: str) -> int:
    """How many parts `RULES` cut a logical axis into."""
    return math.prod(mesh.shape[axis] for axis in RULES[logical])


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arrays of a call lie on a mesh.

    Attributes:
      mesh: with all of `MESH_AXES`.
      whole: logical axes that are not cut, whatever `RULES` say.
    """

    mesh: Mesh
    whole: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: ModelConfig, mesh: Mesh, *whole: str) -> "Layout":
        """That of a model's calls: heads that are too few are whole, and so is what is named."""
        counts = _counts(config)
        few = {name for name in _SHARED_HEADS if counts.get(name, 0) % num_shards(mesh, name)}
        return cls(mesh, frozenset(few | set(whole)))

    def spec(self, *logical: str | None) -> PartitionSpec:
        """Where an array with these logical axes lies; None is an axis that is not cut."""
        cut = (name is not None and name not in self.whole for name in logical)
        return PartitionSpec(
            *(RULES[name] if is_cut else None for name, is_cut in zip(logical, cut, strict=True))
        )

    def sharding(self, *logical: str | None) -> NamedSharding:
        """The same on this mesh."""
        return NamedSharding(self.mesh, self.spec(*logical))

    def axes_of(self, *logical: str) -> tuple[str, ...]:
        """The mesh axes that logical axes are cut along, for collectives."""
        cut = [axis for name in logical if name not in self.whole for axis in RULES[name]]
        return tuple(axis for axis in cut if self.mesh.shape[axis] > 1)

    @property
    def platform(self) -> str:
        """Of the devices, as `jax.default_backend()` names them."""
        if isinstance(self.mesh, AbstractMesh):
            return self.mesh.abstract_device.platform
        return self.mesh.devices.flat[0].platform

    @property
    def num_expert_groups(self) -> int:
        """Groups of devices that each have all experts among them, and tokens of their own."""
        return math.prod(
            self.mesh.shape[axis] for axis in set(self.axes_of(*TOKENS)) - {*RULES["experts"]}
        )


def is_cut(layout: Layout | None, logical: str = "length") -> bool:
    """Whether several devices share a logical axis of a call's arrays."""
    return layout is not None and bool(layout.axes_of(logical))


def repeats(layout: Layout | None, heads: int, logical: str) -> int:
    """How often each of `heads` shared heads is repeated, so that their number divides.

    Each then serves fewer of the heads that read it. Those are a multiple of `heads` and of the
    shards, and so of the number that comes out.
    """
    return 1 if layout is None else math.lcm(heads, num_shards(layout.mesh, logical)) // heads


def repeat_heads(x: jax.Array, layout: Layout | None, logical: str) -> jax.Array:
    """Shared heads [B, T, K, d] as often as `repeats` says, one beside the other."""
    if layout is None:
        return x
    x = jnp.repeat(x, repeats(layout, x.shape[2], logical), axis=2)
    return constrain(x, layout, *TOKENS, "heads", None)


def constrain(x: Any, layout: Layout | None, *logical: str | None) -> Any:
    """`x`, an array or a pytree of like ones, laid out by its logical axes; numbers stay."""
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(*logical))


def on_shards(
    function: Callable[..., Any], layout: Layout | None, in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
    """`function` run by each device on its own shards of the arguments.

    Args:
      function: of arrays, which may use collectives over mesh axes.
      layout: None to leave `function` as it is.
      in_axes: for each argument, a pytree prefix of tuples of logical axes.
      out_axes: the same for what it returns.
    """
    if layout is None:
        return function

    def specs(axes: Any) -> Any:
        return jax.tree.map(lambda names: layout.spec(*names), axes, is_leaf=_is_logical)

    return jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=specs(tuple(in_axes)),
        out_specs=specs(out_axes),
        check_vma=False,
    )


def _is_logical(node: Any) -> bool:
    return type(node) is tuple and all(name is None or isinstance(name, str) for name in node)


# The arrays of `nn.quantized.QuantizedWeight`.
_PACKED = re.compile("/(values|scales|zeros|group_of)$")

# The parts of `nn.low_rank.LowRankWeight`, as the axes of the weight: the rank is not cut.
_LOW_RANK = re.compile("(?<=/weight)/(base|a|b|scale)$")
_PARTS: dict[str, Callable[[tuple[str | None, ...]], tuple[str | None, ...]]] = {
    "base": lambda weight: weight,
    "a": lambda weight: (*weight[:-2], None, weight[-1]),
    "b": lambda weight: (*weight[:-1], None),
    "scale": lambda weight: weight[:-2],
}


def parameter_axes(path: str) -> tuple[str | None, ...]:
    """The logical axes of the parameter at a slash-separated path, or of an array of one that is
    packed or has a low-rank update.

    Raises:
      KeyError: no row of `PARAMETERS` is about it.
    """
    packed = _PACKED.search(path)
    weight = path[: packed.start()] if packed else path
    part = _LOW_RANK.search(weight)
    weight = weight[: part.start()] if part else weight
    for pattern, logical in PARAMETERS.items():
        if re.search(rf"(^|/){pattern}$", weight):
            if part:
                logical = _PARTS[part[1]](logical)
            # The outputs have their groups in common.
            in_common = packed and packed[1] == "group_of"
            return (*logical[:-2], logical[-1]) if in_common else logical
    raise KeyError(f"no row of PARAMETERS in {__name__} is about {path}; add one")


def parameter_sharding(config: ModelConfig, mesh: Mesh, path: str) -> NamedSharding:
    """Where the parameter at a slash-separated path is stored."""
    return Layout.of(config, mesh).sharding(*parameter_axes(path))


def parameter_shardings(config: ModelConfig, mesh: Mesh, params: Any) -> Any:
    """A tree like `params` with the `NamedSharding` of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: parameter_sharding(
            config, mesh, jax.tree_util.keystr(path, simple=True, separator="/")
        ),
        params,
    )


def gather(config: ModelConfig, mesh: Mesh, params: Any) -> Any:
    """Parameters as stored -> as the layer that uses them has them; gradients the other way.

    Args:
      config: of the model.
      mesh: with all of `MESH_AXES`.
      params: a part of the tree, whose paths end as those of the tree do.
    """

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        logical = parameter_axes(jax.tree_util.keystr(path, simple=True, separator="/"))
        stored = Layout.of(config, mesh)
        used = Layout(mesh, stored.whole | set(_GATHERED))
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jax.lax.with_sharding_constraint(leaf, used.sharding(*logical))
        return _gather(leaf, stored.sharding(*logical), used.sharding(*logical))

    return jax.tree_util.tree_map_with_path(one, params)


# Left to itself, the gradient of a layout is laid out the same way: summed on all devices, where
# each needs its shard only.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, stored: NamedSharding, used: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, used)


def _gather_forward(x, stored, used):
    return _gather(x, stored, used), None


def _gather_backward(stored, used, _, cotangent):
    return (jax.lax.with_sharding_constraint(cotangent, stored),)


_gather.defvjp(_gather_forward, _gather_backward)


def _counts(config: ModelConfig) -> dict[str, int]:
    """How many heads there are, which are not cut through."""
    counts = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
    if config.delta is not None:
        counts["value_heads"] = config.delta.num_value_heads
        counts["key_heads"] = config.delta.num_key_heads
    return counts


def check_mesh(config: ModelConfig, mesh: Mesh, params: Any) -> None:
    """Checks that the tables and `mesh` fit each other and the model.

    Args:
      config: of the model.
      mesh: with all of `MESH_AXES`.
      params: of the model, or their shapes.

    Raises:
      UserError: a logical axis that no rule knows, a rule for a mesh axis that there is none of,
        two axes of a parameter along one axis of the mesh, or an axis that does not divide; the
        message names the parameter.
    """
    counts = _counts(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        logical = parameter_axes(name)
        used: dict[str, str] = {}
        for axis, size in zip(logical, leaf.shape, strict=True):
            if axis is None:
                continue
            if axis not in RULES:
                raise UserError(f"parameter {name}: logical axis {axis} has no rule in RULES")
            for mesh_axis in RULES[axis]:
                _check_names(f"parameter {name}: the rule for {axis}", [mesh_axis])
                if mesh_axis in used:
                    raise UserError(
                        f"parameter {name}: {used[mesh_axis]} and {axis} both lie along the mesh's "
                        f"{mesh_axis}; change a rule"
                    )
                used[mesh_axis] = axis
            shards, count = num_shards(mesh, axis), counts.get(axis, size)
            if count % shards and axis not in _SHARED_HEADS:
                raise UserError(
                    f"parameter {name}: {count} {axis.replace('_', ' ')} do not divide by "
                    f"{' x '.join(f'{a}:{mesh.shape[a]}' for a in RULES[axis])}; give a mesh where "
                    f"they do"
                )
