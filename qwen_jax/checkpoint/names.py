"""The tables of tensor names: checkpoint name <-> place in the parameter tree, written once.

A row says that a region of a stored tensor equals a region of a parameter. Read one way it loads a
checkpoint, read the other way it writes one; `checkpoint.regions` does both.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from qwen_jax.config import HeadKind, LayerKind, ModelConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a stored tensor a parameter is: `start` to `stop` of every group of `total`.

    Attributes:
      groups: how many groups of rows the stored tensor has.
      start, stop: rows of each group.
      total: rows in a group.
      axis: of the rows.
    """

    groups: int
    start: int
    stop: int
    total: int
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What decides which tensors a layer has."""

    kind: LayerKind
    sparse: bool


def _always(config: ModelConfig, layer: _Layer | None) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One row: the name in a Hugging Face checkpoint and the place in the tree.

    Attributes:
      hf: the name; `{i}` stands for the layer, `{e}` for an expert, of which the parameter is a
        stack.
      path: in the tree, with `{i}` likewise.
      present: whether a config, or one of its layers, has the tensor.
      rows: which rows of the stored tensor; None for all.
      unit_axis: whether the stored tensor has an axis of one after its rows.
      fused_experts: whether the row belongs to the layout that holds all experts of a layer in one
        tensor, or to the one with a tensor for each expert; None for both.
    """

    hf: str
    path: str
    present: Callable[[ModelConfig, Any], bool] = _always
    rows: Callable[[ModelConfig], Rows] | None = None
    unit_axis: bool = False
    fused_experts: bool | None = None


@dataclasses.dataclass(frozen=True)
class Region:
    """A row of the table for one layer and one expert of one config; see `TensorName`."""

    name: str
    path: Path
    expert: int | None
    rows: Rows | None
    unit_axis: bool


def _sparse(config: ModelConfig, layer: _Layer) -> bool:
    return layer.sparse


def _dense(config: ModelConfig, layer: _Layer) -> bool:
    return not layer.sparse


def _shared(config: ModelConfig, layer: _Layer) -> bool:
    return layer.sparse and config.moe.shared_intermediate_size is not None


def _score_biased(config: ModelConfig, layer: _Layer) -> bool:
    return layer.sparse and config.moe.score_bias


def _attends(config: ModelConfig, layer: _Layer) -> bool:
    return layer.kind is not LayerKind.LINEAR_ATTENTION


def _linear(config: ModelConfig, layer: _Layer) -> bool:
    return layer.kind is LayerKind.LINEAR_ATTENTION


def _both(*conditions: Callable[[ModelConfig, _Layer], bool]):
    return lambda config, layer: all(condition(config, layer) for condition in conditions)


def _qkv_biased(config: ModelConfig, layer: _Layer) -> bool:
    return config.qkv_bias


def _output_biased(config: ModelConfig, layer: _Layer) -> bool:
    return config.output_bias


def _normed(config: ModelConfig, layer: _Layer) -> bool:
    return config.qk_norm


def _gated(config: ModelConfig, layer: _Layer) -> bool:
    return config.output_gate


def _ungated(config: ModelConfig, layer: _Layer) -> bool:
    return not config.output_gate


def _cut(widths: Callable[[ModelConfig], list[int]], part: int, groups=lambda config: 1):
    """The rows of the `part`-th of several matrices that each group holds one after another."""

    def rows(config: ModelConfig) -> Rows:
        ends = [sum(widths(config)[:n]) for n in range(len(widths(config)) + 1)]
        return Rows(groups(config), ends[part], ends[part + 1], ends[-1])

    return rows


def _names(hf: str, path: str, names: Iterable[str], kind: str = "weight", **options):
    return [TensorName(f"{hf}{n}.{kind}", f"{path}{n}/{kind}", **options) for n in names]


def _query_and_gate(kind: str, present) -> list[TensorName]:
    """A gated query projection: each head's query rows, then its gate rows."""

    def widths(config: ModelConfig) -> list[int]:
        return [config.head_dim] * 2

    def heads(config: ModelConfig) -> int:
        return config.num_attention_heads

    return [
        TensorName(
            f"self_attn.q_proj.{kind}",
            f"self_attn/{name}/{kind}",
            _both(_attends, _gated, present),
            _cut(widths, part, heads),
        )
        for part, name in enumerate(("q_proj", "gate_proj"))
    ]


