"""Qwen2 (June 2024) and Qwen2-Math (August 2024): grouped-query attention at every size.

Shapes and settings from the published `config.json` files, as quoted in public code and logs. A
base declares 131072 positions and ends a text with `<|endoftext|>`, an instruction model declares
32768 and ends with `<|im_end|>`; 72B also changes `rms_norm_eps`, from 1e-5 to 1e-6. The math
models were trained at 4096 positions with the rotary base of 1e4. 57B-A14B is the 7B with 64
experts and a shared one in every layer.

Unsure, so compare with the checkpoint's own `config.json`: the settings of Qwen2-Math, taken from
Qwen2.5-Math, which has the same shapes; there the `rms_norm_eps` of 72B-Instruct is a guess. The
reward model, RM-72B, reads the hidden states with two layers.
"""

from collections.abc import Mapping
from dataclasses import replace

from qwen_jax.config import HeadKind, LayerKind, ModelConfig, MoeSpec, RopeSpec

_FULL = LayerKind.FULL_ATTENTION

QWEN2_0_5B = ModelConfig(
    family="qwen2",
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    layer_types=(_FULL,) * 24,
    max_position_embeddings=131072,
    rope=RopeSpec(theta=1e6),
    tie_word_embeddings=True,
    qkv_bias=True,
    bos_token_id=151643,
    eos_token_ids=(151643,),
)
QWEN2_1_5B = replace(
    QWEN2_0_5B,
    hidden_size=1536,
    intermediate_size=8960,
    num_attention_heads=12,
    head_dim=128,
    layer_types=(_FULL,) * 28,
)
QWEN2_7B = replace(
    QWEN2_1_5B,
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
QWEN2_72B = replace(
    QWEN2_7B,
    hidden_size=8192,
    intermediate_size=29568,
    num_attention_heads=64,
    num_key_value_heads=8,
    layer_types=(_FULL,) * 80,
    rms_norm_eps=1e-5,
)

_57B_A14B = replace(
    QWEN2_7B,
    family="qwen2_moe",
    vocab_size=151936,
    moe=MoeSpec(
        layers=tuple(range(28)),
        num_experts=64,
        num_experts_per_tok=8,
        intermediate_size=2560,
        renormalise=False,
        shared_intermediate_size=20480,
    ),
)


def instruct(base: ModelConfig) -> ModelConfig:
    """The instruction model trained from `base`, in Qwen2 and Qwen2.5 alike."""
    return replace(base, max_position_embeddings=32768, rms_norm_eps=1e-6, eos_token_ids=(151645,))


def math(base: ModelConfig) -> ModelConfig:
    """The math model of the shape of `base`, base or instruction-tuned."""
    return replace(base, max_position_embeddings=4096, rope=RopeSpec(theta=1e4))


PRESETS: Mapping[str, ModelConfig] = {
    "qwen2-0.5b": QWEN2_0_5B,
    "qwen2-0.5b-instruct": instruct(QWEN2_0_5B),
    "qwen2-1.5b": QWEN2_1_5B,
    "qwen2-1.5b-instruct": instruct(QWEN2_1_5B),
    "qwen2-7b": QWEN2_7B,
    "qwen2-7b-instruct": instruct(QWEN2_7B),
    "qwen2-72b": QWEN2_72B,
    "qwen2-72b-instruct": instruct(QWEN2_72B),
    "qwen2-57b-a14b": _57B_A14B,
    "qwen2-57b-a14b-instruct": instruct(_57B_A14B),
    "qwen2-math-1.5b": math(QWEN2_1_5B),
    "qwen2-math-1.5b-instruct": math(instruct(QWEN2_1_5B)),
    "qwen2-math-7b": math(QWEN2_7B),
    "qwen2-math-7b-instruct": math(instruct(QWEN2_7B)),
    "qwen2-math-72b": math(QWEN2_72B),
    "qwen2-math-72b-instruct": math(instruct(QWEN2_72B)),
    "qwen2-math-rm-72b": replace(
        math(instruct(QWEN2_72B)), head=HeadKind.TWO_LAYER_SCORE, num_labels=1
    ),
}
