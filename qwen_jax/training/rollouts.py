"""Rollouts: prompts -> groups of answers by the model as it is -> what they are worth."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.inference.completion import ends_inside_reasoning
from qwen_jax.inference.decoding import TokenStream, bucket
from qwen_jax.inference.sampling import SamplingOptions
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.cache import init_cache
from qwen_jax.text import Tokenizer
from qwen_jax.text.parsing import THINK_OPEN
from qwen_jax.training.batch import Batch
from qwen_jax.training.data.prompts import PromptRecords
from qwen_jax.training.data.records import Record
from qwen_jax.training.grpo import Answers, GrpoOptions, advantages_of
from qwen_jax.training.rewards import judge


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The answers to P prompts, G each.

    Attributes:
      prompts: token ids, P of them.
      answers: P lists of G answers' token ids, the stop id included.
      rewards: float64 [P, G].
      terms: of each reward by name, before its weight, [P, G].
      cut: bool [P, G], which had not ended after the most tokens.
    """

    prompts: list[list[int]]
    answers: list[list[list[int]]]
    rewards: np.ndarray
    terms: dict[str, np.ndarray]
    cut: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int [P, G], tokens of each answer."""
        return np.array([[len(ids) for ids in group] for group in self.answers])


def write_answers(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int],
    seed: int,
    length: int,
    write_batch: int | None = None,
) -> list[list[int]]:
    """New token ids for each prompt, the stop id included.

    Every call with as many prompts runs the same compiled programs: one for a token, one for
    prompts of each of few lengths.

    Args:
      model, params: as `load_pretrained` returns them.
      prompts: token ids, a row each.
      sampling: how tokens are drawn.
      max_new_tokens: of each row.
      stop_ids: ids that end a row.
      seed: of the draws; a row's are of its number among all prompts.
      length: of a prompt with its answer at most; the cache has room for that.
      write_batch: rows that run together; None for all.
    """
    rows = len(prompts) if write_batch is None else min(write_batch, len(prompts))
    dtype = params["embed_tokens"]["weight"].dtype
    found: list[list[int]] = []
    for start in range(0, len(prompts), rows):
        own = list(prompts[start : start + rows])
        # A batch that is not full compiles nothing new.
        batch = own + own[-1:] * (rows - len(own))
        # All of it from the start: another capacity would be another program.
        cache = init_cache(model.config, rows, bucket(length), dtype, model.mesh)
        stream = TokenStream(
            model, params, batch, max_new_tokens, sampling, stop_ids, seed, cache, start
        )
        for row in range(len(own), rows):
            stream.stop(row)
        new: list[list[int]] = [[] for _ in own]
        for step in stream:
            for ids, token in zip(new, step, strict=False):
                if token is not None:
                    ids.append(token)
        found += new
    return found


def roll_out(
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    records: Sequence[Record],
    options: GrpoOptions,
    *,
    stop_ids: Collection[int],
    seed: int,
    length: int,
    greedy: bool = False,
) -> Rollout:
    """Writes a group of answers to each prompt and judges them.

    Args:
      model, params, tokenizer: that answer.
      prompts: token ids.
      records: of the prompts, for the rewards.
      options: of the answers and rewards.
      stop_ids: ids that end an answer.
      seed: of the draws.
      length: as for `write_answers`.
      greedy: whether each prompt has one answer of the most likely tokens instead.

    Raises:
      UserError: a reward cannot be told of a record; names FILE:LINE. Logits are not numbers.
    """
    group = 1 if greedy else options.group_size
    sampling = SamplingOptions(0.0 if greedy else options.temperature, top_p=options.top_p)
    rows = write_answers(
        model,
        params,
        [prompt for prompt in prompts for _ in range(group)],
        sampling,
        max_new_tokens=options.max_new_tokens,
        stop_ids=stop_ids,
        seed=seed,
        length=length,
        write_batch=options.write_batch,
    )
    answers = [rows[start : start + group] for start in range(0, len(rows), group)]
    shape = (len(prompts), group)
    cut = np.array([ids[-1] not in stop_ids for ids in rows]).reshape(shape)
    rewards = np.zeros(shape)
    terms = {term.name: np.zeros(shape) for term in options.rewards}
    for p, (prompt, record) in enumerate(zip(prompts, records, strict=True)):
        begun = f"{THINK_OPEN}\n" if ends_inside_reasoning(tokenizer, prompt) else ""
        for g, ids in enumerate(answers[p]):
            text = begun + tokenizer.decode(ids, skip_special_tokens=True)
            total, values = judge(options.rewards, record, text)
            if cut[p, g] and options.cut_answers == "zero":
                continue
            rewards[p, g] = total
            for name, value in values.items():
                terms[name][p, g] = value
    return Rollout([list(prompt) for prompt in prompts], answers, rewards, terms, cut)


def to_learn(rollout: Rollout, options: GrpoOptions, prompts: int, length: int) -> Answers:
    """The rows of a rollout, a group's next to each other, as numpy arrays.

    Args:
      rollout: of at most `prompts` prompts; in the place of others are rows of padding.
      options: of the rollout.
      prompts: so many groups.
      length: of a row.
    """
    rows = prompts * options.group_size
    ids = np.zeros((rows, length), np.int32)
    mask = np.zeros((rows, length), bool)
    weights = np.zeros((rows, length), np.float32)
    advantages = np.zeros((rows,), np.float32)
    flat = advantages_of(rollout.rewards, options.normalise).reshape(-1)
    advantages[: len(flat)] = flat
    for p, (prompt, group) in enumerate(zip(rollout.prompts, rollout.answers, strict=True)):
        for g, answer in enumerate(group):
            row = p * options.group_size + g
            begin, end = len(prompt), len(prompt) + len(answer)
            ids[row, :end] = [*prompt, *answer]
            mask[row, :end] = True
            is_learned = not (rollout.cut[p, g] and options.cut_answers == "mask")
            weights[row, begin:end] = is_learned
    return Answers(Batch(ids, loss_weights=weights, attention_mask=mask), advantages)


def figures_of(rollout: Rollout) -> dict[str, float]:
    """What is reported of a rollout.

    Returns:
      "reward", the mean over answers, and "reward_std", their standard deviation; "reward_NAME" of
      each term's mean; "no_signal", the share of groups whose rewards are all equal;
      "answer_tokens", the mean length, and "cut_share", of the answers that had not ended.
    """
    spread = rollout.rewards.max(axis=1) - rollout.rewards.min(axis=1)
    return {
        "reward": float(rollout.rewards.mean()),
        "reward_std": float(rollout.rewards.std()),
        **{f"reward_{name}": float(values.mean()) for name, values in rollout.terms.items()},
        "no_signal": float((spread == 0).mean()),
        "answer_tokens": float(rollout.lengths.mean()),
        "cut_share": float(rollout.cut.mean()),
    }


def read_prompts(
    arrays: Mapping[str, np.ndarray], records: PromptRecords
) -> tuple[list[list[int]], list[Record]]:
    """The prompts of a batch of `data.prompts`, without what fills it up, and their records."""
    prompts, found = [], []
    for ids, mask, place in zip(
        arrays["input_ids"], arrays["attention_mask"], arrays["place"], strict=True
    ):
        if mask.any():
            prompts.append(ids[mask].tolist())
            found.append(records[place])
    return prompts, found
