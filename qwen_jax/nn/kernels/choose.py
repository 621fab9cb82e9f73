"""Attention by the device's kernel where one can, else by `attend` itself."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.nn.attend import FEW_QUERIES, Mask, attend, gradients_of_part
from qwen_jax.nn.int8_vectors import Vectors, dense
from qwen_jax.nn.kernels.cudnn import cudnn_attend, why_not_cudnn
from qwen_jax.nn.kernels.mosaic import LANES
from qwen_jax.nn.kernels.splash import splash_attend, splash_gradients_of_part, why_not_splash
from qwen_jax.sharding.axes import Layout

# Keys from which on a CPU passes over those that few queries do not see, a cache's empty slots;
# with more queries it does so always. Accelerators are faster than the loop over blocks.
_MANY_KEYS = 1024


class Choice(NamedTuple):
    """What computes a call of attention.

    Attributes:
      method: "splash" and "cudnn" are `splash_attend` and `cudnn_attend`; "auto" is `attend`,
        plain or block by block as it finds.
      reason: why it is not the platform's kernel; None where it is.
    """

    method: Literal["auto", "cudnn", "splash"]
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a device, and what is known of a call's arrays before it runs.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      compute_capability: of a GPU, such as 8.0 or 9.0.
      in_order: whether in every row query t and key t stand at slot t.
      keys_in_order: whether slots of keys follow each other, in every row.
      padding_last: whether in every row the keys that are no tokens come after all that are.
      interpret: whether to run TPU kernels in Pallas's interpreter, as without a TPU.
    """

    platform: str = "cpu"
    compute_capability: float = 0.0
    in_order: bool = False
    keys_in_order: bool = False
    padding_last: bool = False
    interpret: bool = False

    def choose(
        self,
        q: jax.Array | jax.ShapeDtypeStruct,
        k: Vectors | jax.ShapeDtypeStruct,
        mask: Mask,
        needs_lse: bool = True,
    ) -> Choice:
        """What computes a call.

        Args:
          q, k: [B, T, H, d] and [B, S, K, d] on one device; only shapes and dtypes are read.
          mask: of the call; what is there and what is not is read, and no numbers.
          needs_lse: whether the log-sum-exp is used.
        """
        T, S, d = q.shape[1], k.shape[1], q.shape[-1]
        if self.platform == "tpu":
            kernel, reason = "splash", why_not_splash(T, S, q.dtype, mask, self.keys_in_order)
            if T < LANES:
                reason = f"{T} queries do not fill a register"
        elif self.platform == "gpu":
            kernel = "cudnn"
            reason = why_not_cudnn(T, d, q.dtype, mask, self.in_order, self.compute_capability)
            if mask.key_valid is not None and not self.padding_last:
                reason = "padding may come before tokens"
            if needs_lse:
                reason = "the log-sum-exp would be rounded to 16 bits"
        else:
            return Choice("auto", f"there is no kernel for {self.platform}")
        return Choice("auto", reason) if reason else Choice(kernel)

    def attend(
        self,
        q: jax.Array,
        k: Vectors,
        v: Vectors,
        mask: Mask,
        scale: jax.Array | float | None = None,
        otherwise: Literal["auto", "blockwise"] = "auto",
        dtype: jnp.dtype | None = None,
        needs_lse: bool = True,
    ) -> tuple[jax.Array, jax.Array | None]:
        """`attend`, by the method `otherwise` where no kernel can; None for a sum not needed.

        The kernels read no int8: before them a layer's keys and values are written out.
        """
        match self.choose(q, k, mask, needs_lse).method:
            case "splash":
                return splash_attend(q, dense(k), dense(v), mask, scale, dtype, **self._promises)
            case "cudnn":
                return cudnn_attend(q, dense(k), dense(v), mask, scale, self.in_order), None
            case _:
                T, S = q.shape[1], k.shape[1]
                few = T <= FEW_QUERIES and S <= _MANY_KEYS
                if self.platform == "cpu" and not few and not self.in_order:
                    otherwise = "blockwise"
                return attend(q, k, v, mask, scale, otherwise, dtype, self.in_order)

    def gradients_of_part(self, q, k, v, mask: Mask, scale, results, cotangents):
        """`nn.attend.gradients_of_part`."""
        arguments = q, k, v, mask, scale, results, cotangents
        if self.choose(q, k, mask).method == "splash":
            return splash_gradients_of_part(*arguments, **self._promises)
        return gradients_of_part(*arguments)

    @property
    def _promises(self) -> dict[str, bool]:
        return {
            "in_order": self.in_order,
            "keys_in_order": self.keys_in_order,
            "interpret": self.interpret,
        }


# None of them: `attend` itself.
PLAIN = Kernels()


def kernels_on(layout: Layout | None) -> Kernels:
    """Those of the devices that a call runs on; None for JAX's default one."""
    if layout is not None and layout.platform != "gpu":
        return Kernels(layout.platform)
    device = jax.devices()[0] if layout is None else layout.mesh.devices.flat[0]
    return Kernels(device.platform, float(getattr(device, "compute_capability", 0)))
