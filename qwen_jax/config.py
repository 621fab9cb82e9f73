"""What a model is: frozen dataclasses that describe mechanisms, never model names.

`hf_config` reads them from a published `config.json` and writes them back.
"""

import dataclasses
import enum
from collections.abc import Sequence

from qwen_jax.errors import UserError


class LayerKind(enum.StrEnum):
    """What mixes tokens in a layer; the values are those of `layer_types` in config.json."""

    FULL_ATTENTION = "full_attention"
    SLIDING_ATTENTION = "sliding_attention"
    LINEAR_ATTENTION = "linear_attention"


class RopeKind(enum.StrEnum):
    """How rotary frequencies are scaled; `nn.rope` has the formulas and their sources."""

    DEFAULT = "default"
    LINEAR = "linear"
    NTK = "ntk"
    DYNAMIC = "dynamic"
    STEPPED_NTK = "stepped_ntk"
    YARN = "yarn"
    DYNAMIC_YARN = "dynamic_yarn"
    LONGROPE = "longrope"
    PROPORTIONAL = "proportional"


class HeadKind(enum.StrEnum):
    """What reads the final hidden states, and with that, what `logits` are."""

    VOCABULARY = "vocabulary"
    NONE = "none"
    SCORE = "score"
    SCORE_WITH_BIAS = "score_with_bias"
    TWO_LAYER_SCORE = "two_layer_score"
    GUARD = "guard"


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding as data; `nn.rope` turns it into frequencies.

    Attributes:
      theta: base of the geometric series of wavelengths (`rope_theta`).
      kind: the scaling.
      factor: ratio of the length aimed at to the trained one; 1 for `default`, and where the
        length of the text tells the ratio.
      original_max_position_embeddings: trained length in tokens, read by `dynamic`, `stepped_ntk`,
        both of `yarn` and `longrope`.
      attention_factor: what cos and sin are multiplied with, 1 unless `yarn` or `longrope`.
      beta_fast, beta_slow: rotations within the trained length above which `yarn` leaves a
        frequency alone, and below which it divides it by `factor`.
      by_rotations: whether between the two `yarn` goes by a pair's rotations, as the paper has it,
        or by its index, as the paper's code and transformers have it.
      truncate: whether `yarn` rounds the ends of its ramp outwards to whole pairs.
      short_factors, long_factors: what `longrope` divides each frequency by, up to the trained
        length and beyond it.
      partial_rotary_factor: share of a head's channels, from the first on, that are rotated; of
        `proportional` the share of all pairs that turn at all.
      resonance: whether wavelengths are rounded to whole positions once they are scaled.
      in_float32: whether queries and keys are rotated in float32 and rounded after; else cos and
        sin are rounded to their dtype first.
      mrope_section: how many frequencies follow time, height and width in a model that sees
        pictures; on text the three are equal, so that it changes nothing.
    """

    theta: float = 10_000.0
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    by_rotations: bool = False
    truncate: bool = True
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0
    resonance: bool = False
    in_float32: bool = False
    mrope_section: tuple[int, ...] | None = None

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change as the text grows, and with them what a cache holds."""
        return self.kind in (RopeKind.DYNAMIC, RopeKind.DYNAMIC_YARN, RopeKind.LONGROPE)

    @property
    def depends_on_prompt(self) -> bool:
        """Whether the length of a row's prompt sets the frequencies of that row for good."""
        return self.kind is RopeKind.STEPPED_NTK


