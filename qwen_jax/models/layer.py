"""One layer of a decoder: a token mixer, then a feed-forward block."""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from qwen_jax.config import LayerKind, ModelConfig
from qwen_jax.nn.attention import Attention
from qwen_jax.nn.cache import LayerCache
from qwen_jax.nn.gated_delta_net import GatedDeltaNet
from qwen_jax.nn.linear import Linear
from qwen_jax.nn.mlp import SwiGLU
from qwen_jax.nn.moe import Dispatch
from qwen_jax.nn.norms import RMSNorm
from qwen_jax.nn.router import RouterOptions, Routing
from qwen_jax.nn.sparse_moe import SparseMoe
from qwen_jax.nn.tokens import Parts, Tokens, over_parts
from qwen_jax.sharding.axes import HIDDEN, constrain, gather


class DecoderLayer(nn.Module):
    """Pre-norm residual block: token mixer, then feed-forward.

    Attributes:
      config: of the model.
      kind: of the mixer.
      is_sparse: whether the feed-forward block is a mixture of experts.
      dispatch, router: as `SparseMoe` has them.
    """

    config: ModelConfig
    kind: LayerKind
    is_sparse: bool
    dispatch: Dispatch | None = None
    router: RouterOptions = RouterOptions()

    @nn.compact
    def __call__(
        self, x: jax.Array, tokens: Tokens | Parts, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None, Routing | None]:
        """[B, T, D] -> [B, T, D], the layer's new cache, and where its tokens were routed."""
        config = self.config
        normed = norm_of(config, RMSNorm, name="input_layernorm")(x)
        if self.kind is LayerKind.LINEAR_ATTENTION:
            mixer = GatedDeltaNet(config, name="linear_attn")
            mixed, cache = over_parts(
                lambda x, own, cache: mixer(x, own.real, cache, own.layout, own.segments),
                (normed,),
                tokens,
                cache,
            )
        else:
            mixer = Attention(config, self.kind, name="self_attn")
            mixed, cache = mixer(normed, tokens, cache)
        x = constrain(x + mixed, tokens.layout, *HIDDEN)
        normed = norm_of(config, RMSNorm, name="post_attention_layernorm")(x)
        if self.is_sparse:
            experts = SparseMoe(config, self.dispatch, self.router, name="mlp")
            y, routing = experts(
                normed, tokens.real, tokens.layout, tokens.places, tokens.num_tokens
            )
        else:
            y, routing = SwiGLU(config, name="mlp")(normed, tokens.layout), None
        return constrain(x + y, tokens.layout, *HIDDEN), cache, routing


def norm_of(config: ModelConfig, kind: type[nn.Module], **options: Any) -> nn.Module:
    """A norm of the class `kind`, with the config's epsilon and form."""
    return kind(config.rms_norm_eps, config.zero_centered_norm, **options)


# Outside of `jit`, a forward pass runs a handful of compiled programs, one for all layers of a
# kind, so that the first pass compiles a layer and not the model. Inside of `jit`, layers share
# their trace and XLA inlines the calls.
@functools.cache
def compiled_layer(config: ModelConfig, mesh: Mesh | None) -> type[nn.Module]:
    """`DecoderLayer`, its parameters put together on a mesh as it runs."""
    if mesh is None:
        return nn.jit(DecoderLayer)
    put_together = functools.partial(gather, config, mesh)
    return nn.jit(nn.map_variables(DecoderLayer, "params", put_together))


CompiledNorm = nn.jit(RMSNorm)
CompiledLinear = nn.jit(Linear)
