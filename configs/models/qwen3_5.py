"""The text towers of Qwen3.5 (February and March 2026), which also sees pictures.

Layers as in Qwen3-Next, the delta rule's projections stored otherwise, and a vocabulary of 248320.
Shapes from the model cards, settings from public copies of the `config.json` files. Up to 4B the
head is the input table. With the vision tower and the head that predicts the token after the next
(none of which is here: `config.json` does not tell of the latter, and a card's figure leaves it
out) the counts are those of the published files, to the last parameter. A base has the
configuration of the model trained from it; 27B and the larger ones have none.

Unsure, so compare with the checkpoint's own `config.json`: `rms_norm_eps` and the ids of all but
4B and 9B, and `router_aux_loss_coef`.
"""

from collections.abc import Mapping
from dataclasses import replace

from configs.models.qwen3_next import hybrid
from qwen_jax.config import DeltaSpec, ModelConfig, MoeSpec, RopeSpec

_0_8B = ModelConfig(
    family="qwen3_5_text",
    vocab_size=248320,
    hidden_size=1024,
    intermediate_size=3584,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=256,
    layer_types=hybrid(24),
    max_position_embeddings=262144,
    rope=RopeSpec(theta=1e7, partial_rotary_factor=0.25, mrope_section=(11, 11, 10)),
    tie_word_embeddings=True,
    qk_norm=True,
    output_gate=True,
    zero_centered_norm=True,
    delta=DeltaSpec(
        num_key_heads=16,
        num_value_heads=16,
        key_head_dim=128,
        value_head_dim=128,
        conv_kernel_dim=4,
    ),
    eos_token_ids=(248044,),
)
_2B = replace(_0_8B, hidden_size=2048, intermediate_size=6144)
_4B = replace(
    _0_8B,
    hidden_size=2560,
    intermediate_size=9216,
    num_attention_heads=16,
    num_key_value_heads=4,
    layer_types=hybrid(32),
    delta=replace(_0_8B.delta, num_value_heads=32),
)
_9B = replace(_4B, hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)
_27B = replace(
    _9B,
    hidden_size=5120,
    intermediate_size=17408,
    num_attention_heads=24,
    layer_types=hybrid(64),
    delta=replace(_0_8B.delta, num_value_heads=48),
)


def _experts(dense: ModelConfig, moe: MoeSpec) -> ModelConfig:
    """`dense` with experts in every layer, whose width the files give instead of a dense one."""
    return replace(
        dense,
        family="qwen3_5_moe_text",
        num_key_value_heads=2,
        intermediate_size=moe.intermediate_size,
        layer_types=hybrid(len(moe.layers)),
        moe=moe,
    )


_35B_A3B = _experts(
    replace(_9B, hidden_size=2048),
    MoeSpec(
        layers=tuple(range(40)),
        num_experts=256,
        num_experts_per_tok=8,
        intermediate_size=512,
        renormalise=True,
        shared_intermediate_size=512,
    ),
)
_122B_A10B = _experts(
    replace(
        _9B,
        hidden_size=3072,
        num_attention_heads=32,
        delta=replace(_0_8B.delta, num_value_heads=64),
    ),
    MoeSpec(
        layers=tuple(range(48)),
        num_experts=256,
        num_experts_per_tok=8,
        intermediate_size=1024,
        renormalise=True,
        shared_intermediate_size=1024,
    ),
)
_397B_A17B = _experts(
    replace(_122B_A10B, hidden_size=4096),
    replace(_122B_A10B.moe, layers=tuple(range(60)), num_experts=512, num_experts_per_tok=10),
)

PRESETS: Mapping[str, ModelConfig] = {
    "qwen3.5-0.8b": _0_8B,
    "qwen3.5-0.8b-base": _0_8B,
    "qwen3.5-2b": _2B,
    "qwen3.5-2b-base": _2B,
    "qwen3.5-4b": _4B,
    "qwen3.5-4b-base": _4B,
    "qwen3.5-9b": _9B,
    "qwen3.5-9b-base": _9B,
    "qwen3.5-27b": _27B,
    "qwen3.5-35b-a3b": _35B_A3B,
    "qwen3.5-35b-a3b-base": _35B_A3B,
    "qwen3.5-122b-a10b": _122B_A10B,
    "qwen3.5-397b-a17b": _397B_A17B,
}
