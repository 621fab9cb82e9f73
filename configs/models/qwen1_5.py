"""Qwen1.5 (February to April 2024) and CodeQwen1.5: multi-head attention but for 32B and 110B.

MoE-A2.7B was made of the 1.8B: 60 experts and a shared one of four times their width.

Shapes and settings from the published `config.json` files where public code and logs quote them
(0.5B, 110B), else from the tables of other implementations. A chat model differs from its base in
the id that ends a text: `<|im_end|>` for `<|endoftext|>`.

Unsure, so compare with the checkpoint's own `config.json`:
  * `rope_theta` of 4B: 5e6 from recollection, where every other size has 1e6;
  * `eos_token_ids` of the chat models, which the template needs but no quoted file confirms;
  * `max_position_embeddings` of MoE-A2.7B-Chat, taken from its base;
  * CodeQwen1.5: all but its size, GQA with 4 key/value heads and 65536 positions, which its card
    and public tables give. In particular `rms_norm_eps` and the ids of its own vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace

from qwen_jax.config import LayerKind, ModelConfig, MoeSpec, RopeSpec

_FULL = LayerKind.FULL_ATTENTION

_0_5B = ModelConfig(
    family="qwen2",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=2816,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=64,
    layer_types=(_FULL,) * 24,
    max_position_embeddings=32768,
    rope=RopeSpec(theta=1e6),
    tie_word_embeddings=True,
    qkv_bias=True,
    bos_token_id=151643,
    eos_token_ids=(151643,),
)
_1_8B = replace(
    _0_5B,
    hidden_size=2048,
    intermediate_size=5504,
    head_dim=128,
    tie_word_embeddings=False,
)
_4B = replace(
    _1_8B,
    hidden_size=2560,
    intermediate_size=6912,
    num_attention_heads=20,
    num_key_value_heads=20,
    layer_types=(_FULL,) * 40,
    rope=RopeSpec(theta=5e6),
)
_7B = replace(
    _1_8B,
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_key_value_heads=32,
    layer_types=(_FULL,) * 32,
)
_14B = replace(
    _7B,
    vocab_size=152064,
    hidden_size=5120,
    intermediate_size=13696,
    num_attention_heads=40,
    num_key_value_heads=40,
    layer_types=(_FULL,) * 40,
)
_32B = replace(
    _14B,
    intermediate_size=27392,
    num_key_value_heads=8,
    layer_types=(_FULL,) * 64,
)
_72B = replace(
    _14B,
    hidden_size=8192,
    intermediate_size=24576,
    num_attention_heads=64,
    num_key_value_heads=64,
    layer_types=(_FULL,) * 80,
)
_110B = replace(_72B, intermediate_size=49152, num_key_value_heads=8)

_MOE_A2_7B = replace(
    _1_8B,
    family="qwen2_moe",
    intermediate_size=5632,
    max_position_embeddings=8192,
    moe=MoeSpec(
        layers=tuple(range(24)),
        num_experts=60,
        num_experts_per_tok=4,
        intermediate_size=1408,
        renormalise=False,
        shared_intermediate_size=5632,
    ),
)

_CODE_7B = replace(
    _7B,
    vocab_size=92416,
    intermediate_size=13440,
    num_key_value_heads=4,
    max_position_embeddings=65536,
    rms_norm_eps=1e-5,
    bos_token_id=2,
    eos_token_ids=(2,),
)


def _chat(base: ModelConfig) -> ModelConfig:
    return replace(base, eos_token_ids=(151645,))


PRESETS: Mapping[str, ModelConfig] = {
    "qwen1.5-0.5b": _0_5B,
    "qwen1.5-0.5b-chat": _chat(_0_5B),
    "qwen1.5-1.8b": _1_8B,
    "qwen1.5-1.8b-chat": _chat(_1_8B),
    "qwen1.5-4b": _4B,
    "qwen1.5-4b-chat": _chat(_4B),
    "qwen1.5-7b": _7B,
    "qwen1.5-7b-chat": _chat(_7B),
    "qwen1.5-14b": _14B,
    "qwen1.5-14b-chat": _chat(_14B),
    "qwen1.5-32b": _32B,
    "qwen1.5-32b-chat": _chat(_32B),
    "qwen1.5-72b": _72B,
    "qwen1.5-72b-chat": _chat(_72B),
    "qwen1.5-110b": _110B,
    "qwen1.5-110b-chat": _chat(_110B),
    "qwen1.5-moe-a2.7b": _MOE_A2_7B,
    "qwen1.5-moe-a2.7b-chat": _chat(_MOE_A2_7B),
    "codeqwen1.5-7b": _CODE_7B,
    "codeqwen1.5-7b-chat": replace(_CODE_7B, eos_token_ids=(4,)),
}
