"""The token mixer of linear-attention layers: the gated delta rule between projections."""

import functools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.nn.delta_rule import (
    DeltaInputs,
    DeltaState,
    DeltaTrail,
    causal_conv,
    gated_delta_rule,
    gated_rms_norm,
    init_delta_state,
    segment_starts,
)
from qwen_jax.nn.delta_shards import sharded_causal_conv, sharded_delta_rule
from qwen_jax.nn.linear import Linear, fetch_param
from qwen_jax.sharding.axes import (
    CONTEXT,
    HIDDEN,
    TOKENS,
    Layout,
    is_cut,
    on_shards,
    repeat_heads,
)


class GatedDeltaNet(nn.Module):
    """The token mixer of a linear-attention layer: projections, convolutions, rule, gated norm."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        real: jax.Array | None = None,
        cache: DeltaState | DeltaTrail | None = None,
        layout: Layout | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, DeltaState | DeltaTrail | None]:
        """Mixes the tokens of one call.

        Args:
          x: [B, T, D].
          real: bool [B, T], False at padding, which may stand anywhere (but behind all tokens
            where a mesh cuts texts); None for all real.
          cache: what the tokens before these left; None at a text's start. Of a `DeltaTrail` it is
            what is settled of it, and comes back with what these tokens bring.
          layout: where the tokens lie on a mesh; None without one.
          segments: int32 [B, T], the text of several in a row that each token belongs to, counted
            up from 0 or more; None for one.

        Returns:
          [B, T, D], zero at padding, and the cache after these tokens, of the kind that was given.
        """
        config, spec = self.config, self.config.delta
        heads, d, e = spec.num_value_heads, spec.key_head_dim, spec.value_head_dim
        before = init_delta_state(config, x.shape[0], x.dtype) if cache is None else cache
        is_trail = isinstance(cache, DeltaTrail)
        if is_trail:
            before = cache.before
        lengths = None
        cut = is_cut(layout)
        moves = real is not None and not cut
        if real is not None:
            lengths = jnp.sum(real, axis=1)
        if moves:
            # Real tokens move to the front, since neither the convolution nor the rule skips any.
            places = jnp.where(real, jnp.cumsum(real, axis=1) - 1, x.shape[1])
            x = on_shards(_move, layout, (HIDDEN, TOKENS), HIDDEN)(x, places)
            if segments is not None:
                segments = _move(segments, places)
            real = jnp.arange(x.shape[1]) < lengths[:, None]
        if segments is not None and real is not None:
            # Padding goes on with the last text: another one would empty the state.
            last = jnp.max(jnp.where(real, segments, 0), axis=1, keepdims=True)
            segments = jnp.where(real, segments, last)

        def project(name: str, features: int, x: jax.Array = x) -> jax.Array:
            return Linear(features, stddev=config.initializer_range, name=f"{name}_proj")(x)

        def convolve(name: str, head_count: int, size: int, state: jax.Array, channels: str):
            projected = project(name, head_count * size)
            conv = _CausalConv(spec.conv_kernel_dim, config.initializer_range, name=f"{name}_conv")
            y, last = conv(projected, state, lengths, segments, layout, channels)
            # What a trail keeps are all inputs; without one the last are the next call's first.
            if is_trail:
                last = jnp.concatenate([state.astype(projected.dtype), projected], axis=1)
            return einops.rearrange(y, "B T (h d) -> B T h d", d=size), last

        q, conv_q = convolve("q", spec.num_key_heads, d, before.conv_q, "key_heads")
        k, conv_k = convolve("k", spec.num_key_heads, d, before.conv_k, "key_heads")
        v, conv_v = convolve("v", heads, e, before.conv_v, "value_heads")
        q, k = (repeat_heads(x, layout, "key_heads") for x in (q, k))
        beta = jax.nn.sigmoid(project("b", heads)).astype(jnp.float32)
        a_log = fetch_param(self, "A_log", _init_a_log, (heads,)).astype(jnp.float32)
        dt_bias = fetch_param(self, "dt_bias", nn.initializers.ones, (heads,))
        step_size = jax.nn.softplus(project("a", heads).astype(jnp.float32) + dt_bias)
        log_decay = -jnp.exp(a_log) * step_size
        if real is not None:
            beta, log_decay = (jnp.where(real[..., None], a, 0) for a in (beta, log_decay))

        vectors, numbers = (*TOKENS, "value_heads", None), (*TOKENS, "value_heads")
        states = ("batch", "value_heads", None, None)
        in_axes = (vectors, vectors, vectors, numbers, numbers, states, TOKENS)
        rule = functools.partial(sharded_delta_rule, axis_name=CONTEXT) if cut else _whole_rule
        out, state = on_shards(rule, layout, in_axes, (vectors, states))(
            q, k, v, log_decay, beta, before.state, segments
        )
        gate = einops.rearrange(project("z", heads * e), "B T (h e) -> B T h e", e=e)
        out = _GatedRMSNorm(config.rms_norm_eps, name="norm")(out, gate)
        y = project("out", config.hidden_size, einops.rearrange(out, "B T h e -> B T (h e)"))
        if moves:
            y = on_shards(_move_back, layout, (HIDDEN, TOKENS), HIDDEN)(y, places)
        elif real is not None:
            y = jnp.where(real[..., None], y, 0)
        if cache is None:
            return y, None
        if is_trail:
            inputs = DeltaInputs(k, v, log_decay, beta, conv_q, conv_k, conv_v)
            return y, DeltaTrail(before, inputs)
        return y, DeltaState(state, conv_q, conv_k, conv_v)


def _whole_rule(q, k, v, log_decay, beta, state, segments):
    starts = None if segments is None else segment_starts(segments)
    return gated_delta_rule(q, k, v, log_decay, beta, state, starts)


def _move(x: jax.Array, places: jax.Array) -> jax.Array:
    """`x` [B, T, D] with its tokens at `places` [B, T], from T on dropped; zeros elsewhere."""
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros_like(x).at[rows, places].set(x, mode="drop")


def _move_back(x: jax.Array, places: jax.Array) -> jax.Array:
    """The inverse of `_move`, zeros for the tokens that were dropped."""
    return jnp.take_along_axis(x, places[..., None], axis=1, mode="fill", fill_value=0)


class _CausalConv(nn.Module):
    """Declares `weight` [C, taps] and applies `causal_conv`."""

    taps: int
    stddev: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: jax.Array,
        lengths: jax.Array | None,
        segments: jax.Array | None,
        layout: Layout | None,
        channels: str,
    ) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.normal(self.stddev)
        weight = fetch_param(self, "weight", init, (x.shape[-1], self.taps))
        along, states = (*TOKENS, channels), ("batch", None, channels)
        in_axes = (along, (channels, None), states, ("batch",), TOKENS)
        cut = is_cut(layout)
        conv = functools.partial(sharded_causal_conv, axis_name=CONTEXT) if cut else causal_conv
        conv = on_shards(conv, layout, in_axes, (along, states))
        return conv(x, weight, state, lengths, segments)


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
