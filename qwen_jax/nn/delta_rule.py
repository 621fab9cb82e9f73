"""Linear attention by the gated delta rule (arXiv 2412.06464): a state in place of a cache of keys.

Each value head keeps a matrix S [d, e] that maps keys to values. A token lets it fade, corrects
what it returns for the token's key, and reads it with the token's query:

    S <- exp(log_decay) S;  S <- S + k (beta (v - S^T k))^T;  out = S^T q

Letters here: K key heads, G value heads for each of them, d and e the sizes of a key and a value,
C channels, n chunks, c and the indices i, j, l tokens of a chunk.
"""

import functools

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.nn.linear import Linear, fetch_param
from qwen_jax.nn.norms import rms_norm

# Tokens whose chunks are prepared at once: bounds what that takes at [B, block, H, d] and the like.
_TOKEN_BLOCK = 2048

# The rule is float32 by contract, which accelerators otherwise shorten in matrix products.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@flax.struct.dataclass
class DeltaState:
    """What a linear-attention layer keeps between calls, of one size however long the text.

    Attributes:
      state: float32 [B, H, d, e], H = K * G value heads.
      conv_q, conv_k, conv_v: [B, taps - 1, C], each convolution's last inputs, oldest first.
    """

    state: jax.Array
    conv_q: jax.Array
    conv_k: jax.Array
    conv_v: jax.Array


def init_delta_state(config: ModelConfig, batch: int, dtype: jnp.dtype) -> DeltaState:
    """The state of `batch` rows before their first token; convolution inputs are of `dtype`."""
    spec = config.delta
    heads, d, e = spec.num_value_heads, spec.key_head_dim, spec.value_head_dim

    def inputs(channels: int) -> jax.Array:
        return jnp.zeros((batch, spec.conv_kernel_dim - 1, channels), dtype)

    return DeltaState(
        state=jnp.zeros((batch, heads, d, e), jnp.float32),
        conv_q=inputs(spec.num_key_heads * d),
        conv_k=inputs(spec.num_key_heads * d),
        conv_v=inputs(heads * e),
    )


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs the rule over T tokens: one token by itself, several in chunks, many in blocks of them.

    A token with `log_decay` and `beta` 0 leaves the state as it is.

    Args:
      q, k: [B, T, K, d], normalised here to length 1, queries then divided by sqrt(d).
      v: [B, T, H, e]; value head h reads key head h // (H / K).
      log_decay: float32 [B, T, H], finite and not above 0.
      beta: float32 [B, T, H], 0 to 1.
      state: float32 [B, H, d, e] before the first token.

    Returns:
      [B, T, H, e] in v's dtype, and the state after the last token.
    """
    T = q.shape[1]
    if T == 1:
        return recurrent_delta_rule(q, k, v, log_decay, beta, state)
    if T <= _TOKEN_BLOCK:
        return chunked_delta_rule(q, k, v, log_decay, beta, state)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -T % _TOKEN_BLOCK)] + [(0, 0)] * (x.ndim - 2))
        return einops.rearrange(x, "B (n t) ... -> n B t ...", t=_TOKEN_BLOCK)

    def step(state, block):
        out, state = chunked_delta_rule(*block, state)
        return state, out

    blocks = tuple(split(x) for x in (q, k, v, log_decay, beta))
    state, out = jax.lax.scan(step, state, blocks)
    return einops.rearrange(out, "n B t ... -> B (n t) ...")[:, :T], state


def recurrent_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`gated_delta_rule` token by token, as it is defined."""
    K, dtype = q.shape[2], v.dtype
    q, k = _normalise(q, k)
    v, log_decay, beta = (
        einops.rearrange(x.astype(jnp.float32), "B T (K G) ... -> B T K G ...", K=K)
        for x in (v, log_decay, beta)
    )
    state = einops.rearrange(state, "B (K G) d e -> B K G d e", K=K)

    def step(state, token):
        q, k, v, log_decay, beta = token
        state = state * jnp.exp(log_decay)[..., None, None]
        correction = beta[..., None] * (v - _einsum("BKGde,BKd->BKGe", state, k))
        state = state + _einsum("BKd,BKGe->BKGde", k, correction)
        return state, _einsum("BKGde,BKd->BKGe", state, q)

    tokens = (q, k, v, log_decay, beta)
    if q.shape[1] == 1:
        state, out = step(state, jax.tree.map(lambda x: x[:, 0], tokens))
        out = out[:, None]
    else:
        state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), tokens))
        out = out.swapaxes(0, 1)
    out = einops.rearrange(out, "B T K G e -> B T (K G) e")
    return out.astype(dtype), einops.rearrange(state, "B K G d e -> B (K G) d e")


