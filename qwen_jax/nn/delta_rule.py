"""Linear attention by the gated delta rule (arXiv 2412.06464): a state in place of a cache of keys.

Each value head keeps a matrix S [d, e] that maps keys to values. A token lets it fade, corrects
what it returns for the token's key, and reads it with the token's query:

    S <- exp(log_decay) S;  S <- S + k (beta (v - S^T k))^T;  out = S^T q

Letters here: K key heads, G value heads for each of them, d and e the sizes of a key and a value,
C channels, n chunks, c and the indices i, j, l tokens of a chunk.
"""

import functools

import einops
import flax.struct
import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.nn.norms import rms_norm

# Tokens whose chunks are prepared at once: bounds what that takes at [B, block, H, d] and the like.
_TOKEN_BLOCK = 2048

# The log decay of a token that forgets all before it: its exponential is 0, and it is still finite,
# so that no gradient is 0 times infinity.
_FORGET = -1e4

# The rule is float32 by contract, which accelerators otherwise shorten in matrix products.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


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


@flax.struct.dataclass
class DeltaInputs:
    """What T tokens bring to a `DeltaState`, as the rule and the convolutions read it.

    Attributes:
      k: [B, T, K, d].
      v: [B, T, H, e].
      log_decay, beta: float32 [B, T, H].
      conv_q, conv_k, conv_v: [B, taps - 1 + T, C], the inputs before the tokens first.
    """

    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    beta: jax.Array
    conv_q: jax.Array
    conv_k: jax.Array
    conv_v: jax.Array


@flax.struct.dataclass
class DeltaTrail:
    """A state that is not settled: how many of the last call's tokens count is decided later.

    A state sums its tokens up and cannot give one back, but a few of them are soon run again from
    what they bring, which takes no weights and is much smaller than a state after each.

    Attributes:
      before: the state before the last call.
      inputs: of the last call's tokens.
    """

    before: DeltaState
    inputs: DeltaInputs


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


def open_delta_state(config: ModelConfig, state: DeltaState) -> DeltaTrail:
    """`state` with no token behind it."""
    spec, B, dtype = config.delta, len(state.state), state.conv_v.dtype
    H, d, e = spec.num_value_heads, spec.key_head_dim, spec.value_head_dim
    inputs = DeltaInputs(
        k=jnp.zeros((B, 0, spec.num_key_heads, d), dtype),
        v=jnp.zeros((B, 0, H, e), dtype),
        log_decay=jnp.zeros((B, 0, H), jnp.float32),
        beta=jnp.zeros((B, 0, H), jnp.float32),
        conv_q=state.conv_q,
        conv_k=state.conv_k,
        conv_v=state.conv_v,
    )
    return DeltaTrail(state, inputs)


