"""Qwen3 dense (April 2025) and the 2507 refresh of 4B: QK-norm, no biases, heads of 128.

Shapes and settings from the published `config.json` files, as quoted in public code and logs. A
post-trained model, whose name is the plain one, declares 40960 positions (32768 of text and room
for the answer) and ends with `<|im_end|>`; a base declares 32768 and ends with `<|endoftext|>`. No
base of 32B was released.

Unsure, so compare with the checkpoint's own `config.json`: `max_position_embeddings` of the bases,
which some tables give as 40960.
"""

from collections.abc import Mapping
from dataclasses import replace

from qwen_jax.config import LayerKind, ModelConfig, RopeSpec

_FULL = LayerKind.FULL_ATTENTION

_0_6B = ModelConfig(
    family="qwen3",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    layer_types=(_FULL,) * 28,
    max_position_embeddings=40960,
    rope=RopeSpec(theta=1e6),
    tie_word_embeddings=True,
    qk_norm=True,
    bos_token_id=151643,
    eos_token_ids=(151645,),
)
_1_7B = replace(_0_6B, hidden_size=2048, intermediate_size=6144)
_4B = replace(
    _0_6B,
    hidden_size=2560,
    intermediate_size=9728,
    num_attention_heads=32,
    layer_types=(_FULL,) * 36,
)
_4B_2507 = replace(_4B, max_position_embeddings=262144, rope=RopeSpec(theta=5e6))
_8B = replace(_4B, hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)
_14B = replace(
    _8B,
    hidden_size=5120,
    intermediate_size=17408,
    num_attention_heads=40,
    layer_types=(_FULL,) * 40,
)
_32B = replace(
    _14B,
    intermediate_size=25600,
    num_attention_heads=64,
    layer_types=(_FULL,) * 64,
)


def _base(post_trained: ModelConfig) -> ModelConfig:
    return replace(post_trained, max_position_embeddings=32768, eos_token_ids=(151643,))


PRESETS: Mapping[str, ModelConfig] = {
    "qwen3-0.6b": _0_6B,
    "qwen3-0.6b-base": _base(_0_6B),
    "qwen3-1.7b": _1_7B,
    "qwen3-1.7b-base": _base(_1_7B),
    "qwen3-4b": _4B,
    "qwen3-4b-base": _base(_4B),
    "qwen3-4b-instruct-2507": _4B_2507,
    "qwen3-4b-thinking-2507": _4B_2507,
    "qwen3-8b": _8B,
    "qwen3-8b-base": _base(_8B),
    "qwen3-14b": _14B,
    "qwen3-14b-base": _base(_14B),
    "qwen3-32b": _32B,
}
