"""Qwen3-Next (September 2025) and Qwen3-Coder-Next (February 2026): 80B, 3B active per token.

Three layers of the gated delta rule, then one of gated attention; 512 experts and a shared one in
every layer. Shapes and settings from the model cards and public copies of the `config.json` files.
The checkpoints of Qwen3-Next also hold a head that predicts the token after the next, 1.65B
parameters that the card's 80B leaves out. So do these presets: `config.json` does not tell of it.

Unsure, so compare with the checkpoint's own `config.json`: `eos_token_ids` of Coder-Next-Base,
taken from the other bases.
"""

from collections.abc import Mapping
from dataclasses import replace

from qwen_jax.config import DeltaSpec, LayerKind, ModelConfig, MoeSpec, RopeSpec


def hybrid(num_layers: int) -> tuple[LayerKind, ...]:
    """Layer types where every fourth layer is attention, in Qwen3-Next and Qwen3.5 alike."""
    return tuple(
        LayerKind.LINEAR_ATTENTION if (i + 1) % 4 else LayerKind.FULL_ATTENTION
        for i in range(num_layers)
    )


_80B_A3B = ModelConfig(
    family="qwen3_next",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=5120,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    layer_types=hybrid(48),
    max_position_embeddings=262144,
    rope=RopeSpec(theta=1e7, partial_rotary_factor=0.25),
    qk_norm=True,
    output_gate=True,
    zero_centered_norm=True,
    delta=DeltaSpec(
        num_key_heads=16,
        num_value_heads=32,
        key_head_dim=128,
        value_head_dim=128,
        conv_kernel_dim=4,
    ),
    moe=MoeSpec(
        layers=tuple(range(48)),
        num_experts=512,
        num_experts_per_tok=10,
        intermediate_size=512,
        renormalise=True,
        shared_intermediate_size=512,
    ),
    bos_token_id=151643,
    eos_token_ids=(151645,),
)

_CODER = replace(_80B_A3B, rope=RopeSpec(theta=5e6, partial_rotary_factor=0.25))

PRESETS: Mapping[str, ModelConfig] = {
    "qwen3-next-80b-a3b-instruct": _80B_A3B,
    "qwen3-next-80b-a3b-thinking": _80B_A3B,
    "qwen3-coder-next": _CODER,
    "qwen3-coder-next-base": replace(_CODER, eos_token_ids=(151643,)),
}