_ATTENTION = [
    *_names("self_attn.", "self_attn/", ["q_proj"], present=_both(_attends, _ungated)),
    *_query_and_gate("weight", _always),
    *_names("self_attn.", "self_attn/", ["k_proj", "v_proj", "o_proj"], present=_attends),
    *_names(
        "self_attn.", "self_attn/", ["q_proj"], "bias",
        present=_both(_attends, _ungated, _qkv_biased),
    ),
    *_query_and_gate("bias", _qkv_biased),
    *_names(
        "self_attn.", "self_attn/", ["k_proj", "v_proj"], "bias",
        present=_both(_attends, _qkv_biased),
    ),
    *_names(
        "self_attn.", "self_attn/", ["o_proj"], "bias", present=_both(_attends, _output_biased)
    ),
    *_names("self_attn.", "self_attn/", ["q_norm", "k_norm"], present=_both(_attends, _normed)),
]  # fmt: skip


def _delta_widths(config: ModelConfig) -> list[int]:
    """Rows of queries, keys and values (and gates) of one key head."""
    delta = config.delta
    values = delta.num_value_heads // delta.num_key_heads * delta.value_head_dim
    return [delta.key_head_dim, delta.key_head_dim, values, values]


def _delta_flat(config: ModelConfig) -> list[int]:
    return [config.delta.num_key_heads * width for width in _delta_widths(config)[:3]]