def chunked_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """`gated_delta_rule` in matrix products, `chunk` tokens at once (arXiv 2412.06464, sec. 3.3).

    Inside a chunk the corrections follow from one another by a unit lower triangular system. Its
    inverse is found for all chunks together; only the states between chunks are sequential.

    Raises:
      ValueError: `chunk` is not a power of two.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk = {chunk}: give a power of two")
    T, K, dtype = q.shape[1], q.shape[2], v.dtype
    c = min(chunk, 1 << (T - 1).bit_length())
    q, k = _normalise(q, k)

    def split(x: jax.Array, pattern: str) -> jax.Array:
        # Padding is zero, and a zero `log_decay` and `beta` leave the state as it is.
        x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, -T % c)] + [(0, 0)] * (x.ndim - 2))
        return einops.rearrange(x, pattern, c=c, K=K)

    q, k = (split(x, "B (n c) K d -> n B K c d") for x in (q, k))
    v, log_decay, beta = (
        split(x, "B (n c) (K G) ... -> n B K G c ...") for x in (v, log_decay, beta)
    )
    state = einops.rearrange(state, "B (K G) d e -> B K G d e", K=K)

    lower = jnp.tril(jnp.ones((c, c), jnp.float32))
    strict = jnp.tril(lower, -1)
    # The decay from token j to token i sums what lies between them. A difference of two sums from
    # the chunk's start would lose a weak decay behind a strong one, and overflow where i < j.
    between = _einsum("il,lj,nBKGl->nBKGij", lower, strict, log_decay)
    decay = lower * jnp.exp(between)
    from_start = jnp.exp(jnp.cumsum(log_decay, axis=-1))
    to_end = decay[..., -1, :]

    overlap = _einsum("nBKid,nBKjd->nBKij", k, k)[:, :, :, None]
    inverse = unit_lower_inverse(strict * decay * overlap * beta[..., None])
    # Each token's correction is what it is from an empty state less what it reads in the real one.
    fresh = _einsum("nBKGij,nBKGj,nBKGje->nBKGie", inverse, beta, v)
    reader = _einsum("nBKGij,nBKGj,nBKjd->nBKGid", inverse, beta * from_start, k)
    scores = _einsum("nBKid,nBKjd->nBKij", q, k)[:, :, :, None] * decay

    def step(state, chunk):
        q, k, fresh, reader, scores, from_start, to_end = chunk
        corrections = fresh - _einsum("BKGid,BKGde->BKGie", reader, state)
        out = from_start[..., None] * _einsum("BKid,BKGde->BKGie", q, state)
        out = out + _einsum("BKGij,BKGje->BKGie", scores, corrections)
        kept = from_start[..., -1, None, None] * state
        added = _einsum("BKjd,BKGje->BKGde", k, to_end[..., None] * corrections)
        return kept + added, out

    chunks = (q, k, fresh, reader, scores, from_start, to_end)
    state, out = jax.lax.scan(step, state, chunks)
    out = einops.rearrange(out, "n B K G c e -> B (n c) (K G) e")[:, :T]
    return out.astype(dtype), einops.rearrange(state, "B K G d e -> B (K G) d e")


def unit_lower_inverse(strict: jax.Array) -> jax.Array:
    """The inverse of I + `strict` by halves, in as many steps as its size has binary digits.

    The product (I - A)(I + A^2)(I + A^4)... is the same on paper, but powers of A grow like
    binomial coefficients where keys are alike, and cancel to nothing right in float32.

    Args:
      strict: [..., c, c], zero on the diagonal and above; c is a power of two.
    """
    half = strict.shape[-1] // 2
    if not half:
        return jnp.ones_like(strict)
    blocks = jnp.stack([strict[..., :half, :half], strict[..., half:, half:]])
    first, second = unit_lower_inverse(blocks)
    corner = -_einsum("...ij,...jk,...kl->...il", second, strict[..., half:, :half], first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _normalise(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and keys in float32, as the rule reads them."""

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)

    return unit(q) * q.shape[-1] ** -0.5, unit(k)


