"""Qwen (August to November 2023), the first generation: multi-head attention, untied tables.

Shapes from public copies of the published `config.json` files, whose `intermediate_size` is twice
the width here. All but 72B stretch their rotary base and scale their queries by the length of the
text beyond `seq_length`. The files name no ids that begin or end a text: `generation_config.json`
does. A chat model has the configuration of its base.

Unsure, so compare with the checkpoint's own `config.json`:
  * `rms_norm_eps` of 72B, of which one public copy has 1e-5;
  * `max_position_embeddings` of 7B and 72B;
  * 7B is as last published; the first files of that name were trained at 2048 positions.
"""

from collections.abc import Mapping
from dataclasses import replace

from qwen_jax.config import LayerKind, ModelConfig, RopeKind, RopeSpec

_FULL = LayerKind.FULL_ATTENTION


def _trained_at(length: int) -> RopeSpec:
    return RopeSpec(
        kind=RopeKind.STEPPED_NTK, original_max_position_embeddings=length, in_float32=True
    )


_1_8B = ModelConfig(
    family="qwen",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=5504,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    layer_types=(_FULL,) * 24,
    max_position_embeddings=8192,
    rope=_trained_at(8192),
    logn_length=8192,
    qkv_bias=True,
)
_7B = replace(
    _1_8B,
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    num_key_value_heads=32,
    layer_types=(_FULL,) * 32,
    max_position_embeddings=32768,
)
_14B = replace(
    _1_8B,
    vocab_size=152064,
    hidden_size=5120,
    intermediate_size=13696,
    num_attention_heads=40,
    num_key_value_heads=40,
    layer_types=(_FULL,) * 40,
    rope=_trained_at(2048),
    logn_length=2048,
)
_72B = replace(
    _14B,
    hidden_size=8192,
    intermediate_size=24576,
    num_attention_heads=64,
    num_key_value_heads=64,
    layer_types=(_FULL,) * 80,
    max_position_embeddings=32768,
    rope=RopeSpec(theta=1e6, in_float32=True),
    logn_length=None,
)

PRESETS: Mapping[str, ModelConfig] = {
    "qwen-1_8b": _1_8B,
    "qwen-1_8b-chat": _1_8B,
    "qwen-7b": _7B,
    "qwen-7b-chat": _7B,
    "qwen-14b": _14B,
    "qwen-14b-chat": _14B,
    "qwen-72b": _72B,
    "qwen-72b-chat": _72B,
}
