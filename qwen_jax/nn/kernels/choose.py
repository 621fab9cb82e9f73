"""Which function computes a call of attention: a kernel where one can, else `attend` itself."""

import dataclasses
from typing import Literal

import jax

from qwen_jax.nn.attend import Mask
from qwen_jax.nn.kernels.cudnn import why_not_cudnn
from qwen_jax.nn.kernels.mosaic import LANES
from qwen_jax.nn.kernels.splash import why_not_splash


@dataclasses.dataclass(frozen=True)
class Choice:
    """A function for a call of attention.

    Attributes:
      method: "splash" and "cudnn" are `splash_attend` and `cudnn_attend`; "auto" is `attend`,
        plain or block by block as it finds.
      reason: why it is not the platform's kernel; None where it is.
    """

    method: Literal["auto", "cudnn", "splash"]
    reason: str | None = None


def best_method(
    platform: str,
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    mask: Mask,
    in_order: bool = False,
    keys_in_order: bool = False,
    padding_last: bool = False,
    needs_lse: bool = False,
    compute_capability: float = 0.0,
) -> Choice:
    """The function for a call, from what is known before it runs.

    Args:
      platform: "cpu", "gpu" or "tpu".
      q, k: [B, T, H, d] and [B, S, K, d] on one device; only shapes and dtypes are read.
      mask: of the call; what is there and what is not is read, and no numbers.
      in_order: whether in every row query t and key t stand at slot t.
      keys_in_order: whether slots of keys follow each other and their groups do not decrease.
      padding_last: whether in every row the keys that are no tokens come after all that are.
      needs_lse: whether the log-sum-exp is used.
      compute_capability: of a GPU, such as 8.0 or 9.0.
    """
    T, S, d = q.shape[1], k.shape[1], q.shape[-1]
    if platform == "tpu":
        kernel, reason = "splash", why_not_splash(T, S, q.dtype, mask, keys_in_order)
        if T < LANES:
            reason = f"{T} queries do not fill a register"
    elif platform == "gpu":
        kernel, reason = "cudnn", why_not_cudnn(T, d, q.dtype, mask, in_order, compute_capability)
        if mask.key_valid is not None and not padding_last:
            reason = "padding may come before tokens"
        if needs_lse:
            reason = "the log-sum-exp would be rounded to 16 bits"
    else:
        return Choice("auto", f"there is no kernel for {platform}")
    return Choice("auto", reason) if reason else Choice(kernel)
