"""The rotary settings of config.json: `rope_scaling` or `rope_parameters` <-> `RopeSpec`."""

import dataclasses
import json
import math
import warnings
from typing import Any

from qwen_jax.config import RopeKind, RopeSpec
from qwen_jax.errors import UserError
from qwen_jax.json_fields import Fields, disagreement, shown

# What each kind reads besides its name and base; anything else in the dict is refused.
_ROPE_OPTIONS = {
    RopeKind.DEFAULT: (),
    RopeKind.LINEAR: ("factor",),
    RopeKind.DYNAMIC: ("factor",),
    RopeKind.YARN: ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
                    "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}  # fmt: skip


def read_rope(
    fields: Fields, max_position_embeddings: int, partial_rotary_factor: float | None = None
) -> RopeSpec:
    """Takes the rotary settings out of `fields`, in either layout; two that disagree are refused.

    Args:
      fields: of config.json.
      max_position_embeddings: the declared length.
      partial_rotary_factor: default share of rotated channels in a model that may rotate a part;
        None for one that rotates all.

    Raises:
      UserError: as `read_rope_parameters`.
    """
    given = [fields.values.get(name) for name in ("rope_parameters", "rope_scaling")]
    elsewhere = any(isinstance(value, dict) and value.get("rope_theta") for value in given)
    if fields.values.get("rope_theta", 0) is None and not elsewhere:
        raise fields.refuse("rope_theta", None, "give the base, or remove the field for 10000")
    theta = fields.take("rope_theta", "number")
    parameters = fields.take("rope_parameters", "object", {})
    scaling = fields.take("rope_scaling", "object", {})
    if parameters and scaling:
        base = {"rope_theta": theta or 10_000.0}
        if {**base, **parameters} != {**base, **scaling}:
            found = {"rope_parameters": parameters, "rope_scaling": scaling}
            raise UserError(f"{fields.source}: {disagreement(found)}")
    source = fields.source
    if parameters or scaling:
        source += ": rope_parameters" if parameters else ": rope_scaling"
    parameters = parameters or scaling
    named = {
        "rope_theta": theta,
        "rope_theta in rope_parameters": parameters.get("rope_theta"),
    }
    thetas = {name: value for name, value in named.items() if value is not None}
    thetas = thetas or {"rope_theta": 10_000.0}
    theta = next(iter(thetas.values()))
    # Qwen1's name for the base, which CodeQwen1.5 repeats; transformers does not read it.
    qwen1_theta = fields.take("rotary_emb_base", "number")
    if qwen1_theta is not None:
        thetas["rotary_emb_base"] = qwen1_theta
    if any(value != theta for value in thetas.values()):
        raise UserError(f"{fields.source}: {disagreement(thetas)}")
    # transformers gives a trained length at the top of the file precedence over the nested one.
    original = fields.take("original_max_position_embeddings", "integer")
    kind = parameters.get("rope_type", parameters.get("type"))
    if original is not None and kind == RopeKind.YARN:
        parameters = {**parameters, "original_max_position_embeddings": original}
    if partial_rotary_factor is not None:
        shares = {
            "partial_rotary_factor": fields.take("partial_rotary_factor", "number"),
            "partial_rotary_factor in rope_parameters": parameters.get("partial_rotary_factor"),
        }
        shares = {name: value for name, value in shares.items() if value is not None}
        if len(set(shares.values())) > 1:
            raise UserError(f"{fields.source}: {disagreement(shares)}")
        partial_rotary_factor = next(iter(shares.values()), partial_rotary_factor)
    return read_rope_parameters(
        parameters, theta, max_position_embeddings, source, partial_rotary_factor
    )


def read_rope_parameters(
    parameters: dict[str, Any],
    theta: float,
    max_position_embeddings: int,
    source: str,
    partial_rotary_factor: float | None = None,
) -> RopeSpec:
    """Reads the dict that config.json holds as `rope_scaling` or `rope_parameters`.

    Args:
      parameters: `rope_type` (or `type`) and its options; `rope_theta` overrides `theta`.
      theta: base of the frequencies.
      max_position_embeddings: the declared length, which `dynamic` scales from, and which `yarn`
        takes, with a warning, when `original_max_position_embeddings` is absent.
      source: names the dict in errors.
      partial_rotary_factor: share of rotated channels of a model that may rotate a part, which the
        dict may repeat; None for one that rotates all.

    Raises:
      UserError: unknown kind, or an option that the kind does not have.
    """
    options = Fields(parameters, source)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UserError(
            f"{source}: rope parameters by layer type are not supported: {shown(parameters)}"
        )
    names = {
        name: options.take(name, "string", "default")
        for name in ("rope_type", "type")
        if name in parameters
    }
    if len(set(names.values())) > 1:
        raise UserError(f"{source}: {disagreement(names)}")
    name = next(iter(names.values()), "default")
    if name not in tuple(_ROPE_OPTIONS):
        raise UserError(
            f"{source}: rope_type = {shown(name)} is not supported; known: "
            f"{', '.join(_ROPE_OPTIONS)}"
        )
    kind = RopeKind(name)
    theta = float(options.take("rope_theta", "number", theta))
    if theta <= 0:
        raise UserError(f"{source}: rope_theta = {theta} must be positive")
    share = 1.0 if partial_rotary_factor is None else partial_rotary_factor
    if options.take("partial_rotary_factor", "number", share) != share:
        raise options.refuse(
            "partial_rotary_factor", parameters["partial_rotary_factor"], f"only {share} is"
        )
    section = None
    if partial_rotary_factor is not None:
        section = options.take("mrope_section", "list of integers")
        # How the sections alternate is for pictures; on text they are all alike.
        options.take("mrope_interleaved", "boolean")
    unread = [
        name
        for name, value in options.values.items()
        if value is not None and name not in _ROPE_OPTIONS[kind]
    ]
    if unread:
        raise options.refuse(
            unread[0], parameters[unread[0]], f"rope_type {kind.value} does not read it; remove it"
        )
    return dataclasses.replace(
        _ROPE_READERS[kind](options, theta, max_position_embeddings),
        partial_rotary_factor=float(share),
        mrope_section=None if section is None else tuple(section),
    )


def _read_default(options: Fields, theta: float, max_position_embeddings: int) -> RopeSpec:
    del options, max_position_embeddings
    return RopeSpec(theta=theta)


def _read_linear(options: Fields, theta: float, max_position_embeddings: int) -> RopeSpec:
    del max_position_embeddings
    return RopeSpec(theta=theta, kind=RopeKind.LINEAR, factor=_read_factor(options))


def _read_dynamic(options: Fields, theta: float, max_position_embeddings: int) -> RopeSpec:
    return RopeSpec(
        theta=theta,
        kind=RopeKind.DYNAMIC,
        factor=_read_factor(options),
        original_max_position_embeddings=max_position_embeddings,
    )


def _read_yarn(options: Fields, theta: float, max_position_embeddings: int) -> RopeSpec:
    """YaRN (arXiv 2309.00071) with the options of transformers, where 0 counts as not given."""
    original = options.take("original_max_position_embeddings", "integer")
    trained = max_position_embeddings if original is None else original
    if trained < 1:
        raise options.refuse("original_max_position_embeddings", trained, "at least 1 is needed")
    if "factor" in options.values and options.values["factor"] is None:
        factor = max_position_embeddings / trained
    else:
        factor = _read_factor(options)
    attention_factor = options.take("attention_factor", "number")
    mscale = options.take("mscale", "number")
    mscale_all_dim = options.take("mscale_all_dim", "number")
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
        else:
            attention_factor = _mscale(factor, 1.0)
    betas = {}
    for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        betas[name] = float(options.take(name, "number") or default)
        if betas[name] < 0:
            raise options.refuse(name, betas[name], "a positive number is needed")
    if theta <= 1:
        raise options.refuse("rope_theta", theta, "yarn needs a base above 1")
    if original is None:
        warnings.warn(
            f"{options.source}: yarn without original_max_position_embeddings takes "
            f"max_position_embeddings = {trained}, as transformers does; the Qwen cards mean the "
            "trained length, 32768",
            stacklevel=2,
        )
    return RopeSpec(
        theta=theta,
        kind=RopeKind.YARN,
        factor=factor,
        original_max_position_embeddings=trained,
        attention_factor=float(attention_factor),
        **betas,
        # transformers takes null for false here.
        truncate=options.take("truncate", "boolean", "truncate" not in options.values),
    )


_ROPE_READERS = {
    RopeKind.DEFAULT: _read_default,
    RopeKind.LINEAR: _read_linear,
    RopeKind.DYNAMIC: _read_dynamic,
    RopeKind.YARN: _read_yarn,
}


def _mscale(factor: float, coefficient: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def _read_factor(options: Fields) -> float:
    factor = float(options.require("factor", "number"))
    if factor <= 0:
        raise options.refuse("factor", factor, "a positive number is needed")
    return factor


def parse_rope_flag(text: str) -> dict[str, Any] | None:
    """The `--rope` of a command line as the dict that config.json would hold.

    Args:
      text: `none`, or `KIND[:FACTOR][,option=value...]` such as `yarn:4,original=32768`; `original`
        is short for `original_max_position_embeddings`. Empty means the checkpoint's own.

    Returns:
      None for the checkpoint's own.

    Raises:
      UserError: the text has another form, or holds what `read_rope_parameters` refuses of every
        model.
    """
    if not text:
        return None
    if text == "none":
        return {"rope_type": RopeKind.DEFAULT.value}
    head, *rest = text.split(",")
    kind, _, factor = head.partition(":")
    if kind not in tuple(_ROPE_OPTIONS):
        raise UserError(
            f"--rope={text}: kind {kind!r} is unknown; known: {', '.join(_ROPE_OPTIONS)}"
        )
    parameters: dict[str, Any] = {"rope_type": kind}
    if factor:
        parameters["factor"] = _parsed(factor)
    for option in rest:
        name, equals, value = option.partition("=")
        name = "original_max_position_embeddings" if name == "original" else name
        if not equals:
            raise UserError(f"--rope={text}: {option!r} should be option=value")
        if name in parameters:
            raise UserError(f"--rope={text}: {name} is given twice; keep one")
        parameters[name] = _parsed(value)
    with warnings.catch_warnings():
        # Read again for the model, whose lengths and share of rotated channels are not known here.
        warnings.simplefilter("ignore")
        share = parameters.get("partial_rotary_factor")
        read_rope_parameters(parameters, 10_000.0, 1, f"--rope={text}", share)
    return parameters


def _parsed(value: str) -> Any:
    # What is no number or boolean stays text, and the reader of the option refuses it by name.
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, int | float) else value


def write_rope_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json that reads back as `rope`; null for unscaled RoPE.

    The share of rotated channels has a field of its own.
    """
    scaling: dict[str, Any] = {}
    match rope.kind:
        case RopeKind.LINEAR | RopeKind.DYNAMIC:
            scaling = {"rope_type": rope.kind.value, "factor": rope.factor}
        case RopeKind.YARN:
            scaling = {
                "rope_type": "yarn",
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_max_position_embeddings,
                "attention_factor": rope.attention_factor,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                "truncate": rope.truncate,
            }
    if rope.mrope_section is not None:
        scaling = {"rope_type": rope.kind.value, **scaling}
        scaling["mrope_section"] = list(rope.mrope_section)
    return scaling or None
