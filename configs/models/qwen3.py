"""Qwen3 (April 2025), its refresh of July 2025, Coder, Embedding, Reranker, Guard and SafeRL.

QK-norm, no biases, heads of 128; 30B, 235B and 480B have experts in every layer and no shared one.

Shapes and settings from the published `config.json` files, as quoted in public code and logs. A
post-trained model, whose name is the plain one, declares 40960 positions (32768 of text and room
for the answer) and ends with `<|im_end|>`; a base declares 32768 and ends with `<|endoftext|>`. No
base of 32B, 235B and the coders was released. Embedders and rerankers have tables without the
spare rows of the others. An embedder's `config.json` asks for a head that its files do not have
where the head is not the input table, as in 8B.

Unsure, so compare with the checkpoint's own `config.json`:
  * `max_position_embeddings` of the dense bases, which some tables give as 40960;
  * `max_position_embeddings` and `eos_token_ids` of the rerankers and larger embedders;
  * `aux_loss_coef` of the refresh, taken from the models of April;
  * `max_position_embeddings` and `eos_token_ids` of Guard-Gen and 4B-SafeRL, tuned from the models
    of April;
  * of Guard-Stream, what is not of 0.6B: its `guard_inner_size` of 512 may be larger elsewhere.
"""

from collections.abc import Mapping
from dataclasses import replace

from qwen_jax.config import GuardSpec, HeadKind, LayerKind, ModelConfig, MoeSpec, RopeSpec

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

_30B_A3B = replace(
    _0_6B,
    family="qwen3_moe",
    hidden_size=2048,
    intermediate_size=6144,
    num_attention_heads=32,
    num_key_value_heads=4,
    layer_types=(_FULL,) * 48,
    tie_word_embeddings=False,
    moe=MoeSpec(
        layers=tuple(range(48)),
        num_experts=128,
        num_experts_per_tok=8,
        intermediate_size=768,
        renormalise=True,
    ),
)
_30B_A3B_2507 = replace(_30B_A3B, max_position_embeddings=262144, rope=RopeSpec(theta=1e7))
_235B_A22B = replace(
    _30B_A3B,
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=64,
    layer_types=(_FULL,) * 94,
    moe=replace(_30B_A3B.moe, layers=tuple(range(94)), intermediate_size=1536),
)
_235B_A22B_2507 = replace(_235B_A22B, max_position_embeddings=262144, rope=RopeSpec(theta=5e6))
_CODER_30B_A3B = replace(
    _30B_A3B_2507,
    intermediate_size=5472,
    moe=replace(_30B_A3B.moe, aux_loss_coef=0.0),
    bos_token_id=None,
)
_CODER_480B_A35B = replace(
    _CODER_30B_A3B,
    hidden_size=6144,
    intermediate_size=8192,
    num_attention_heads=96,
    num_key_value_heads=8,
    layer_types=(_FULL,) * 62,
    moe=replace(
        _CODER_30B_A3B.moe, layers=tuple(range(62)), num_experts=160, intermediate_size=2560
    ),
)


def _base(post_trained: ModelConfig) -> ModelConfig:
    return replace(post_trained, max_position_embeddings=32768, eos_token_ids=(151643,))


def _guard_stream(post_trained: ModelConfig) -> ModelConfig:
    guard = GuardSpec(
        inner_size=512, risk_levels=3, categories=8, query_risk_levels=3, query_categories=9
    )
    return replace(
        post_trained,
        max_position_embeddings=8192,
        head=HeadKind.GUARD,
        guard=guard,
        num_labels=sum(guard.widths),
    )


PRESETS: Mapping[str, ModelConfig] = {
    "qwen3-0.6b": _0_6B,
    "qwen3-0.6b-base": _base(_0_6B),
    "qwen3-1.7b": _1_7B,
    "qwen3-1.7b-base": _base(_1_7B),
    "qwen3-4b": _4B,
    "qwen3-4b-base": _base(_4B),
    "qwen3-4b-instruct-2507": _4B_2507,
    "qwen3-4b-thinking-2507": _4B_2507,
    "qwen3-4b-saferl": _4B,
    "qwen3-8b": _8B,
    "qwen3-8b-base": _base(_8B),
    "qwen3-14b": _14B,
    "qwen3-14b-base": _base(_14B),
    "qwen3-32b": _32B,
    "qwen3-30b-a3b": _30B_A3B,
    "qwen3-30b-a3b-base": _base(_30B_A3B),
    "qwen3-30b-a3b-instruct-2507": _30B_A3B_2507,
    "qwen3-30b-a3b-thinking-2507": _30B_A3B_2507,
    "qwen3-235b-a22b": _235B_A22B,
    "qwen3-235b-a22b-instruct-2507": _235B_A22B_2507,
    "qwen3-235b-a22b-thinking-2507": _235B_A22B_2507,
    "qwen3-coder-30b-a3b-instruct": _CODER_30B_A3B,
    "qwen3-coder-480b-a35b-instruct": _CODER_480B_A35B,
    "qwen3-embedding-0.6b": replace(_base(_0_6B), vocab_size=151669),
    "qwen3-embedding-4b": replace(_4B, vocab_size=151665),
    "qwen3-embedding-8b": replace(_8B, vocab_size=151665),
    "qwen3-reranker-0.6b": replace(_0_6B, vocab_size=151669),
    "qwen3-reranker-4b": replace(_4B, vocab_size=151669),
    "qwen3-reranker-8b": replace(_8B, vocab_size=151669),
    "qwen3guard-gen-0.6b": replace(_0_6B, max_position_embeddings=32768),
    "qwen3guard-gen-4b": replace(_4B, max_position_embeddings=32768),
    "qwen3guard-gen-8b": replace(_8B, max_position_embeddings=32768),
    "qwen3guard-stream-0.6b": _guard_stream(_0_6B),
    "qwen3guard-stream-4b": _guard_stream(_4B),
    "qwen3guard-stream-8b": _guard_stream(_8B),
}