@dataclasses.dataclass(frozen=True)
class DeltaSpec:
    """The gated delta rule of linear-attention layers (arXiv 2412.06464), sizes as config.json.

    Attributes:
      num_key_heads: heads of queries and keys; value head h reads key head h // (values / keys).
      num_value_heads: heads of values, gates and states.
      key_head_dim, value_head_dim: channels of a head; a head's state is their product.
      conv_kernel_dim: taps of the causal convolution before the rule.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_dim: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                value = getattr(self, field.name)
                raise UserError(f"linear_{field.name} = {value} must be at least 1")
        if self.num_value_heads % self.num_key_heads:
            raise UserError(
                f"linear_num_value_heads = {self.num_value_heads} is not a multiple of "
                f"linear_num_key_heads = {self.num_key_heads}"
            )


@dataclasses.dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts in place of the feed-forward block.

    Attributes:
      layers: indices of the layers that have it; the others keep the dense block.
      num_experts: E.
      num_experts_per_tok: k, how many experts a token goes to.
      intermediate_size: feed-forward width of an expert.
      renormalise: whether the chosen experts' probabilities are divided by their sum
        (`norm_topk_prob`).
      shared_intermediate_size: width of the expert that every token goes to, weighted by a sigmoid
        gate; None where there is none.
      aux_loss_coef: weight of the balancing loss in training (`router_aux_loss_coef`).
      score_bias: whether each expert has a bias that takes part in the choice and not in the
        weights, as balancing without a loss trains it (arXiv 2408.15664).
    """

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    renormalise: bool
    shared_intermediate_size: int | None = None
    aux_loss_coef: float = 0.001
    score_bias: bool = False

    def __post_init__(self):
        for name in ("num_experts", "num_experts_per_tok", "intermediate_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than "
                f"num_experts = {self.num_experts}"
            )
        shared = self.shared_intermediate_size
        if shared is not None and shared < 1:
            raise UserError(f"shared_expert_intermediate_size = {shared} must be at least 1")


