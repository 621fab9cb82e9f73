"""The table of tensor names: checkpoint name <-> path in the parameter tree, written once."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qwen_jax.config import ModelConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One row: the name in a Hugging Face checkpoint and the place in the tree.

    `{i}` in both stands for the layer. Rows whose `present` is false for a config do not exist.
    """

    hf: str
    path: str
    present: Callable[[ModelConfig], bool] = lambda config: True


_LAYER = "model.layers.{i}."

_DENSE = (
    TensorName("model.embed_tokens.weight", "embed_tokens/weight"),
    TensorName(_LAYER + "input_layernorm.weight", "layers_{i}/input_layernorm/weight"),
    *(
        TensorName(f"{_LAYER}self_attn.{name}.weight", f"layers_{{i}}/self_attn/{name}/weight")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ),
    *(
        TensorName(
            f"{_LAYER}self_attn.{name}.bias",
            f"layers_{{i}}/self_attn/{name}/bias",
            lambda config: config.qkv_bias,
        )
        for name in ("q_proj", "k_proj", "v_proj")
    ),
    TensorName(
        _LAYER + "self_attn.o_proj.bias",
        "layers_{i}/self_attn/o_proj/bias",
        lambda config: config.output_bias,
    ),
    *(
        TensorName(
            f"{_LAYER}self_attn.{name}.weight",
            f"layers_{{i}}/self_attn/{name}/weight",
            lambda config: config.qk_norm,
        )
        for name in ("q_norm", "k_norm")
    ),
    TensorName(
        _LAYER + "post_attention_layernorm.weight", "layers_{i}/post_attention_layernorm/weight"
    ),
    *(
        TensorName(f"{_LAYER}mlp.{name}.weight", f"layers_{{i}}/mlp/{name}/weight")
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
    TensorName("model.norm.weight", "norm/weight"),
    TensorName("lm_head.weight", "lm_head/weight", lambda config: not config.tie_word_embeddings),
)

_TABLES: dict[str, tuple[TensorName, ...]] = {"qwen2": _DENSE, "qwen3": _DENSE}

# Where a tied checkpoint may hold its one table a second time.
TIED_HEAD = ("lm_head.weight", "model.embed_tokens.weight")

# Buffers that old writers saved and that are computed here.
COMPUTED_SUFFIXES = (".rotary_emb.inv_freq",)


def tensor_names(config: ModelConfig) -> dict[str, Path]:
    """Checkpoint name -> path in the tree, for every tensor of the model, first layer first."""
    rows = [row for row in _TABLES[config.family] if row.present(config)]
    names = {}
    for row in rows:
        layers = range(config.num_hidden_layers) if "{i}" in row.hf else (0,)
        for i in layers:
            names[row.hf.format(i=i)] = tuple(row.path.format(i=i).split("/"))
    return names


def leaf_at(tree: Mapping[str, Any], path: Path) -> Any:
    """The leaf of a nested dict at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dict with each leaf at its path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


def printable(name: str) -> str:
    """A name from a file, quoted where it would break a one-line message."""
    return name if name.isprintable() else repr(name)


def listed(items: list[str], limit: int = 5) -> str:
    """The first names of a list, and how many more there are, for a one-line message."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(printable, items[:limit])) + more