def _delta_pair(config: ModelConfig) -> list[int]:
    return [config.delta.num_value_heads // config.delta.num_key_heads] * 2


def _key_heads(config: ModelConfig) -> int:
    return config.delta.num_key_heads


def _delta_cut(name: str, parts: str, widths, groups=lambda config: 1, unit_axis=False):
    """Rows that cut the stored `name` into matrices, `_proj` or, with a unit axis, `_conv`."""
    kind = "conv" if unit_axis else "proj"
    return [
        TensorName(
            f"linear_attn.{name}.weight", f"linear_attn/{part}_{kind}/weight", _linear,
            _cut(widths, number, groups), unit_axis,
        )
        for number, part in enumerate(parts)
    ]  # fmt: skip


_DELTA_COMMON = [
    *_delta_cut("conv1d", "qkv", _delta_flat, unit_axis=True),
    TensorName("linear_attn.A_log", "linear_attn/A_log", _linear),
    TensorName("linear_attn.dt_bias", "linear_attn/dt_bias", _linear),
    *_names("linear_attn.", "linear_attn/", ["norm", "out_proj"], present=_linear),
]

# The first layout interleaves by key head, the second does not.
_DELTA_GROUPED = [
    *_delta_cut("in_proj_qkvz", "qkvz", _delta_widths, _key_heads),
    *_delta_cut("in_proj_ba", "ba", _delta_pair, _key_heads),
    *_DELTA_COMMON,
]
_DELTA_FLAT = [
    *_delta_cut("in_proj_qkv", "qkv", _delta_flat),
    *(
        TensorName(f"linear_attn.in_proj_{n}.weight", f"linear_attn/{n}_proj/weight", _linear)
        for n in "zba"
    ),
    *_DELTA_COMMON,
]

# In the tree, within a layer.
SCORE_BIAS = "mlp/gate/score_bias"

_SWIGLU = ("gate_proj", "up_proj", "down_proj")
_FUSED = "mlp.experts.gate_up_proj"


def _fused_rows(part: int) -> Callable[[ModelConfig], Rows]:
    def rows(config: ModelConfig) -> Rows:
        width = config.moe.intermediate_size
        return Rows(1, part * width, (part + 1) * width, 2 * width, axis=1)

    return rows


_FEED_FORWARD = [
    *_names("mlp.", "mlp/", _SWIGLU, present=_dense),
    *_names("mlp.", "mlp/", ["gate"], present=_sparse),
    TensorName("mlp.gate.e_score_correction_bias", SCORE_BIAS, _score_biased),
    *(
        TensorName(
            f"mlp.experts.{{e}}.{name}.weight", f"mlp/experts/{name}/weight", _sparse,
            fused_experts=False,
        )
        for name in _SWIGLU
    ),
    *(
        TensorName(
            _FUSED, f"mlp/experts/{name}/weight", _sparse,
            _fused_rows(part), fused_experts=True,
        )
        for part, name in enumerate(_SWIGLU[:2])
    ),
    TensorName(
        "mlp.experts.down_proj", "mlp/experts/down_proj/weight", _sparse, fused_experts=True
    ),
    *_names("mlp.shared_expert.", "mlp/shared_expert/", _SWIGLU, present=_shared),
    *_names("mlp.", "mlp/", ["shared_expert_gate"], present=_shared),
]  # fmt: skip

_NORMS = ["input_layernorm", "post_attention_layernorm"]


def _has_vocabulary_head(config: ModelConfig, layer: None) -> bool:
    return config.head is HeadKind.VOCABULARY and not config.tie_word_embeddings


def _has_head(*kinds: HeadKind) -> Callable[[ModelConfig, None], bool]:
    return lambda config, layer: config.head in kinds


_ENDS = [
    *_names("model.", "", ["embed_tokens", "norm"]),
    *_names("", "", ["lm_head"], present=_has_vocabulary_head),
    *_names("", "", ["score"], present=_has_head(HeadKind.SCORE, HeadKind.SCORE_WITH_BIAS)),
    *_names("", "", ["score"], "bias", present=_has_head(HeadKind.SCORE_WITH_BIAS)),
    *(
        TensorName(f"score.{n}.{kind}", f"score_{n}/{kind}", _has_head(HeadKind.TWO_LAYER_SCORE))
        for n in (0, 2)
        for kind in ("weight", "bias")
    ),
    *(
        TensorName(f"{hf}{stored}.weight", f"{path}_guard/{name}/weight", _has_head(HeadKind.GUARD))
        for hf, path in (("", "answer"), ("query_", "query"))
        for stored, name in (
            ("risk_level_category_pre", "project"),
            ("risk_level_category_layernorm", "norm"),
            ("risk_level_head", "risk"),
            ("category_head", "category"),
        )
    ),
]


def _has_mtp(config: ModelConfig, layer: None) -> bool:
    return config.mtp_layers > 0


_MTP_NORMS = ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"]
_MTP = _names("mtp.", "mtp/", ["fc", *_MTP_NORMS], present=_has_mtp)


@dataclasses.dataclass(frozen=True)
class _Table:
    """The rows of a family: those outside of layers, and those of a layer after its prefix."""

    ends: list[TensorName]
    layer: list[TensorName]
    layer_prefix: str = "model.layers.{i}."


_ATTENDING = _Table(_ENDS, [*_names("", "", _NORMS), *_ATTENTION, *_FEED_FORWARD])
_GROUPED_HYBRID = _Table(
    [*_ENDS, *_MTP], [*_names("", "", _NORMS), *_ATTENTION, *_DELTA_GROUPED, *_FEED_FORWARD]
)
_FLAT_HYBRID = _Table(
    [*_ENDS, *_MTP], [*_names("", "", _NORMS), *_ATTENTION, *_DELTA_FLAT, *_FEED_FORWARD]
)


def _qkv_widths(config: ModelConfig) -> list[int]:
    kv_heads = config.num_key_value_heads
    return [n * config.head_dim for n in (config.num_attention_heads, kv_heads, kv_heads)]


# `w2` is the branch that goes through the SiLU.
_QWEN1 = _Table(
    [
        TensorName("transformer.wte.weight", "embed_tokens/weight"),
        TensorName("transformer.ln_f.weight", "norm/weight"),
        *_names("", "", ["lm_head"], present=_has_vocabulary_head),
    ],
    [
        TensorName("ln_1.weight", "input_layernorm/weight"),
        TensorName("ln_2.weight", "post_attention_layernorm/weight"),
        *(
            TensorName(
                f"attn.c_attn.{kind}", f"self_attn/{n}_proj/{kind}", rows=_cut(_qkv_widths, part)
            )
            for kind in ("weight", "bias")
            for part, n in enumerate("qkv")
        ),
        TensorName("attn.c_proj.weight", "self_attn/o_proj/weight"),
        TensorName("mlp.w1.weight", "mlp/up_proj/weight"),
        TensorName("mlp.w2.weight", "mlp/gate_proj/weight"),
        TensorName("mlp.c_proj.weight", "mlp/down_proj/weight"),
    ],
    "transformer.h.{i}.",
)

_TABLES: Mapping[str, _Table] = {
    "qwen": _QWEN1,
    "qwen2": _ATTENDING,
    "qwen2_moe": _ATTENDING,
    "qwen3": _ATTENDING,
    "qwen3_moe": _ATTENDING,
    "qwen3_next": _GROUPED_HYBRID,
    "qwen3_5_text": _FLAT_HYBRID,
    "qwen3_5_moe_text": _FLAT_HYBRID,
}

# How checkpoints begin the names that the tables begin with the first of these: as a part of a
# vision-language model, and, last, a model without a head around it.
_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")

# The other towers of a checkpoint whose text tower is wanted.
_OTHER_TOWERS = dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), ("model.visual.", "visual."))

# Where a tied checkpoint may hold its one table a second time.
TIED_HEAD = ("lm_head.weight", "model.embed_tokens.weight")

# Buffers that old writers saved and that are computed here.
COMPUTED_SUFFIXES = ("rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", "logn_tensor")

_MTP_LAYER = re.compile(r"mtp[./]layers[._](\d+)[./]")


