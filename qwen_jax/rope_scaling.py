"""How a model reads beyond its length: another rotary scaling and attention in place of its own.

It is what `--rope` says on a command line and `load_pretrained` takes as `rope_scaling`: the dict
that config.json would hold, and beside it what of attention goes by lengths.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.config import DualChunkSpec, FarSpec, LayerKind, ModelConfig, RopeKind
from qwen_jax.errors import UserError
from qwen_jax.hf_rope import is_known, known_names, read_rope_parameters
from qwen_jax.json_fields import Fields, read_json_object

# What a scaling makes of a model's attention: fields of its config, from the config itself.
Change = Callable[[ModelConfig], dict[str, Any]]


def with_rope_scaling(config: ModelConfig, rope_scaling: dict[str, Any]) -> ModelConfig:
    """`config` with another rotary scaling, its base kept unless the dict gives one.

    Args:
      config: the model. Its Dual Chunk Attention goes along with its scaling.
      rope_scaling: the dict that config.json would hold. `rope_type` can also be one of these, all
        with unscaled frequencies, and lengths that go by the trained one if they are not given:
          dca: Dual Chunk Attention with `chunk_size`, `local_size` and `temperature` (whether
            scores grow with the logarithm of the text's length, as in Qwen2.5-1M).
          rerope: distances stand still from `window` on, or with `stretch` go on growing by 1 in so
            many tokens (leaky ReRoPE).
          self_extend: from `window` on distances are between groups of `factor` tokens.
          sinks: StreamingLLM, the first `sinks` tokens and a `window` of the last ones.
        Beside any other type `window` is how many tokens layers of full attention see, and
        `window_layers` how many of these layers, from the first on, all if not given. Beside any,
        `logn` is whether queries grow with the logarithm of their position past the trained length,
        as in Qwen1, or the length to take for that; if not given, as in the model.

    Raises:
      UserError: unknown kind, or an option that the kind does not have.
    """
    attention, parameters = _take_attention(rope_scaling, "rope_scaling")
    # Where only some pairs turn, all have a frequency.
    whole = config.rope.kind is RopeKind.PROPORTIONAL
    rope = read_rope_parameters(
        parameters,
        config.rope.theta,
        config.max_position_embeddings,
        "rope_scaling",
        1.0 if whole else config.rope.partial_rotary_factor,
    )
    kept = {name: getattr(config.rope, name) for name in ("mrope_section", "in_float32")}
    rope = dataclasses.replace(rope, **kept)
    changes = {"dual_chunk": None, "far": None}
    for change in attention:
        changes |= change(config)
    return dataclasses.replace(config, rope=rope, **changes)


def _take_attention(
    rope_scaling: dict[str, Any], source: str
) -> tuple[list[Change], dict[str, Any]]:
    """What a scaling makes of attention, and the rest, as config.json would hold it."""
    fields = Fields(rope_scaling, source)
    kind = fields.values.get("rope_type")
    original = fields.values.get("original_max_position_embeddings")
    changes = []
    if isinstance(kind, str) and kind in _ATTENTION_KINDS:
        fields.values["rope_type"] = RopeKind.DEFAULT.value
        changes.append(_ATTENTION_KINDS[kind](fields))
    return [*changes, _take_logn(fields, original), _take_window(fields)], fields.values


def _take_length(fields: Fields, name: str, least: int = 1) -> int | None:
    length = fields.take(name, "integer")
    if length is not None and length < least:
        raise fields.refuse(name, length, f"at least {least} is needed")
    return length


def _take_dual_chunk(fields: Fields) -> Change:
    original = _take_length(fields, "original_max_position_embeddings", 16)
    chunk, local = _take_length(fields, "chunk_size"), _take_length(fields, "local_size", 0)
    temperature = fields.take("temperature", "boolean", False)

    def change(config: ModelConfig) -> dict[str, Any]:
        trained = original or config.max_position_embeddings
        spec = DualChunkSpec(
            # As in the paper's code.
            chunk_size=3 * trained // 4 if chunk is None else chunk,
            local_size=trained // 16 if local is None else local,
            original_max_position_embeddings=trained if temperature else 0,
        )
        return {"dual_chunk": spec}

    return change


def _take_rerope(fields: Fields) -> Change:
    stretch = fields.take("stretch", "number")
    if stretch is not None and stretch < 1:
        raise fields.refuse("stretch", stretch, "at least 1 is needed")
    return _far(fields, stretch=None if stretch is None else float(stretch))


def _take_self_extend(fields: Fields) -> Change:
    factor = float(fields.require("factor", "number"))
    if factor < 1:
        raise fields.refuse("factor", factor, "at least 1 is needed")
    return _far(fields, stretch=factor, whole=True)


def _take_sinks(fields: Fields) -> Change:
    sinks = _take_length(fields, "sinks")
    return _far(fields, sinks=4 if sinks is None else sinks)


def _far(fields: Fields, **settings: Any) -> Change:
    original = _take_length(fields, "original_max_position_embeddings", 16)
    window = _take_length(fields, "window")

    def change(config: ModelConfig) -> dict[str, Any]:
        trained = original or config.max_position_embeddings
        # Distances of both branches together are at most the trained ones.
        sinks = settings.get("sinks", 0)
        return {"far": FarSpec(window or (trained - sinks if sinks else trained // 2), **settings)}

    return change


_ATTENTION_KINDS: dict[str, Callable[[Fields], Change]] = {
    "dca": _take_dual_chunk,
    "rerope": _take_rerope,
    "self_extend": _take_self_extend,
    "sinks": _take_sinks,
}


def _take_logn(fields: Fields, original: int | None) -> Change:
    logn = fields.take("logn", "anything")
    if logn is not None and type(logn) is not bool and (type(logn) is not int or logn < 2):
        raise fields.refuse("logn", logn, "give true, false or a length of at least 2")

    def change(config: ModelConfig) -> dict[str, Any]:
        if logn is None:
            return {}
        own = original or config.logn_length or config.max_position_embeddings
        return {"logn_length": (own if logn else None) if type(logn) is bool else logn}

    return change


def _take_window(fields: Fields) -> Change:
    window, layers = _take_length(fields, "window"), _take_length(fields, "window_layers")
    if window is None and layers is not None:
        raise fields.refuse("window_layers", layers, "give a window beside it")

    def change(config: ModelConfig) -> dict[str, Any]:
        if window is None:
            return {}
        kinds = list(config.layer_types)
        full = [i for i, kind in enumerate(kinds) if kind is LayerKind.FULL_ATTENTION]
        if not full or (layers or 1) > len(full):
            raise UserError(
                f"rope_scaling: window_layers = {layers or 'all'}, but the model has {len(full)} "
                "layers of full attention"
            )
        for i in full[:layers]:
            kinds[i] = LayerKind.SLIDING_ATTENTION
        return {"layer_types": tuple(kinds), "sliding_window": window}

    return change


def parse_rope_flag(text: str) -> dict[str, Any] | None:
    """The `--rope` of a command line as a dict for `with_rope_scaling`.

    Args:
      text: `KIND[:FACTOR][,option=value...]` such as `yarn:4,original=32768`, or `none` for the
        default kind; `original` is short for `original_max_position_embeddings`, and
        `factors=FILE` stands for what a JSON file has, such as LongRoPE's lists. Empty means the
        checkpoint's own.

    Returns:
      None for the checkpoint's own.

    Raises:
      UserError: the text has another form, its file is no JSON object, or it holds what
        `with_rope_scaling` refuses of every model.
    """
    if not text:
        return None
    head, *rest = text.split(",")
    kind, _, factor = head.partition(":")
    kind = RopeKind.DEFAULT.value if kind == "none" else kind
    if kind not in _ATTENTION_KINDS and not is_known(kind):
        known = f"none, {', '.join(_ATTENTION_KINDS)}, {known_names()}"
        raise UserError(f"--rope={text}: kind {kind!r} is unknown; known: {known}")
    parameters: dict[str, Any] = {"rope_type": kind}
    if factor:
        parameters["factor"] = _parsed(factor)
    for option in rest:
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--rope={text}: {option!r} should be option=value")
        name = "original_max_position_embeddings" if name == "original" else name
        given = read_json_object(Path(value)) if name == "factors" else {name: _parsed(value)}
        twice = sorted(given.keys() & parameters.keys())
        if twice:
            raise UserError(f"--rope={text}: {twice[0]} is given twice; keep one")
        parameters |= given
    with warnings.catch_warnings():
        # Read again for the model, whose lengths and share of rotated channels are not known here.
        warnings.simplefilter("ignore")
        share = parameters.get("partial_rotary_factor")
        _, scaling = _take_attention(parameters, f"--rope={text}")
        read_rope_parameters(scaling, 10_000.0, 1, f"--rope={text}", share)
    return parameters


def _parsed(value: str) -> Any:
    # What is no number or boolean stays text, and the reader of the option refuses it by name.
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, int | float) else value
