"""Small Qwen3 models for long-context studies: sizes, training texts, training.

What makes a model fail beyond its trained length is the share of its rotary pairs that never turn
once in training. The base is chosen so that this share is Qwen3's, which a small model with the
base of a large one would miss by far.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from experiments.initial import draw_params
from experiments.long_context.tasks import Example, LossTask, PassKeyTask, RecallTask, Task
from experiments.long_context.tokens import Language, TokenRenderer
from qwen_jax.config import LayerKind, ModelConfig, RopeSpec
from qwen_jax.errors import UserError
from qwen_jax.inference.likelihood import token_likelihoods
from qwen_jax.models.decoder import Decoder
from qwen_jax.training.checkpoints import Checkpoints
from qwen_jax.training.loop import LoopOptions, train
from qwen_jax.training.optimisers import OptimiserOptions, make_optimiser, make_schedule
from qwen_jax.training.report import ReportOptions, open_sinks
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.train_step import init_train_state, make_train_step
from tools import command_line

# Of Qwen3: its base and the length that it was trained at, before YaRN (arXiv 2505.09388).
_LIKE_BASE, _LIKE_TRAINED = 1e6, 32_768
# Of YaRN (arXiv 2309.00071): turns within the trained length above which a pair is left alone.
_LIKE_BETA_FAST = 32.0

# Rows of a step for each trained length that a row is.
_ROWS = 16
# Weights of tokens in the loss; what nothing predicts teaches little.
_ANSWER, _FILLER, _DRAWN = 5.0, 1.0, 0.1
# What share of the training texts are of which kind.
_MIX = {"recall": 0.5, "pass_key": 0.1, "plain": 0.1, "copy": 0.3}
# Parts of the steps at a quarter, half, and the whole of the trained length.
_CURRICULUM = ((4, 4 / 9), (2, 1 / 9), (1, 4 / 9))

_OPTIMISER = OptimiserOptions(
    learning_rate=3e-3,
    schedule="cosine",
    warmup_steps=90,
    final_learning_rate=0.05,
    weight_decay=0.01,
    b2=0.98,
)
_STEP = TrainOptions(dtype="float32", scan=False, remat="none")


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """Sizes of a small model, and how long it is trained.

    Attributes:
      trained: length that it is trained at, in tokens.
      base: of its rotary embedding; None for the one that leaves as large a share of its pairs
        without a turn as Qwen3's.
      head_dim: of its four heads, with two of keys and values.
      layers: how many.
      qk_norm: whether queries and keys are normed.
      steps: of training.
    """

    trained: int = 128
    base: float | None = None
    head_dim: int = 32
    layers: int = 2
    qk_norm: bool = True
    steps: int = 900

    def __post_init__(self):
        if self.trained < 64 or self.trained % 4:
            raise UserError(
                f"--trained={self.trained}: small models begin with a quarter of it, which a pass "
                "key has to fit into; give a multiple of 4 from 64 on"
            )
        if self.head_dim % 2:
            raise UserError(f"--head_dim={self.head_dim}: RoPE turns pairs; give an even number")

    @property
    def theta(self) -> float:
        """The base that is taken."""
        return same_regime_base(self.trained) if self.base is None else self.base

    def config(self, language: Language) -> ModelConfig:
        """Of the model, for a vocabulary."""
        return ModelConfig(
            family="qwen3",
            vocab_size=language.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=self.head_dim,
            layer_types=(LayerKind.FULL_ATTENTION,) * self.layers,
            max_position_embeddings=self.trained,
            rope=RopeSpec(theta=self.theta),
            tie_word_embeddings=True,
            qk_norm=self.qk_norm,
            dtype="float32",
        )


def same_regime_base(trained: int) -> float:
    """The base of which a pair at the same share of all turns once within `trained` tokens.

    The wavelength 2 pi b^x of a pair at the share x of all pairs is `trained` where Qwen3's is its
    trained length.
    """
    turns, like_turns = trained / (2 * math.pi), _LIKE_TRAINED / (2 * math.pi)
    return math.exp(math.log(turns) * math.log(_LIKE_BASE) / math.log(like_turns))


def same_regime_beta_fast(trained: int, base: float) -> float:
    """YaRN's `beta_fast` at which its ramp begins at the same share of all pairs as in Qwen3."""
    share = math.log(_LIKE_TRAINED / (2 * math.pi * _LIKE_BETA_FAST)) / math.log(_LIKE_BASE)
    return trained / (2 * math.pi * base**share)


