"""The rotary settings of config.json: `rope_scaling` or `rope_parameters` <-> `RopeSpec`."""

import dataclasses
import math
import warnings
from typing import Any

from qwen_jax.config import RopeKind, RopeSpec
from qwen_jax.errors import UserError
from qwen_jax.json_fields import Fields, disagreement, shown

_YARN_RAMP = ("original_max_position_embeddings", "beta_fast", "beta_slow")
_YARN = ("factor", *_YARN_RAMP, "attention_factor", "mscale", "mscale_all_dim")
# What each `rope_type` reads besides its base; anything else in the dict is refused. Those that
# transformers does not know are refused by it.
ROPE_OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor",),
    "stepped_ntk": ("original_max_position_embeddings",),
    "ntk_by_parts": ("factor", *_YARN_RAMP, "truncate"),
    "yarn": (*_YARN, "truncate"),
    "yarn_by_rotations": _YARN,
    "dynamic_yarn": (*_YARN_RAMP, "truncate"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor",
                 "long_factor"),
    "proportional": ("factor", "partial_rotary_factor"),
}  # fmt: skip
# Before any of these: with wavelengths rounded. By itself it is of the default.
_RESONANCE = "resonance"


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
    if original is not None and "original_max_position_embeddings" in _options(kind):
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
    if not is_known(name):
        raise UserError(
            f"{source}: rope_type = {shown(name)} is not supported; known: {known_names()}"
        )
    base, resonance = _without_resonance(name)
    theta = float(options.take("rope_theta", "number", theta))
    if theta <= 0:
        raise UserError(f"{source}: rope_theta = {theta} must be positive")
    share = 1.0 if partial_rotary_factor is None else partial_rotary_factor
    given = options.take("partial_rotary_factor", "number", share)
    if base == "proportional":
        if not 0 <= given <= 1:
            raise options.refuse("partial_rotary_factor", given, "a share from 0 to 1 is needed")
        share = given
    elif given != share:
        raise options.refuse("partial_rotary_factor", given, f"only {share} is")
    section = None
    if partial_rotary_factor is not None:
        section = options.take("mrope_section", "list of integers")
        # How the sections alternate is for pictures; on text they are all alike.
        options.take("mrope_interleaved", "boolean")
    unread = [
        option
        for option, value in options.values.items()
        if value is not None and option not in _options(name)
    ]
    if unread:
        raise options.refuse(
            unread[0], parameters[unread[0]], f"rope_type {name} does not read it; remove it"
        )
    return dataclasses.replace(
        _read_kind(base, options, theta, max_position_embeddings),
        partial_rotary_factor=float(share),
        mrope_section=None if section is None else tuple(section),
        resonance=resonance,
    )


def _without_resonance(name: str) -> tuple[str, bool]:
    """A `rope_type` without its prefix, and whether it had it."""
    base = name.removeprefix(_RESONANCE)
    return base.removeprefix("_") or "default", base != name


def is_known(name: Any) -> bool:
    """Whether a `rope_type` of config.json is read."""
    return name == _RESONANCE or (
        isinstance(name, str) and name.removeprefix(f"{_RESONANCE}_") in ROPE_OPTIONS
    )


def known_names() -> str:
    """What `rope_type` can be, for errors."""
    return f"{', '.join(ROPE_OPTIONS)}, and each behind {_RESONANCE}_"


def _options(name: Any) -> tuple[str, ...]:
    """What a `rope_type` reads; nothing for one that is not known."""
    return ROPE_OPTIONS[_without_resonance(name)[0]] if is_known(name) else ()


def _read_kind(name: str, options: Fields, theta: float, max_position_embeddings: int) -> RopeSpec:
    match name:
        case "default":
            return RopeSpec(theta=theta)
        case "linear" | "ntk":
            return RopeSpec(theta=theta, kind=RopeKind(name), factor=_read_factor(options))
        case "proportional":
            factor = _read_factor(options) if options.values.get("factor") is not None else 1.0
            return RopeSpec(theta=theta, kind=RopeKind.PROPORTIONAL, factor=factor)
        case "dynamic":
            return RopeSpec(
                theta=theta,
                kind=RopeKind.DYNAMIC,
                factor=_read_factor(options),
                original_max_position_embeddings=max_position_embeddings,
            )
        case "stepped_ntk":
            trained = _read_original(name, options, max_position_embeddings)
            return RopeSpec(
                theta=theta,
                kind=RopeKind.STEPPED_NTK,
                original_max_position_embeddings=trained,
            )
        case "longrope":
            return _read_longrope(options, theta, max_position_embeddings)
        case _:
            return _read_by_parts(name, options, theta, max_position_embeddings)


def _read_original(name: str, options: Fields, max_position_embeddings: int) -> int:
    """The trained length, the declared one where it is not given."""
    original = options.take("original_max_position_embeddings", "integer")
    trained = max_position_embeddings if original is None else original
    if trained < 1:
        raise options.refuse("original_max_position_embeddings", trained, "at least 1 is needed")
    if original is None:
        warnings.warn(
            f"{options.source}: {name} without original_max_position_embeddings takes "
            f"max_position_embeddings = {trained}, as transformers does; the Qwen cards mean the "
            "trained length, 32768",
            stacklevel=2,
        )
    return trained


