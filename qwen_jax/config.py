"""What a model is: frozen dataclasses that describe mechanisms, never model names.

`hf_config` reads them from a published `config.json` and writes them back.
"""

import dataclasses
import enum

from qwen_jax.errors import UserError


class LayerKind(enum.StrEnum):
    """What mixes tokens in a layer; the values are those of `layer_types` in config.json."""

    FULL_ATTENTION = "full_attention"
    SLIDING_ATTENTION = "sliding_attention"


class RopeKind(enum.StrEnum):
    """How rotary frequencies are scaled; the values are those of `rope_type` in config.json."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding as data; `nn.rope` turns it into frequencies.

    Attributes:
      theta: base of the geometric series of wavelengths (`rope_theta`).
      kind: the scaling.
      factor: ratio of the length aimed at to the trained one; 1 for `default`.
      original_max_position_embeddings: trained length in tokens, read by `dynamic` and `yarn`.
      attention_factor: what cos and sin are multiplied with, 1 unless `yarn`.
      beta_fast, beta_slow: rotations within the trained length above which `yarn` leaves a
        frequency alone, and below which it divides it by `factor`.
      truncate: whether `yarn` rounds the ends of its ramp outwards to whole pairs.
    """

    theta: float = 10_000.0
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change as the text grows, so that cached keys stay unrotated."""
        return self.kind is RopeKind.DYNAMIC


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model, field names as config.json spells them where it has them.

    Attributes:
      family: which table of tensor names the checkpoint uses; read by `hf_config` and
        `checkpoint.names` only.
      layer_types: the token mixer of each layer, first to last.
      sliding_window: how many tokens, itself included, a query of a sliding layer sees.
      qkv_bias, output_bias: biases on the query, key and value projections, and on the output one.
      qk_norm: RMSNorm over each head of queries and keys, before rotation.
      max_position_embeddings: the length that the checkpoint declares, in tokens.
      dtype: of the checkpoint's tensors.
      eos_token_ids: ids that end a text, as config.json has them.

    Raises:
      UserError: sizes that contradict each other.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[LayerKind, ...]
    max_position_embeddings: int
    rope: RopeSpec = RopeSpec()
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1")
        if not self.layer_types:
            raise UserError("num_hidden_layers = 0 must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim = {self.head_dim} is odd, and rotation pairs its channels")
        if self.head_dim == 2 and self.rope.kind is RopeKind.DYNAMIC:
            raise UserError("head_dim = 2 has one frequency, which dynamic RoPE cannot stretch")
        if self.rms_norm_eps < 0:
            raise UserError(f"rms_norm_eps = {self.rms_norm_eps} must not be negative")
        sliding = LayerKind.SLIDING_ATTENTION in self.layer_types
        if sliding and (self.sliding_window is None or self.sliding_window < 1):
            raise UserError(
                f"layer_types has {LayerKind.SLIDING_ATTENTION.value} and "
                f"sliding_window = {self.sliding_window}; give a window of at least 1 token"
            )

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_types)

    def exceeds_positions(self, length: int) -> bool:
        """Whether `length` tokens are more than the declared positions, with RoPE unscaled."""
        return self.rope.kind is RopeKind.DEFAULT and length > self.max_position_embeddings
