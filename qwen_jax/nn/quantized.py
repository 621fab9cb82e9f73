"""Weights kept in few bits: small integers or floats, with a scale for every group of inputs.

One layout serves every published format, so that the mathematics knows none of them. It is
output-major like a dense weight: rows are sliced and experts stacked as if it were one.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class QuantizedWeight:
    """A weight [..., out, in] in groups along its inputs: `scales * (values - zeros)`.

    A pytree whose arrays, `group_of` aside, share the axes [..., out]; numpy or JAX arrays.

    Attributes:
      values: 8 bits: int8 or uint8 [..., out, in]. 4 bits: uint8 [..., out, in / 2], two inputs a
        byte, the earlier one in the low half.
      scales: float [..., out, groups].
      zeros: uint8 [..., out, groups], what stands for 0; None where 0 does.
      group_of: int32 [..., in], the group of each input, the same for all rows; None when input i
        is in group i // group_size.
      bits: 4 or 8, of a value.
      group_size: inputs of a group; the last group may have fewer.
      float8: whether the uint8 values are the bits of float8_e4m3fn numbers, not integers. XLA on
        CPU has no arithmetic of that type: it widens an array of it to 16 bits before a slice is
        taken, for all layers ahead of their turn.
    """

    values: Array
    scales: Array
    zeros: Array | None
    group_of: Array | None
    bits: int = flax.struct.field(pytree_node=False)
    group_size: int = flax.struct.field(pytree_node=False)
    float8: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., out, in] of the weight that this stands for."""
        *rest, stored = self.values.shape
        return (*rest, stored * 8 // self.bits)

    @property
    def ndim(self) -> int:
        """Axes of the weight that this stands for."""
        return self.values.ndim

    @property
    def dtype(self) -> np.dtype:
        """Of the scales: the format's own precision."""
        return self.scales.dtype

    @property
    def typed_values(self) -> Array:
        """The values in the dtype of what they are; a view of the same bits."""
        return self.values.view(jnp.float8_e4m3fn) if self.float8 else self.values

    @property
    def nbytes(self) -> int:
        """Memory of all its arrays."""
        return sum(array.nbytes for array in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> "QuantizedWeight":
        """Experts or output rows, by what numpy would take for the axes [..., out].

        Raises:
          IndexError: the index reaches the inputs, which are packed.
        """
        index = index if isinstance(index, tuple) else (index,)
        if len(index) >= self.ndim or any(part is None or part is ... for part in index):
            raise IndexError(f"{len(index)} indices for the leading axes of {self.shape}")
        group_of = self.group_of
        return self.replace(
            values=self.values[index],
            scales=self.scales[index],
            zeros=None if self.zeros is None else self.zeros[index],
            group_of=None if group_of is None else group_of[index[: self.ndim - 2]],
        )


def dequantize(weight: QuantizedWeight, dtype: jnp.dtype) -> Array:
    """The dense weight [..., out, in] in `dtype`, computed in float32 and rounded once.

    With numpy arrays numpy computes it, else JAX.
    """
    xp = weight.values.__array_namespace__()
    values = weight.typed_values
    if weight.bits == 4:
        # Elementwise, which compilers vectorise; interleaving two arrays takes five times as long.
        shifts = xp.arange(weight.shape[-1], dtype=np.uint8) % 2 * np.uint8(4)
        values = (xp.repeat(values, 2, axis=-1) >> shifts) & 15
    values = values.astype(jnp.float32)
    if weight.zeros is not None:
        values = values - _per_input(weight, weight.zeros.astype(jnp.float32))
    return (values * _per_input(weight, weight.scales.astype(jnp.float32))).astype(dtype)


def _per_input(weight: QuantizedWeight, per_group: Array) -> Array:
    """[..., out, groups] -> [..., out, in]."""
    xp = per_group.__array_namespace__()
    if weight.group_of is not None:
        return xp.take_along_axis(per_group, weight.group_of[..., None, :], axis=-1)
    return xp.repeat(per_group, weight.group_size, axis=-1)[..., : weight.shape[-1]]


def quantize(weight: np.ndarray, bits: int, group_size: int = 128) -> QuantizedWeight:
    """Rounds a dense weight [..., out, in] to the nearest of few values, group by group.

    With 8 bits the largest magnitude of a group becomes 127 and zero stays zero, so that there are
    no zeros to store. With 4 bits sixteen values spread over the group's own range, widened to
    include 0: of the 16, a symmetric grid wastes one and half of a lopsided group's rest.

    Args:
      weight: float numpy array, finite; with 4 bits the number of inputs is even.
      bits: 4 or 8.
      group_size: inputs that share a scale; the last group takes what is left.

    Returns:
      numpy arrays, scales in float32.
    """
    if bits not in (4, 8) or (bits == 4 and weight.shape[-1] % 2):
        raise ValueError(f"{bits} bits for a weight of shape {weight.shape}")
    group_size = min(group_size, weight.shape[-1])
    padding = -weight.shape[-1] % group_size
    # Zeros change neither end of a range that includes 0.
    padded = np.pad(weight.astype(np.float32), [(0, 0)] * (weight.ndim - 1) + [(0, padding)])
    groups = padded.reshape(*weight.shape[:-1], -1, group_size)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    if bits == 8:
        scales, zeros = np.maximum(-low, high) / np.float32(127), None
    else:
        scales = (high - low) / np.float32(15)
    # A group of zeros, or of numbers too small to divide by, is kept as zeros.
    scales = np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)
    codes = np.rint(groups / scales[..., None])
    if bits == 4:
        zeros = np.rint(-low / scales).astype(np.uint8)
        codes = np.clip(codes + zeros[..., None], 0, 15)
    codes = codes.reshape(padded.shape)[..., : weight.shape[-1]]
    codes = codes.astype(np.int8 if bits == 8 else np.uint8)
    return QuantizedWeight(
        values=codes if bits == 8 else pack_nibbles(codes),
        scales=scales,
        zeros=zeros,
        group_of=None,
        bits=bits,
        group_size=group_size,
    )


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 codes below 16 [..., n] -> bytes [..., n / 2], the earlier of two in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4
