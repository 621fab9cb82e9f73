"""LoRA (arXiv 2106.09685): small matrices trained beside frozen weights, dense or packed.

params = add_adapters(params, LoraOptions(rank=8, alpha=16), jax.random.key(0))
state = init_train_state(model, optimiser, params=params, trained=is_adapter)
step = make_train_step(model, optimiser, state=state)
"""

import dataclasses
import difflib
import fnmatch
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.nn.low_rank import LowRankWeight, attach

# The linear layers of attention, as most fine-tuning adapts them.
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Which weights get adapters, and of what size.

    Attributes:
      rank: r.
      alpha: the update is multiplied by alpha / r, or alpha / sqrt(r).
      targets: which linear layers: names, or ends of paths in the parameter tree, `*` for anything:
        "q_proj", "mlp/experts/*", "layers_0/self_attn/*_proj". Dots are read as slashes. A stack of
        experts is one layer, "mlp/experts/gate_proj" for one.
      rank_stabilised: whether it is alpha / sqrt(r) (arXiv 2312.03732), PEFT's `use_rslora`.
      dropout: of the adapters' inputs; 0 is the only one supported.

    Raises:
      UserError: a value that none of these can have.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = _TARGETS
    rank_stabilised: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if isinstance(self.targets, str) or not all(isinstance(t, str) for t in self.targets):
            raise UserError(f"targets = {self.targets!r} should be a list of names")
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"rank = {self.rank} should be an integer, at least 1")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise UserError(f"alpha = {self.alpha} should be a number above 0")
        if self.dropout != 0:
            raise UserError(
                f"dropout = {self.dropout} is not supported: adapters are trained without; set it "
                "to 0"
            )
        if not self.targets:
            raise UserError("targets is empty; name the linear layers that get adapters")

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def add_adapters(params: Mapping[str, Any], options: LoraOptions, key: jax.Array) -> dict[str, Any]:
    """`params` with fresh adapters on the layers that `options` name; their arrays are shared.

    As PEFT's, `a` is uniform up to 1 / sqrt(in) and `b` zero, so that nothing changes at first;
    both are float32. The numbers of a layer depend on the key and its path alone.

    Args:
      params: of a model, dense or packed.
      options: see `LoraOptions`.
      key: to draw from.

    Raises:
      UserError: a target that no layer answers to, or one that is no linear layer.
    """
    layers = dict(_layers(params))
    chosen = {name for target in options.targets for name in _matches(target, layers)}
    adapter: dict[str, Any] = {}
    for name in sorted(chosen):
        weight = layers[name]
        *outer, n_out, n_in = weight.shape
        bound = n_in**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, zlib.crc32(name.encode())),
            (*outer, options.rank, n_in),
            minval=-bound,
            maxval=bound,
        )
        update = LowRankWeight(
            base=None,
            a=a,
            b=jnp.zeros((*outer, n_out, options.rank)),
            scale=jnp.full(outer, options.scale, jnp.float32),
        )
        branch = adapter
        for part in name.split("/"):
            branch = branch.setdefault(part, {})
        branch["weight"] = update
    return attach(params, adapter)


def is_adapter(path: str) -> bool:
    """Whether the array at a slash-separated path is one that LoRA trains."""
    return path.endswith(("/weight/a", "/weight/b"))


def _layers(params: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every module's weight by the module's path, whether it is linear or not."""
    for name, child in params.items():
        if isinstance(child, Mapping):
            yield from _layers(child, f"{path}/{name}" if path else name)
        elif name == "weight":
            yield path, child


def _why_not(name: str, weight: Any) -> str | None:
    """Why a module's weight cannot have an adapter; None where it can."""
    if name.endswith("embed_tokens"):
        return "the table of embeddings, and adapters are for linear layers"
    if weight.ndim < 2:
        return "a norm, and adapters are for linear layers"
    if name.endswith("_conv"):
        return "a convolution, and adapters are for linear layers"
    return None


def _matches(target: str, layers: Mapping[str, Any]) -> list[str]:
    pattern = target.replace(".", "/").removesuffix("/weight")
    found = [
        name
        for name in layers
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*/{pattern}")
    ]
    linear = [name for name in found if _why_not(name, layers[name]) is None]
    if linear:
        # What a wildcard takes in besides is not meant.
        return linear
    if found:
        raise UserError(f"target {target} is {_why_not(found[0], layers[found[0]])}; leave it out")
    ends = {name.rsplit("/", 1)[-1] for name in layers}
    near = difflib.get_close_matches(pattern.rsplit("/", 1)[-1], sorted(ends), n=1)
    hint = f"; the nearest is {near[0]}" if near else f"; there are {', '.join(sorted(ends))}"
    raise UserError(f"target {target} is no layer of the model{hint}")
