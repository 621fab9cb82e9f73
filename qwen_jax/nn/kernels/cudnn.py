"""Attention on NVIDIA GPUs by cuDNN, which knows masks of few kinds.

They are those of a text from its start, causal, and of one query at the end of its text, as in
decoding. Keys that are no tokens may only come after all that are.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from qwen_jax.nn.attend import Mask


def why_not_cudnn(
    T: int,
    head_dim: int,
    dtype: jnp.dtype,
    mask: Mask,
    in_order: bool,
    compute_capability: float,
) -> str | None:
    """Why `cudnn_attend` cannot be used, or None where it can.

    Args:
      T: queries in a row.
      head_dim: of queries, keys and values.
      dtype: of all three.
      mask: as for `attend`.
      in_order: whether in every row query t and key t stand at slot t.
      compute_capability: of the GPU, such as 8.0 or 9.0.
    """
    largest = 256 if compute_capability >= 9.0 else 128
    if compute_capability < 8.0:
        return f"compute capability {compute_capability} is below 8.0"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {jnp.dtype(dtype).name} is not one of 16 bits"
    if head_dim % 8 or head_dim > largest:
        return f"head_dim {head_dim} is no multiple of 8 up to {largest}"
    if mask.relation is not None:
        return "the mask has groups"
    if mask.query_segments is not None:
        return "the mask has segments"
    if not in_order and T > 1:
        return "queries do not all stand at the slots of their own places"
    if mask.key_slots is not None and not in_order:
        return "keys stand at slots of their own"
    if mask.window is not None and not in_order:
        return "a window ends at a query's slot, which is not its place"
    if mask.window is not None and mask.key_valid is not None:
        return "a window together with padding"
    return None


def cudnn_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: jax.Array | float | None = None,
    in_order: bool = False,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`attend` without the log-sum-exp, which cuDNN's JAX interface rounds to 16 bits.

    Queries are rounded once more, after they are scaled, where scales differ.

    Args:
      q, k, v, scale: as for `attend`.
      mask: one for which `why_not_cudnn` has no reason. Keys that are no tokens come last.
      in_order: whether in every row query t and key t stand at slot t; otherwise there is one
        query, and it sees the keys up to its slot.
      implementation: "xla" is what the same arguments mean on any platform.

    Returns:
      [B, T, H, d] in q's dtype; zeros for queries that see no key.
    """
    if isinstance(scale, jax.Array):
        scale = jnp.broadcast_to(scale, q.shape[:2])[..., None, None]
        q, scale = (q * scale).astype(q.dtype), 1.0
    lengths = None
    if mask.key_valid is not None:
        lengths = mask.key_valid.sum(axis=1, dtype=jnp.int32)
    if not in_order:
        seen = jnp.clip(mask.query_slots[:, 0] + 1, 0, k.shape[1]).astype(jnp.int32)
        lengths = seen if lengths is None else jnp.minimum(lengths, seen)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=in_order,
        # Of no keys there is no softmax.
        key_value_seq_lengths=None if lengths is None else jnp.maximum(lengths, 1),
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation=implementation,
    )
    if lengths is None:
        return out
    return jnp.where((lengths > 0)[:, None, None, None], out, 0)
