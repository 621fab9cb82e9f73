"""Heads that are more than a matrix: a guard's, and that which looks one token further (MTP)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.config import LayerKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.models.layer import CompiledLinear, CompiledNorm, norm_of
from qwen_jax.nn.cache import AttentionCache, Cache, CacheDtype, init_cache
from qwen_jax.nn.moe import Dispatch
from qwen_jax.nn.router import RouterOptions, Routing
from qwen_jax.nn.tokens import Tokens


class GuardHead(nn.Module):
    """What a guard makes of a token as part of an answer, or as part of a query.

    Attributes:
      config: with `guard`.
      widths: levels of risk, categories.
    """

    config: ModelConfig
    widths: tuple[int, int]

    def setup(self):
        """Declares the blocks."""
        self.project = CompiledLinear(self.config.guard.inner_size)
        self.norm = norm_of(self.config, CompiledNorm)
        self.risk, self.category = (CompiledLinear(width) for width in self.widths)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, P, D] -> the logits of risk and of category, [B, P, width] each."""
        x = self.norm(self.project(x))
        return self.risk(x), self.category(x)


class MtpHead(nn.Module):
    """Joins the next token's embedding to the hidden state and runs a layer of its own on both.

    Within the joint vector the embedding comes first, then the hidden state, as other engines read
    the published `fc`.
    """

    config: ModelConfig
    layer: type[nn.Module]
    dispatch: Dispatch | None = None
    router: RouterOptions = RouterOptions()

    def setup(self):
        """Declares the blocks."""
        config = mtp_config(self.config)
        self.pre_fc_norm_embedding = norm_of(config, CompiledNorm)
        self.pre_fc_norm_hidden = norm_of(config, CompiledNorm)
        self.fc = CompiledLinear(config.hidden_size, stddev=config.initializer_range)
        (kind,) = config.layer_types
        self.layers = [
            self.layer(config, kind, config.moe is not None, self.dispatch, self.router)
            for _ in range(self.config.mtp_layers)
        ]
        self.norm = norm_of(config, CompiledNorm)

    def __call__(
        self,
        embedded: jax.Array,
        hidden: jax.Array,
        tokens: Tokens,
        cache: AttentionCache | None,
        step: int,
    ) -> tuple[jax.Array, AttentionCache | None, Routing | None]:
        """[B, T, D] twice -> [B, T, D], the layer's new cache and its routing."""
        both = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(jnp.concatenate(both, axis=-1))
        layers = range(len(self.layers)) if self.is_initializing() else (step % len(self.layers),)
        for i in layers:
            x, cache, routing = self.layers[i](x, tokens, cache)
        return self.norm(x), cache, routing


def mtp_config(config: ModelConfig) -> ModelConfig:
    """What a layer of the MTP head of `config` is: one of full attention, sparse if any is."""
    moe = config.moe
    return dataclasses.replace(
        config,
        layer_types=(LayerKind.FULL_ATTENTION,),
        delta=None,
        moe=None if moe is None else dataclasses.replace(moe, layers=(0,)),
        mtp_layers=0,
    )


def init_mtp_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
    cache_dtype: CacheDtype | None = None,
) -> Cache:
    """An empty cache for `Decoder.predict_next`, as `nn.cache.init_cache`.

    Raises:
      UserError: the model's RoPE depends on the length of the text. What the head has cached would
        have to be computed again when it grows, from hidden states that no cache keeps.
    """
    if config.rope.depends_on_length:
        raise UserError(
            f"rope_type = {config.rope.kind.value} changes what the head has cached as the text "
            "grows; run predict_next without a cache"
        )
    return init_cache(mtp_config(config), batch, capacity, dtype, mesh, cache_dtype)