@dataclasses.dataclass(frozen=True)
class TrainingTexts:
    """Batches of training texts by their number, for grain.

    Attributes:
      language: of the texts.
      seed: of all of them.
      lengths: of the rows of each batch, in tokens.
      tokens: of a batch.
    """

    language: Language
    seed: int
    lengths: tuple[int, ...]
    tokens: int

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.lengths)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """`Batch`'s `input_ids` and `loss_weights`, [rows, length]."""
        length = self.lengths[number]
        rng = np.random.default_rng([self.seed, number])
        renderer = TokenRenderer(self.language)
        kinds = rng.choice(list(_MIX), self.tokens // length, p=list(_MIX.values()))
        examples = [training_text(renderer, self.language, kind, length, rng) for kind in kinds]
        ids = np.array([example.ids for example in examples], np.int32)
        weights = np.full(ids.shape, _FILLER, np.float32)
        for row, example in enumerate(examples):
            for spans, weight in ((example.drawn, _DRAWN), (example.answers, _ANSWER)):
                for begin, end in spans:
                    weights[row, begin:end] = weight
        return {"input_ids": ids, "loss_weights": weights}


def training_text(
    renderer: TokenRenderer, language: Language, kind: str, length: int, rng: np.random.Generator
) -> Example:
    """A text to learn from.

    Args:
      renderer: of texts of tasks.
      language: of the renderer.
      kind: "recall", "pass_key", "plain" filler, or "copy": filler with a run of random keys and
        values that comes twice, which is what a model learns recall from.
      length: in tokens.
      rng: what it is drawn from.
    """
    match kind:
        case "recall":
            least, most = math.ceil(0.05 * length), max(int(0.1 * length), 1)
            task: Task = RecallTask(min(int(rng.integers(least, most + 1)), language.num_keys))
        case "pass_key":
            task = PassKeyTask()
        case "plain":
            # Nothing is asked: all weights are those of filler.
            ids = renderer.render(LossTask(parts=1).draw(rng, None), length, rng).ids
            return Example(ids, ())
        case _:
            return _copy(language, length, rng)
    return renderer.render(task.draw(rng, None), length, rng)


def _copy(language: Language, length: int, rng: np.random.Generator) -> Example:
    size = int(rng.integers(4, max((length - 1) // 2, 4) + 1))
    span = rng.integers(language.first_key, language.first_value + language.num_values, size)
    first = int(rng.integers(1, length - 2 * size + 1))
    second = int(rng.integers(first + size, length - size + 1))
    ids = [language.begin, *language.filler(rng, length - 1)]
    ids[first : first + size] = span.tolist()
    ids[second : second + size] = span.tolist()
    # The second run is predictable but for where it begins.
    return Example(
        ids, ((second + 1, second + size),), ((first, first + size), (second, second + 1))
    )


def curriculum(model: SmallModel) -> tuple[int, ...]:
    """The length of the rows of each step: short ones first, which bring recall forward."""
    edges = np.cumsum([0, *(share for _, share in _CURRICULUM)])
    lengths: list[int] = []
    for (part, _), edge in zip(_CURRICULUM, edges[1:], strict=True):
        lengths += [model.trained // part] * (round(edge * model.steps) - len(lengths))
    return tuple(lengths)


Measure = Callable[[Any], dict[str, float]]


def train_from_scratch(
    model: SmallModel,
    language: Language,
    seed: int,
    directory: Path,
    steps: int | None = None,
) -> Any:
    """The parameters of a small model behind `steps` of its training, or all of it.

    What is there of it in `directory` is gone on from.
    """
    config = model.config(language)
    lengths = curriculum(model)
    texts = TrainingTexts(language, seed, lengths, _ROWS * model.trained)
    params = draw_params(config, jax.random.key(seed))
    return _train(Decoder(config), params, texts, _OPTIMISER, directory, steps or model.steps)


def fine_tune(
    model: Decoder,
    params: Any,
    texts: TrainingTexts,
    directory: Path,
    measure: Measure,
    every: int,
) -> Any:
    """The parameters behind training on all of `texts`, measured now and then on the way.

    Args:
      model: with the scaling that is trained.
      params: to begin with; they are copied.
      texts: all of one length.
      directory: of the run, with its checkpoints and `metrics.jsonl`.
      measure: figures of parameters.
      every: steps between measurements.
    """
    options = dataclasses.replace(_OPTIMISER, learning_rate=1e-3, warmup_steps=5)
    return _train(model, params, texts, options, directory, len(texts), measure, every)


def _train(
    model: Decoder,
    params: Any,
    texts: TrainingTexts,
    options: OptimiserOptions,
    directory: Path,
    steps: int,
    measure: Measure | None = None,
    every: int = 0,
) -> Any:
    warmup = min(options.warmup_steps, len(texts) // 10)
    options = dataclasses.replace(options, warmup_steps=warmup)
    optimiser = make_optimiser(options, len(texts), params)
    with Checkpoints(directory, keep=1) as checkpoints:
        state, done = train(
            make_train_step(model, optimiser, _STEP),
            init_train_state(model, optimiser, params=params),
            iter(grain.MapDataset.source(texts).to_iter_dataset()),
            LoopOptions(num_steps=steps, eval_every=every),
            checkpoints,
            lambda start: open_sinks(directory, ReportOptions(), start, steps, {}),
            schedule=make_schedule(options, len(texts)),
            evaluate=None if measure is None else lambda state: measure(state.params),
            every=10,
        )
    # What comes next would take a model for what it is not yet.
    command_line.leave_if_stopped(done, steps)
    return state.params


def recall(
    model: Decoder, params: Any, language: Language, length: int, num_texts: int, seed: int
) -> float:
    """The share of right answers in texts of associative recall."""
    renderer = TokenRenderer(language)
    keys = max(min(RecallTask().num_keys, length // 10), 1)
    examples = []
    for number in range(num_texts):
        rng = np.random.default_rng([seed, length, number])
        examples.append(renderer.render(RecallTask(keys).draw(rng, None), length, rng))
    with warnings.catch_warnings():
        # Texts longer than the model's positions are what this is about.
        warnings.simplefilter("ignore")
        found = token_likelihoods(
            model, params, [e.ids for e in examples], [e.start for e in examples], num_texts
        )
    right = [
        likelihood.greedy[begin - example.start : end - example.start].all()
        for example, likelihood in zip(examples, found, strict=True)
        for begin, end in example.answers
    ]
    return float(np.mean(right))
