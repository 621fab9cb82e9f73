"""How a model answers: teacher-forced, so that one pass tells what greedy decoding would write.

All tokens of an answer are the likeliest, each after the right ones before it, exactly where greedy
decoding writes that answer. Scalings that go by the length of a text, however, have that of the
whole text here, which matters for answers that do not stand at its end. The negative log-likelihood
beside it tells models apart that are all right or all wrong.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.long_context.tasks import WITH_DEPTH, Example, Renderer, Task
from qwen_jax.errors import UserError
from qwen_jax.inference.likelihood import token_likelihoods
from qwen_jax.models.decoder import Decoder

# Tokens that a text may always be short of, such as those of a sentence.
_FEW = 256


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one text.

    Attributes:
      rope: the scaling, as `--rope` has it.
      task: its name.
      length: that was asked for, in tokens.
      depth: of the needle; None where it is drawn, or there are several.
      seed, number: which draw it is.
      tokens: of the text.
      right: whether all answers are what greedy decoding writes.
      share: of the answers that are, each after the right ones before it.
      nats: negative log-likelihood of a token of the answers, their mean.
      digest: of the text's tokens and what of them is scored, the same for every scaling.
      by_place: of each answer where it begins, as a share of the text, and its own nats a token.
    """

    rope: str
    task: str
    length: int
    depth: float | None
    seed: int
    number: int
    tokens: int
    right: bool
    share: float
    nats: float
    digest: str
    by_place: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which text: as `Score` has it."""

    task: str
    length: int
    depth: float | None
    seed: int
    number: int


def draws(
    task: str, length: int, depths: Sequence[float], seeds: Sequence[int], count: int
) -> list[Draw]:
    """All texts of a task and a length.

    Args:
      task: its name.
      length: in tokens.
      depths: of the needle, where the task has one that can be put there.
      seeds: which.
      count: texts of each depth and seed; of a task without depths, for each of `depths` as well,
        so that all tasks have as many.
    """
    with_depth = task in WITH_DEPTH
    return [
        Draw(task, length, depth if with_depth else None, seed, i * count + j)
        for seed in seeds
        for i, depth in enumerate(depths)
        for j in range(count)
    ]


def make_example(renderer: Renderer, task: Task, draw: Draw) -> Example:
    """The text of a draw; it depends on nothing else but the task, the tokenizer and the filler.

    Raises:
      UserError: the renderer cannot fill a text of that length.
    """
    name = f"{draw.task} {draw.length} {draw.seed} {draw.number}"
    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    example = renderer.render(task.draw(rng, draw.depth), draw.length, rng)
    missing = draw.length - len(example.ids)
    if missing > max(draw.length // 10, _FEW):
        raise UserError(
            f"--tasks={draw.task}: what there is fills {len(example.ids)} of {draw.length} tokens; "
            "give shorter --lengths, or more documents or words"
        )
    return example


def score(
    model: Decoder,
    params: Any,
    rope: str,
    texts: Sequence[tuple[Draw, Example]],
    batch_size: int,
) -> Iterator[Score]:
    """How a model with a scaling answers.

    Args:
      model: with the scaling, and a vocabulary head.
      params: of the model.
      rope: the scaling's name.
      texts: drawn and rendered.
      batch_size: texts that run together.

    Raises:
      UserError: as `token_likelihoods`.
    """
    examples = [example for _, example in texts]
    with warnings.catch_warnings():
        # Texts longer than the model's positions are what this is about.
        warnings.simplefilter("ignore")
        found = token_likelihoods(
            model,
            params,
            [example.ids for example in examples],
            [example.start for example in examples],
            batch_size,
        )
    for (draw, example), likelihood in zip(texts, found, strict=True):
        answers = [
            slice(begin - example.start, end - example.start) for begin, end in example.answers
        ]
        rights = [bool(likelihood.greedy[answer].all()) for answer in answers]
        nats = -likelihood.log_probs
        length = len(example.ids)
        yield Score(
            rope,
            **dataclasses.asdict(draw),
            tokens=length,
            right=all(rights),
            share=float(np.mean(rights)),
            nats=float(np.concatenate([nats[answer] for answer in answers]).mean()),
            digest=_digest(example),
            by_place=tuple(
                (round(begin / length, 4), round(float(nats[answer].mean()), 5))
                for (begin, _), answer in zip(example.answers, answers, strict=True)
            ),
        )


def _digest(example: Example) -> str:
    numbers = [*example.ids, *(place for span in example.answers for place in span)]
    return hashlib.sha256(np.array(numbers, np.int32).tobytes()).hexdigest()[:16]
