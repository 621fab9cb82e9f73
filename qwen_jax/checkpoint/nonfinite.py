"""NaN and infinite weights: found in one pass, then warned of or refused by name."""

import warnings
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen_jax.checkpoint.names import listed
from qwen_jax.errors import UserError

# The bits that NaN and infinities have all set; this float8 has no infinities.
_EXPONENTS = {
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}

# Values looked at in one go, so that the verdicts on them stay small beside the tensor.
_STEP = 1 << 20


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    flat = values.reshape(-1)
    if values.dtype in _EXPONENTS:
        bits, exponent = flat.view(f"u{values.itemsize}"), _EXPONENTS[values.dtype]
        pieces = (bits[i : i + _STEP] for i in range(0, bits.size, _STEP))
        return not any(((piece & exponent) == exponent).any() for piece in pieces)
    # One pass of BLAS; only its verdict "not finite" can be wrong, by overflow.
    with np.errstate(all="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return True
    return all(np.isfinite(flat[i : i + _STEP]).all() for i in range(0, flat.size, _STEP))


def report_nonfinite(directory: Path, names: list[str], dtype: np.dtype, allowed: bool) -> None:
    """Warns of the tensors `names`, found not to be finite as `dtype`, or refuses them.

    Raises:
      UserError: there are some, and they are not `allowed`.
    """
    if not names:
        return
    wider = "" if np.dtype(dtype) == np.float32 else ", or load it as float32"
    where = listed(sorted(set(names)))
    message = (
        f"{directory}: NaN or infinite values as {np.dtype(dtype).name} in {where}"
        f"; download it again{wider}"
    )
    if not allowed:
        raise UserError(message)
    warnings.warn(message, stacklevel=3)