def lengthen(trail: DeltaTrail, length: int) -> DeltaTrail:
    """`trail` with `length` tokens behind the others that bring nothing."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, length)] + [(0, 0)] * (x.ndim - 2))

    return trail.replace(inputs=jax.tree.map(pad, trail.inputs))


def settle(trail: DeltaTrail, counts: jax.Array) -> DeltaState:
    """The state with the first `counts` [B] of the last call's tokens, which had no padding."""
    before, inputs = trail.before, trail.inputs
    counts_in = jnp.arange(inputs.beta.shape[1]) < counts[:, None]
    log_decay, beta = (
        jnp.where(counts_in[..., None], x, 0) for x in (inputs.log_decay, inputs.beta)
    )
    # What queries would read is not wanted.
    _, state = gated_delta_rule(inputs.k, inputs.k, inputs.v, log_decay, beta, before.state)

    def last(conv: jax.Array, before: jax.Array) -> jax.Array:
        places = counts[:, None] + jnp.arange(before.shape[1])
        return jnp.take_along_axis(conv, places[..., None], axis=1).astype(before.dtype)

    return DeltaState(
        state=state,
        conv_q=last(inputs.conv_q, before.conv_q),
        conv_k=last(inputs.conv_k, before.conv_k),
        conv_v=last(inputs.conv_v, before.conv_v),
    )


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    starts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the rule over T tokens: one token by itself, several in chunks, many in blocks of them.

    A token with `log_decay` and `beta` 0 leaves the state as it is.

    Args:
      q, k: [B, T, K, d], normalised here to length 1, queries then divided by sqrt(d).
      v: [B, T, H, e]; value head h reads key head h // (H / K).
      log_decay: float32 [B, T, H], finite and not above 0.
      beta: float32 [B, T, H], 0 to 1.
      state: float32 [B, H, d, e] before the first token.
      starts: bool [B, T], tokens that find the state empty, as `segment_starts` has them; None
        for none.

    Returns:
      [B, T, H, e] in v's dtype, and the state after the last token.
    """
    T = q.shape[1]
    if starts is not None:
        log_decay = jnp.where(starts[..., None], _FORGET, log_decay)
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
        correction = beta[..., None] * (v - einsum("BKGde,BKd->BKGe", state, k))
        state = state + einsum("BKd,BKGe->BKGde", k, correction)
        return state, einsum("BKGde,BKd->BKGe", state, q)

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
    between = einsum("il,lj,nBKGl->nBKGij", lower, strict, log_decay)
    decay = lower * jnp.exp(between)
    from_start = jnp.exp(jnp.cumsum(log_decay, axis=-1))
    to_end = decay[..., -1, :]

    overlap = einsum("nBKid,nBKjd->nBKij", k, k)[:, :, :, None]
    inverse = unit_lower_inverse(strict * decay * overlap * beta[..., None])
    # Each token's correction is what it is from an empty state less what it reads in the real one.
    fresh = einsum("nBKGij,nBKGj,nBKGje->nBKGie", inverse, beta, v)
    reader = einsum("nBKGij,nBKGj,nBKjd->nBKGid", inverse, beta * from_start, k)
    scores = einsum("nBKid,nBKjd->nBKij", q, k)[:, :, :, None] * decay

    def step(state, chunk):
        q, k, fresh, reader, scores, from_start, to_end = chunk
        corrections = fresh - einsum("BKGid,BKGde->BKGie", reader, state)
        out = from_start[..., None] * einsum("BKid,BKGde->BKGie", q, state)
        out = out + einsum("BKGij,BKGje->BKGie", scores, corrections)
        kept = from_start[..., -1, None, None] * state
        added = einsum("BKjd,BKGje->BKGde", k, to_end[..., None] * corrections)
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
      strict: [n, ..., c, c], zero on the diagonal and above; c is a power of two.
    """
    half = strict.shape[-1] // 2
    if not half:
        return jnp.ones_like(strict)
    # Side by side on the first axis: one more for each halving would be too many for XLA on CPUs.
    blocks = jnp.concatenate([strict[..., :half, :half], strict[..., half:, half:]])
    first, second = jnp.split(unit_lower_inverse(blocks), 2)
    corner = -einsum("...ij,...jk,...kl->...il", second, strict[..., half:, :half], first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _normalise(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and keys in float32, as the rule reads them."""

    def unit(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)

    return unit(q) * q.shape[-1] ** -0.5, unit(k)


def segment_starts(segments: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """Which tokens begin another text than that of the token before them.

    Args:
      segments: int32 [B, T], the text of several in a row that each token belongs to.
      before: int32 [B, 1], that of the token before the first; None for the first's own.

    Returns:
      bool [B, T].
    """
    before = segments[:, :1] if before is None else before
    return segments != jnp.concatenate([before, segments[:, :-1]], axis=1)


def causal_conv(
    x: jax.Array,
    weight: jax.Array,
    state: jax.Array,
    lengths: jax.Array | None = None,
    segments: jax.Array | None = None,
    segments_before: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """SiLU of a convolution over each channel's own past.

    Args:
      x: [B, T, C].
      weight: [C, taps], the last of which meets the token itself.
      state: [B, taps - 1, C], the inputs before x, oldest first; zeros at a text's start.
      lengths: int [B], how many of a row's T tokens are real, these being its first; None for all.
      segments: int32 [B, T], texts that the convolution does not look across; None for one.
      segments_before: int32 [B, taps - 1], those of the inputs in `state`; None for the first's.

    Returns:
      [B, T, C] in x's dtype, and the state after the last real token.
    """
    T, taps = x.shape[1], weight.shape[1]
    inputs = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    weight = weight.astype(jnp.float32)
    if segments is not None:
        if segments_before is None:
            segments_before = jnp.repeat(segments[:, :1], taps - 1, axis=1)
        owners = jnp.concatenate([segments_before, segments], axis=1)

    def tap(j: int) -> jax.Array:
        seen = inputs[:, j : j + T].astype(jnp.float32)
        if segments is not None:
            seen = jnp.where((owners[:, j : j + T] == segments)[..., None], seen, 0)
        return seen * weight[:, j]

    y = sum(map(tap, range(taps)))
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
