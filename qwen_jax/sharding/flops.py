"""Floating-point operations of a pass: by formula, and counted over a traced program.

Both count matrix products only, a multiplication and an addition as two, and both are of all
devices together. Letters: N tokens, D hidden size, H query heads, K key heads, d and e the sizes of
a key and a value, F feed-forward width, E experts of which a token meets k, V words.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from qwen_jax.config import HeadKind, LayerKind, ModelConfig

Mode = Literal["train", "prefill", "decode"]

# Tokens that linear attention takes at once, as `nn.delta_rule` does.
_CHUNK = 64


def analytic_flops(
    config: ModelConfig, mode: Mode, batch: int, length: int, remat: bool = False
) -> dict[str, float]:
    """Operations by part of the model, the least that the mathematics asks for.

    A forward pass over N tokens takes, in each layer that has it:

      * attention projections: 2 N D d (2 H + 2 K), and 2 N D d H for an output gate;
      * attention: 4 H d for each query and key that it sees: T (T + 1) / 2 pairs a row where a
        text of T is read, S pairs a row where one token follows S - 1 others; of a sliding window
        w, at most w keys a query;
      * linear attention: 2 N D (2 K d + 3 H e + 2 H) for its projections, H of them value heads;
        the rule 6 H d e a token, and in chunks of c = 64 tokens also
        c (4 K d + H (2 d + 4 e)) + 8 / 3 c^2 H for what happens inside a chunk;
      * feed-forward: 6 N D F;
      * experts: 2 N D E for the router, 6 N k D F, and for a shared one 6 N D F + 2 N D.

    The head takes 2 P D V for P positions: every token in training, else the last of each row.
    A gradient takes twice what the forward pass took; with `remat` the layers run forward twice.

    Args:
      config: of the model; a multi-token-prediction head does not run.
      mode: decode is one token a row.
      batch: rows.
      length: tokens of a row, in decode those that are seen, the new one included.
      remat: whether training computes the layers' activations again.
    """
    T = 1 if mode == "decode" else length
    N = batch * T
    parts: dict[str, float] = {}

    def add(part: str, flops: float) -> None:
        parts[part] = parts.get(part, 0) + flops

    for i, kind in enumerate(config.layer_types):
        if kind is LayerKind.LINEAR_ATTENTION:
            add("linear attention", _delta_flops(config, N, T))
        else:
            heads = config.num_attention_heads
            wide = 2 * (heads + config.num_key_value_heads) + heads * config.output_gate
            width = config.head_dim
            add("attention projections", 2 * N * config.hidden_size * width * wide)
            window = config.sliding_window if kind is LayerKind.SLIDING_ATTENTION else None
            add("attention", 4 * heads * width * batch * seen_pairs(mode, length, window))
        if config.moe is not None and i in config.moe.layers:
            add("router", 2 * N * config.hidden_size * config.moe.num_experts)
            width = config.moe.num_experts_per_tok * config.moe.intermediate_size
            if shared := config.moe.shared_intermediate_size:
                add("router", 2 * N * config.hidden_size)
                width += shared
            add("experts", 6 * N * config.hidden_size * width)
        else:
            add("feed-forward", 6 * N * config.hidden_size * config.intermediate_size)
    if mode == "train":
        parts = {part: (4 if remat else 3) * flops for part, flops in parts.items()}
    head = _head_flops(config, N if mode == "train" else batch)
    return {**parts, "head": 3 * head if mode == "train" else head}


def seen_pairs(mode: Mode, length: int, window: int | None = None) -> int:
    """How many pairs of a query and a key it sees a row has."""
    w = length if window is None else min(window, length)
    return w if mode == "decode" else w * length - w * (w - 1) // 2


def _delta_flops(config: ModelConfig, N: int, T: int) -> float:
    spec = config.delta
    H, K = spec.num_value_heads, spec.num_key_heads
    d, e = spec.key_head_dim, spec.value_head_dim
    flops = 2 * N * config.hidden_size * (2 * K * d + 3 * H * e + 2 * H) + 6 * N * H * d * e
    if T > 1:
        c = min(_CHUNK, 1 << (T - 1).bit_length())
        flops += N * (c * (4 * K * d + H * (2 * d + 4 * e)) + 8 / 3 * c * c * H)
    return flops


def _head_flops(config: ModelConfig, positions: int) -> float:
    D = config.hidden_size
    match config.head:
        case HeadKind.NONE:
            width = 0
        case HeadKind.VOCABULARY:
            width = config.vocab_size
        case HeadKind.TWO_LAYER_SCORE:
            width = D + config.num_labels
        case HeadKind.GUARD:
            inner = config.guard.inner_size
            return 2 * positions * inner * (2 * D + config.num_labels)
        case _:
            width = config.num_labels
    return 2 * positions * D * width


def count_flops(
    jaxpr: Any,
    turns: float | None = None,
    seen: float = 1.0,
    filled: float = 1.0,
    as_xla: bool = False,
) -> float:
    """Operations of the matrix products in a traced program, loops and all devices included.

    Args:
      jaxpr: as `jax.make_jaxpr(function)(*arguments)` gives it.
      turns: how often a loop runs whose number of turns depends on data, on average.
      seen: the share of pairs of queries and keys for which an attention kernel computes scores.
      filled: the share of rows of a product over groups that belong to a group, on average.
      as_xla: whether to count as XLA does, which sees nothing inside of attention kernels and, in
        products over groups, all rows, and for a gradient of weights all of them in each group.

    Raises:
      ValueError: there is a loop with a product in it that depends on data, and `turns` is None; or
        a kernel whose operations are not known.
    """
    return sum(
        _equation_flops(equation, _Counting(turns, seen, filled, as_xla))
        for equation in _open(jaxpr).eqns
    )


class _Counting(NamedTuple):
    """Arguments of `count_flops`."""

    turns: float | None
    seen: float
    filled: float
    as_xla: bool


def _equation_flops(equation: Any, how: _Counting) -> float:
    name, params = equation.primitive.name, equation.params
    operands = [v.aval for v in equation.invars]
    results = [v.aval for v in equation.outvars]
    match name:
        case "pallas_call":
            return 0 if how.as_xla else _kernel_flops(params["name"], operands, how.seen)
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            return 2 * results[0].size * math.prod(operands[0].shape[i] for i in contracted)
        case "ragged_dot_general":
            numbers = params["ragged_dot_dimension_numbers"]
            return _ragged_flops(numbers, operands, results[0], how)
        case "conv_general_dilated":
            kernel = operands[1]
            out_channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            return 2 * results[0].size * kernel.size // out_channels
        case "scan":
            return params["length"] * count_flops(params["jaxpr"], *how)
        case "while":
            return _while_flops(params, how)
        case "cond":
            branches = params["branches"]
            if platforms := params.get("branches_platforms"):
                # Of what has a form for CPUs of its own, the others'.
                branches = [branches[platforms.index(None)]]
            return max(count_flops(branch, *how) for branch in branches)
        case "shard_map":
            return params["mesh"].size * count_flops(params["jaxpr"], *how)
    return sum(count_flops(inner, *how) for inner in _inner(params))


# Products [queries, keys] by d of the attention kernels, from the starts of their names.
_KERNEL_PRODUCTS = {
    "splash_mha_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mha_dkv": 4,
    "ragged_paged_attention": 2,
}


def _kernel_flops(name: str, operands: list[Any], seen: float) -> float:
    """Of an attention kernel, from the shapes of queries and keys alone."""
    found = [count for start, count in _KERNEL_PRODUCTS.items() if name.startswith(start)]
    if not found:
        raise ValueError(f"how many operations the kernel {name} takes is not known; add it")
    if name.startswith("ragged_paged"):
        # Each row's pages [B, P], queries [B, H, d], and all pages [B * P, page, 2 K, d].
        table, q, pages = (next(x for x in operands if x.ndim == n) for n in (2, 3, 4))
        return 2 * found[0] * q.size * table.shape[1] * pages.shape[1] * seen
    # Behind tables of integers, with an axis more where rows run together: [H, T, d], [K, S, d].
    q, k, *_ = (x for x in operands if jnp.issubdtype(x.dtype, jnp.floating))
    return 2 * found[0] * q.size * k.shape[-2] * seen


def _ragged_flops(numbers: Any, operands: list[Any], result: Any, how: _Counting) -> float:
    """Each row of the first operand meets the matrix of its own group only."""
    (contracted, _), _ = numbers.dot_dimension_numbers
    flops = 2 * result.size * math.prod(operands[0].shape[i] for i in contracted)
    if how.as_xla:
        return flops
    # Where the rows are summed over, the result has a matrix for each group.
    is_summed = set(numbers.lhs_ragged_dimensions) & set(contracted)
    return how.filled * (flops // operands[2].shape[-1] if is_summed else flops)


def _while_flops(params: dict[str, Any], how: _Counting) -> float:
    once = count_flops(params["body_jaxpr"], *how._replace(turns=how.turns or 1))
    if once and how.turns is None:
        raise ValueError(
            "a loop with matrix products runs for a number of turns that depends on data; give "
            "`turns`, how often it does on average"
        )
    return once * (how.turns or 0)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation such as a call of a compiled function has inside."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_open(each), "eqns"):
                yield each


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def extrapolate(
    config: ModelConfig, segments: Sequence[Any], measure: Callable[[ModelConfig], float]
) -> float:
    """A figure of a model from models with one and with two repeats of its layers' patterns.

    For figures to which each repeat adds the same, and which the whole model is too large for, or
    has a loop over its layers for, of which XLA counts one turn.

    Args:
      config: of the model.
      segments: its layers as patterns that repeat, each with `start`, `period` and `repeats`.
      measure: the figure of a model with some of the layers.
    """

    def short(doubled: int | None) -> float:
        layers = []
        for i, segment in enumerate(segments):
            count = segment.period * (2 if i == doubled else 1)
            layers.extend(range(segment.start, segment.start + count))
        return measure(config.with_layers(layers))

    one = short(None)
    repeated = [i for i, segment in enumerate(segments) if segment.repeats > 1]
    return one + sum((segments[i].repeats - 1) * (short(i) - one) for i in repeated)