def regions(config: ModelConfig, fused_layers: Collection[str] = ()) -> list[Region]:
    """Every correspondence between a checkpoint of `config` and its parameters.

    They are in the order of the model, first layer first.

    Args:
      config: of the model.
      fused_layers: beginnings of the names of the layers that hold all their experts in one tensor,
        as `layers_of_fused_experts` finds them; the others have a tensor for each expert.
    """
    table = _TABLES[config.family]
    found = [region for row in table.ends for region in _resolve(config, row, None, "", "", False)]
    sparse = config.moe.layers if config.moe else ()
    stacks = [
        (table.layer_prefix.format(i=i), f"layers_{i}/", _Layer(kind, i in sparse))
        for i, kind in enumerate(config.layer_types)
    ] + [
        (f"mtp.layers.{i}.", f"mtp/layers_{i}/", _Layer(LayerKind.FULL_ATTENTION, bool(sparse)))
        for i in range(config.mtp_layers)
    ]
    for prefix, path, layer in stacks:
        for row in table.layer:
            found += _resolve(config, row, layer, prefix, path, prefix in fused_layers)
    return found


def _resolve(
    config: ModelConfig,
    row: TensorName,
    layer: _Layer | None,
    prefix: str,
    path: str,
    fused_experts: bool,
) -> list[Region]:
    if row.fused_experts not in (None, fused_experts) or not row.present(config, layer):
        return []
    experts = range(config.moe.num_experts) if "{e}" in row.hf else [None]
    place = tuple((path + row.path).split("/"))
    rows = row.rows and row.rows(config)
    return [Region(prefix + row.hf.format(e=e), place, e, rows, row.unit_axis) for e in experts]


def canonical_names(config: ModelConfig, stored: Iterable[str]) -> dict[str, str | None]:
    """Stored name -> the name that the table has for it; None for another tower's or head's."""
    stored = list(stored)
    towers = _OTHER_TOWERS.get(config.family, ())
    if config.head in (HeadKind.TWO_LAYER_SCORE, HeadKind.GUARD):
        # Of the language model that it was trained from, published with it and read by nothing.
        towers = (*towers, "lm_head.")
    embeddings = {prefix: prefix + "embed_tokens.weight" for prefix in _PREFIXES}
    prefix = next((p for p, name in embeddings.items() if name in stored), _PREFIXES[0])

    def rename(name: str) -> str | None:
        if name.startswith(towers):
            return None
        if name.startswith(prefix) and not name.startswith(("lm_head.", "score.", "mtp.")):
            return _PREFIXES[0] + name.removeprefix(prefix)
        return name.removeprefix("language_model.")

    return {name: rename(name) for name in stored}


def fit_config(config: ModelConfig, stored: Iterable[str]) -> ModelConfig:
    """`config` with the parts that only the tensors tell of: the MTP head, a missing output head.

    Args:
      config: as config.json has it.
      stored: names of a checkpoint's tensors, or slash-separated paths of a parameter tree.
    """
    stored = list(stored)
    mtp = {int(match[1]) for name in stored if (match := _MTP_LAYER.match(name))}
    # A text embedder is published as a causal model, its tensors as those of a bare one.
    is_bare = "embed_tokens.weight" in stored
    head = config.head
    if (
        head is HeadKind.VOCABULARY
        and not config.tie_word_embeddings
        and is_bare
        and not any(name.startswith("lm_head") for name in stored)
    ):
        head = HeadKind.NONE
    return dataclasses.replace(config, mtp_layers=len(mtp), head=head)


def is_projection(path: Path) -> bool:
    """Whether a parameter is one of the large matrices that quantised checkpoints pack.

    That is a linear layer within a layer, or a stack of experts: no embedding, no head, no router,
    and none of the small ones that make the gates of the delta rule.
    """
    return path[-1] == "weight" and path[-2].endswith("_proj") and path[-2][:2] not in ("a_", "b_")


def stays_float32(path: Path) -> bool:
    """Whether a parameter is float32 in models of every dtype.

    Biases of routers' scores are: training moves them by less than bfloat16 can tell.
    """
    return "/".join(path).endswith(SCORE_BIAS)


def layers_of_fused_experts(stored: Iterable[str]) -> set[str]:
    """Beginnings of the names of the layers that hold all their experts in one tensor."""
    return {name.removesuffix(_FUSED) for name in stored if name.endswith(_FUSED)}


def sparse_layers(config: ModelConfig) -> set[str]:
    """Beginnings of the names of the layers that have experts."""
    names = (region.name for region in regions(config) if region.expert is not None)
    return {name.partition("mlp.experts.")[0] for name in names}


def known_name(name: str, known: Collection[str]) -> str | None:
    """The one of the `known` names of the table that `name` is, however it begins; None for none.

    `canonical_names` is for whole checkpoints, of which it can tell how their names begin.
    """
    found = [_PREFIXES[0] + name.removeprefix(p) for p in _PREFIXES if name.startswith(p)]
    return next((candidate for candidate in (name, *found) if candidate in known), None)


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