@dataclasses.dataclass(frozen=True)
class DualChunkSpec:
    """Dual Chunk Attention (arXiv 2402.17463): no relative position beyond `chunk_size`.

    Attributes:
      chunk_size: the largest relative position, in tokens.
      local_size: tokens of the chunk before that keep their exact distance.
      original_max_position_embeddings: text length from which scores grow with its logarithm; 0
        for never.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int = 0

    def __post_init__(self):
        if not 0 <= self.local_size < self.chunk_size:
            raise UserError(
                f"dual_chunk_attention_config: local_size = {self.local_size} must be from 0 to "
                f"below chunk_size = {self.chunk_size}"
            )
        if self.original_max_position_embeddings < 0:
            raise UserError(
                "dual_chunk_attention_config: original_max_position_embeddings = "
                f"{self.original_max_position_embeddings} must not be negative"
            )


@dataclasses.dataclass(frozen=True)
class FarSpec:
    """Attention that is exact within a window and sees otherwise what is beyond it (`nn.far`).

    Attributes:
      window: distances below it are exact.
      stretch: beyond it distances grow by 1 in so many tokens, from the window on; None for not at
        all, as in ReRoPE.
      whole: whether they do so in whole steps, as in Self-Extend.
      sinks: how many tokens at the start of a text are seen beyond the window, and no others, as in
        StreamingLLM; 0 for all.
    """

    window: int
    stretch: float | None = None
    whole: bool = False
    sinks: int = 0

    def __post_init__(self):
        if self.window < 1:
            raise UserError(f"window = {self.window} must be at least 1")
        if self.stretch is not None and self.stretch < 1:
            raise UserError(f"stretch = {self.stretch} must be at least 1")
        if self.sinks < 0 or (self.sinks and self.stretch is not None):
            raise UserError(
                f"sinks = {self.sinks} must not be negative, nor together with a stretch"
            )


@dataclasses.dataclass(frozen=True)
class GuardSpec:
    """A head that judges every token twice: as part of an answer, and as part of a query.

    Each of the two has a projection and a norm of its own, and a linear layer for the level of risk
    and one for its category.

    Attributes:
      inner_size: what is projected to (`guard_inner_size`).
      risk_levels, categories: labels of an answer (`num_risk_level`, `num_category`).
      query_risk_levels, query_categories: labels of a query.
    """

    inner_size: int
    risk_levels: int
    categories: int
    query_risk_levels: int
    query_categories: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                value = getattr(self, field.name)
                raise UserError(f"guard: {field.name} = {value} must be at least 1")

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Of the parts of `logits`: an answer's risk and category, then a query's."""
        return self.risk_levels, self.categories, self.query_risk_levels, self.query_categories


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
      output_gate: whether attention's output is multiplied by the sigmoid of a projection.
      zero_centered_norm: whether norms multiply by 1 + weight (all but the gated one).
      logn_length: trained length from which queries are scaled by log(position) / log(length);
        None for never.
      dual_chunk: of all full-attention layers; None for plain attention.
      far: of all full-attention layers, what they make of distant keys; None for nothing of note.
      delta: of the linear-attention layers; None if there are none.
      moe: the experts; None if every layer is dense.
      head: what reads the final hidden states.
      num_labels: width of a scoring head.
      guard: of a head that is one; None for the others.
      mtp_layers: layers of the head that predicts the token after the next; 0 for no such head.
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
    output_gate: bool = False
    zero_centered_norm: bool = False
    logn_length: int | None = None
    dual_chunk: DualChunkSpec | None = None
    far: FarSpec | None = None
    delta: DeltaSpec | None = None
    moe: MoeSpec | None = None
    head: HeadKind = HeadKind.VOCABULARY
    num_labels: int = 0
    guard: GuardSpec | None = None
    mtp_layers: int = 0
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
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"head_dim = {self.head_dim} and partial_rotary_factor = "
                f"{self.rope.partial_rotary_factor} make {self.rotary_dim} rotated channels, where "
                f"an even number from 2 to {self.head_dim} is needed"
            )
        based = (RopeKind.NTK, RopeKind.DYNAMIC, RopeKind.STEPPED_NTK)
        if self.rotary_dim == 2 and self.rope.kind in based:
            raise UserError(
                f"{self.rotary_dim} rotated channels have one frequency, which "
                f"{self.rope.kind.value} RoPE cannot stretch"
            )
        for name in ("short_factors", "long_factors"):
            factors = getattr(self.rope, name)
            if factors is not None and len(factors) != self.rotary_dim // 2:
                raise UserError(
                    f"{name.removesuffix('s')} has {len(factors)} numbers for "
                    f"{self.rotary_dim // 2} frequencies; give one for each"
                )
        if self.rms_norm_eps < 0:
            raise UserError(f"rms_norm_eps = {self.rms_norm_eps} must not be negative")
        sliding = LayerKind.SLIDING_ATTENTION in self.layer_types
        if sliding and (self.sliding_window is None or self.sliding_window < 1):
            raise UserError(
                f"layer_types has {LayerKind.SLIDING_ATTENTION.value} and "
                f"sliding_window = {self.sliding_window}; give a window of at least 1 token"
            )

        if self.dual_chunk is not None and self.far is not None:
            raise UserError("dual_chunk and far are two ways to see distant keys; give one")
        if self.dual_chunk is not None and sliding:
            raise UserError(
                "dual_chunk_attention_config: chunks together with sliding layers are not "
                "supported, which would need rotations of their own"
            )
        if (LayerKind.LINEAR_ATTENTION in self.layer_types) != (self.delta is not None):
            raise UserError(
                f"layer_types has {LayerKind.LINEAR_ATTENTION.value} layers exactly where the "
                "linear_* sizes are given"
            )
        if (self.head is HeadKind.GUARD) != (self.guard is not None):
            raise UserError(f"head = {self.head.value} and guard = {self.guard} do not go together")
        if self.guard is not None and sum(self.guard.widths) != self.num_labels:
            raise UserError(f"num_labels = {self.num_labels} is not the sum of {self.guard.widths}")
        if self.moe is not None and not all(
            0 <= i < self.num_hidden_layers for i in self.moe.layers
        ):
            raise UserError(f"moe layers {self.moe.layers} are not all layers of the model")

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head have a frequency."""
        if self.rope.kind is RopeKind.PROPORTIONAL:
            return self.head_dim
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_types)

    def with_layers(self, indices: Sequence[int]) -> "ModelConfig":
        """The same model with only the layers at `indices`, in that order; no MTP head.

        Raises:
          UserError: an index that no layer has.
        """
        for i in indices:
            if not 0 <= i < self.num_hidden_layers:
                raise UserError(
                    f"layer {i} is not one of the model's {self.num_hidden_layers}; count from 0"
                )
        moe = self.moe
        if moe is not None:
            sparse = tuple(new for new, old in enumerate(indices) if old in moe.layers)
            moe = dataclasses.replace(moe, layers=sparse) if sparse else None
        layer_types = tuple(self.layer_types[i] for i in indices)
        linear = LayerKind.LINEAR_ATTENTION in layer_types
        delta = self.delta if linear else None
        return dataclasses.replace(
            self, layer_types=layer_types, moe=moe, delta=delta, mtp_layers=0
        )

    def exceeds_positions(self, length: int) -> bool:
        """Whether `length` tokens are more than the declared positions, with RoPE unscaled."""
        unscaled = (RopeKind.DEFAULT, RopeKind.PROPORTIONAL)
        return self.rope.kind in unscaled and length > self.max_position_embeddings