def causal_conv(
    x: jax.Array, weight: jax.Array, state: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """SiLU of a convolution over each channel's own past.

    Args:
      x: [B, T, C].
      weight: [C, taps], the last of which meets the token itself.
      state: [B, taps - 1, C], the inputs before x, oldest first; zeros at a text's start.
      lengths: int [B], how many of a row's T tokens are real, these being its first; None for all.

    Returns:
      [B, T, C] in x's dtype, and the state after the last real token.
    """
    T, taps = x.shape[1], weight.shape[1]
    inputs = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    weight = weight.astype(jnp.float32)
    y = sum(inputs[:, j : j + T].astype(jnp.float32) * weight[:, j] for j in range(taps))
    y = jax.nn.silu(y.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)
    if lengths is None:
        last = inputs[:, T:]
    else:
        last = jnp.take_along_axis(
            inputs, (lengths[:, None] + jnp.arange(taps - 1))[..., None], axis=1
        )
    return y, last.astype(state.dtype)


def gated_rms_norm(x: jax.Array, gate: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`rms_norm` of x times SiLU of `gate`, multiplied in float32; x and `gate` are [..., n]."""
    normed = rms_norm(x, weight, eps).astype(jnp.float32)
    return (normed * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


class GatedDeltaNet(nn.Module):
    """The token mixer of a linear-attention layer: projections, convolutions, rule, gated norm."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, real: jax.Array | None = None, cache: DeltaState | None = None
    ) -> tuple[jax.Array, DeltaState | None]:
        """Mixes the tokens of one call.

        Args:
          x: [B, T, D].
          real: bool [B, T], False at padding, which may stand anywhere; None for all real.
          cache: what the tokens before these left; None at a text's start.

        Returns:
          [B, T, D], zero at padding, and the cache after these tokens, None if none was given.
        """
        config, spec = self.config, self.config.delta
        heads, d, e = spec.num_value_heads, spec.key_head_dim, spec.value_head_dim
        before = init_delta_state(config, x.shape[0], x.dtype) if cache is None else cache
        lengths = None
        if real is not None:
            # Real tokens move to the front, since neither the convolution nor the rule skips any.
            lengths = jnp.sum(real, axis=1)
            places = jnp.where(real, jnp.cumsum(real, axis=1) - 1, x.shape[1])
            rows = jnp.arange(x.shape[0])[:, None]
            x = jnp.zeros_like(x).at[rows, places].set(x, mode="drop")

        def project(name: str, features: int, x: jax.Array = x) -> jax.Array:
            return Linear(features, stddev=config.initializer_range, name=f"{name}_proj")(x)

        def convolve(name: str, head_count: int, size: int, state: jax.Array):
            projected = project(name, head_count * size)
            conv = _CausalConv(spec.conv_kernel_dim, config.initializer_range, name=f"{name}_conv")
            y, state = conv(projected, state, lengths)
            return einops.rearrange(y, "B T (h d) -> B T h d", d=size), state

        q, conv_q = convolve("q", spec.num_key_heads, d, before.conv_q)
        k, conv_k = convolve("k", spec.num_key_heads, d, before.conv_k)
        v, conv_v = convolve("v", heads, e, before.conv_v)
        beta = jax.nn.sigmoid(project("b", heads)).astype(jnp.float32)
        a_log = fetch_param(self, "A_log", _init_a_log, (heads,)).astype(jnp.float32)
        dt_bias = fetch_param(self, "dt_bias", nn.initializers.ones, (heads,))
        step_size = jax.nn.softplus(project("a", heads).astype(jnp.float32) + dt_bias)
        log_decay = -jnp.exp(a_log) * step_size
        if real is not None:
            is_token = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
            beta, log_decay = jnp.where(is_token, beta, 0), jnp.where(is_token, log_decay, 0)

        out, state = gated_delta_rule(q, k, v, log_decay, beta, before.state)
        gate = einops.rearrange(project("z", heads * e), "B T (h e) -> B T h e", e=e)
        out = _GatedRMSNorm(config.rms_norm_eps, name="norm")(out, gate)
        y = project("out", config.hidden_size, einops.rearrange(out, "B T h e -> B T (h e)"))
        if real is not None:
            y = jnp.take_along_axis(y, places[..., None], axis=1, mode="fill", fill_value=0)
        return y, None if cache is None else DeltaState(state, conv_q, conv_k, conv_v)


class _CausalConv(nn.Module):
    """Declares `weight` [C, taps] and applies `causal_conv`."""

    taps: int
    stddev: float

    @nn.compact
    def __call__(
        self, x: jax.Array, state: jax.Array, lengths: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.normal(self.stddev)
        weight = fetch_param(self, "weight", init, (x.shape[-1], self.taps))
        return causal_conv(x, weight, state, lengths)


class _GatedRMSNorm(nn.Module):
    """Declares `weight` [n] over the last axis and applies `gated_rms_norm`."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        weight = fetch_param(self, "weight", nn.initializers.ones, (x.shape[-1],))
        return gated_rms_norm(x, gate, weight, self.eps)


def _init_a_log(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Logarithms of decay rates drawn up to 16, kept from 0 so that they stay finite."""
    return jnp.log(jax.random.uniform(key, shape, dtype, minval=0.01, maxval=16.0))
