"""Qwen2.5, Qwen2.5-Coder, Qwen2.5-Math (September to November 2024), QwQ, WorldPM (to May 2025).

0.5B, 1.5B, 7B and 72B have the shapes of Qwen2; 3B, 14B and 32B are new, and QwQ is a 32B. Shapes
and settings from the published `config.json` files, as quoted in public code and logs. The bases
of 14B, 32B and 72B, and QwQ, declare `rms_norm_eps` 1e-5, everything else 1e-6.

Unsure, so compare with the checkpoint's own `config.json`:
  * `rms_norm_eps` of Coder-14B-Instruct, Coder-32B-Instruct and Math-72B-Instruct, taken from the
    general instruction models of those sizes;
  * `max_position_embeddings` of QwQ-32B: public quotations have both 131072 and 40960;
  * the reward models: all but their shapes and heads, taken from Math-Instruct, for WorldPM from
    the base of 72B; in particular `pad_token_id`, after which a text's last token is sought.

The 1M variants attend in chunks beyond 262144 positions. A reward model reads the hidden states
with two layers: one score for a text (RM, WorldPM), or two logits for each step of a solution
(PRM). WorldPM was trained with an empty system message.
"""

from collections.abc import Mapping
from dataclasses import replace

from configs.models.qwen2 import QWEN2_0_5B, QWEN2_1_5B, QWEN2_7B, QWEN2_72B, instruct, math
from qwen_jax.config import DualChunkSpec, HeadKind, LayerKind, ModelConfig, RopeSpec

_FULL = LayerKind.FULL_ATTENTION

_0_5B = replace(QWEN2_0_5B, max_position_embeddings=32768)
_1_5B = QWEN2_1_5B
_3B = replace(
    QWEN2_1_5B,
    hidden_size=2048,
    intermediate_size=11008,
    num_attention_heads=16,
    layer_types=(_FULL,) * 36,
    max_position_embeddings=32768,
)
_7B = QWEN2_7B
_14B = replace(
    QWEN2_7B,
    hidden_size=5120,
    intermediate_size=13824,
    num_attention_heads=40,
    num_key_value_heads=8,
    layer_types=(_FULL,) * 48,
    rms_norm_eps=1e-5,
)
_32B = replace(_14B, intermediate_size=27648, layer_types=(_FULL,) * 64)
_72B = QWEN2_72B

_QWQ = replace(_32B, eos_token_ids=(151645,))


def _coder(base: ModelConfig) -> ModelConfig:
    return replace(base, max_position_embeddings=32768)


def _1m(instruction: ModelConfig) -> ModelConfig:
    return replace(
        instruction,
        max_position_embeddings=1010000,
        rope=RopeSpec(theta=1e7),
        rms_norm_eps=1e-5,
        dual_chunk=DualChunkSpec(
            chunk_size=262144, local_size=8192, original_max_position_embeddings=262144
        ),
    )


# The preference model, and what became of it on three sets of comparisons.
_WORLD_PM = (
    "worldpm-72b",
    "worldpm-72b-helpsteer2",
    "worldpm-72b-rlhflow",
    "worldpm-72b-ultrafeedback",
)


def _reward(base: ModelConfig, num_labels: int) -> ModelConfig:
    return replace(math(instruct(base)), head=HeadKind.TWO_LAYER_SCORE, num_labels=num_labels)


PRESETS: Mapping[str, ModelConfig] = {
    "qwen2.5-0.5b": _0_5B,
    "qwen2.5-0.5b-instruct": instruct(_0_5B),
    "qwen2.5-1.5b": _1_5B,
    "qwen2.5-1.5b-instruct": instruct(_1_5B),
    "qwen2.5-3b": _3B,
    "qwen2.5-3b-instruct": instruct(_3B),
    "qwen2.5-7b": _7B,
    "qwen2.5-7b-instruct": instruct(_7B),
    "qwen2.5-14b": _14B,
    "qwen2.5-14b-instruct": instruct(_14B),
    "qwen2.5-32b": _32B,
    "qwen2.5-32b-instruct": instruct(_32B),
    "qwen2.5-72b": _72B,
    "qwen2.5-72b-instruct": instruct(_72B),
    "qwen2.5-coder-0.5b": _coder(_0_5B),
    "qwen2.5-coder-0.5b-instruct": instruct(_0_5B),
    "qwen2.5-coder-1.5b": _coder(_1_5B),
    "qwen2.5-coder-1.5b-instruct": instruct(_1_5B),
    "qwen2.5-coder-3b": _coder(_3B),
    "qwen2.5-coder-3b-instruct": instruct(_3B),
    "qwen2.5-coder-7b": _coder(_7B),
    "qwen2.5-coder-7b-instruct": instruct(_7B),
    "qwen2.5-coder-14b": _coder(_14B),
    "qwen2.5-coder-14b-instruct": instruct(_14B),
    "qwen2.5-coder-32b": _coder(_32B),
    "qwen2.5-coder-32b-instruct": instruct(_32B),
    "qwen2.5-math-1.5b": math(_1_5B),
    "qwen2.5-math-1.5b-instruct": math(instruct(_1_5B)),
    "qwen2.5-math-7b": math(_7B),
    "qwen2.5-math-7b-instruct": math(instruct(_7B)),
    "qwen2.5-math-72b": math(_72B),
    "qwen2.5-math-72b-instruct": math(instruct(_72B)),
    "qwen2.5-7b-instruct-1m": _1m(instruct(_7B)),
    "qwen2.5-14b-instruct-1m": _1m(instruct(_14B)),
    "qwen2.5-math-rm-72b": _reward(_72B, 1),
    "qwen2.5-math-7b-prm800k": _reward(_7B, 2),
    "qwen2.5-math-prm-7b": _reward(_7B, 2),
    "qwen2.5-math-prm-72b": _reward(_72B, 2),
    "qwq-32b-preview": replace(_QWQ, max_position_embeddings=32768),
    "qwq-32b": _QWQ,
    **dict.fromkeys(_WORLD_PM, replace(_72B, head=HeadKind.TWO_LAYER_SCORE, num_labels=1)),
}