def _read_by_parts(
    name: str, options: Fields, theta: float, max_position_embeddings: int
) -> RopeSpec:
    """YaRN (arXiv 2309.00071) and what is of its kind, options as in transformers, 0 for none."""
    if theta <= 1:
        raise options.refuse("rope_theta", theta, f"{name} needs a base above 1")
    trained = _read_original(name, options, max_position_embeddings)
    if name == "dynamic_yarn":
        factor = 1.0
    elif (
        name.startswith("yarn") and "factor" in options.values and options.values["factor"] is None
    ):
        factor = max_position_embeddings / trained
    else:
        factor = _read_factor(options)
    slow, fast = "beta_slow", "beta_fast"
    betas = {}
    if name == "llama3":
        for own, field in (("low_freq_factor", slow), ("high_freq_factor", fast)):
            betas[field] = float(options.require(own, "number"))
        if not 0 < betas[slow] < betas[fast]:
            raise options.refuse(
                "low_freq_factor", betas[slow], f"above 0 and below {betas[fast]} is needed"
            )
    else:
        for field, default in ((fast, 32.0), (slow, 1.0)):
            betas[field] = float(options.take(field, "number") or default)
            if betas[field] < 0:
                raise options.refuse(field, betas[field], "a positive number is needed")
    by_rotations = name in ("llama3", "yarn_by_rotations")
    if by_rotations and betas[slow] == betas[fast]:
        raise options.refuse(slow, betas[slow], "another number than beta_fast is needed")
    has_temperature = name in ("yarn", "yarn_by_rotations")
    return RopeSpec(
        theta=theta,
        kind=RopeKind.DYNAMIC_YARN if name == "dynamic_yarn" else RopeKind.YARN,
        factor=factor,
        original_max_position_embeddings=trained,
        attention_factor=_read_temperature(options, factor) if has_temperature else 1.0,
        **betas,
        by_rotations=by_rotations,
        # transformers takes null for false here.
        truncate=options.take("truncate", "boolean", "truncate" not in options.values),
    )


def _read_temperature(options: Fields, factor: float) -> float:
    attention_factor = options.take("attention_factor", "number")
    mscale = options.take("mscale", "number")
    mscale_all_dim = options.take("mscale_all_dim", "number")
    if attention_factor is None:
        if mscale and mscale_all_dim:
            return _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
        return _mscale(factor, 1.0)
    return float(attention_factor)


def _read_longrope(options: Fields, theta: float, max_position_embeddings: int) -> RopeSpec:
    """LongRoPE (arXiv 2402.13753) with the options of transformers."""
    trained = _read_original("longrope", options, max_position_embeddings)
    factors = {}
    for name in ("short_factor", "long_factor"):
        values = options.require(name, "list of numbers")
        if not all(value > 0 for value in values):
            raise options.refuse(name, values, "positive numbers are needed")
        factors[f"{name}s"] = tuple(map(float, values))
    if options.values.get("factor") is None:
        options.take("factor", "number")
        factor = max_position_embeddings / trained
    else:
        factor = _read_factor(options)
    attention_factor = options.take("attention_factor", "number")
    if attention_factor is None:
        grown = factor > 1 and trained > 1
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(trained)) if grown else 1.0
    return RopeSpec(
        theta=theta,
        kind=RopeKind.LONGROPE,
        factor=factor,
        original_max_position_embeddings=trained,
        attention_factor=float(attention_factor),
        **factors,
    )


def _mscale(factor: float, coefficient: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def _read_factor(options: Fields) -> float:
    factor = float(options.require("factor", "number"))
    if factor <= 0:
        raise options.refuse("factor", factor, "a positive number is needed")
    return factor


def write_rope_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json that reads back as `rope`; null for unscaled RoPE.

    The share of rotated channels has a field of its own, but for that of turning pairs.
    """
    scaling: dict[str, Any] = {"rope_type": rope.kind.value}
    ramp = {
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
    match rope.kind:
        case RopeKind.LINEAR | RopeKind.NTK | RopeKind.DYNAMIC:
            scaling["factor"] = rope.factor
        case RopeKind.YARN if rope.by_rotations and rope.attention_factor == 1:
            scaling = {
                "rope_type": "llama3",
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_max_position_embeddings,
                "low_freq_factor": rope.beta_slow,
                "high_freq_factor": rope.beta_fast,
            }
        case RopeKind.YARN:
            scaling |= {"factor": rope.factor, **ramp, "attention_factor": rope.attention_factor}
            if rope.by_rotations:
                scaling["rope_type"] = "yarn_by_rotations"
            else:
                scaling["truncate"] = rope.truncate
        case RopeKind.STEPPED_NTK:
            original = rope.original_max_position_embeddings
            scaling["original_max_position_embeddings"] = original
        case RopeKind.DYNAMIC_YARN:
            scaling |= {**ramp, "truncate": rope.truncate}
        case RopeKind.LONGROPE:
            scaling |= {
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_max_position_embeddings,
                "attention_factor": rope.attention_factor,
                "short_factor": list(rope.short_factors),
                "long_factor": list(rope.long_factors),
            }
        case RopeKind.PROPORTIONAL:
            scaling |= {
                "factor": rope.factor,
                "partial_rotary_factor": rope.partial_rotary_factor,
            }
    if rope.resonance:
        is_default = rope.kind is RopeKind.DEFAULT
        name = scaling["rope_type"]
        scaling["rope_type"] = _RESONANCE if is_default else f"{_RESONANCE}_{name}"
    if rope.mrope_section is not None:
        scaling["mrope_section"] = list(rope.mrope_section)
    return None if scaling == {"rope_type": RopeKind.DEFAULT.value} else scaling
