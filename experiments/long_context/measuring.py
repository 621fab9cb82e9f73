"""Tasks, lengths and scalings of one model: what is missing in a workdir is measured."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from experiments.long_context.key_tokens import key_spans
from experiments.long_context.records import add_scores, read_scores
from experiments.long_context.scoring import Draw, Score, draws, make_example, score
from experiments.long_context.tasks import Example, LossTask, Renderer, Task
from experiments.results import cut_tail
from qwen_jax.models.decoder import Decoder
from qwen_jax.rope_scaling import parse_rope_flag, with_rope_scaling


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked of each scaling.

    Attributes:
      tasks: name -> task.
      lengths: of texts, in tokens.
      seeds: of the texts.
      depths: how many places of a needle, evenly from the beginning to the end.
      examples: texts of each depth and seed.
    """

    tasks: Mapping[str, Task]
    lengths: Sequence[int]
    seeds: Sequence[int]
    depths: int
    examples: int

    @property
    def places(self) -> list[float]:
        """Of the needle, as shares of the text."""
        return [0.5] if self.depths == 1 else np.linspace(0, 1, self.depths).tolist()


def check(renderer: Renderer, plan: Plan) -> None:
    """Checks that texts of all tasks can be made, before any work.

    Raises:
      UserError: a task that the renderer cannot make a text of, or a length that does not hold it.
    """
    for name, task in plan.tasks.items():
        for length in (min(plan.lengths), max(plan.lengths)):
            make_example(renderer, task, draws(name, length, plan.places, plan.seeds, 1)[0])


def scaled_models(model: Decoder, ropes: Sequence[str]) -> dict[str, Decoder]:
    """`model` with each of several scalings, by what `--rope` calls it.

    Raises:
      UserError: a scaling that is unknown or that the model cannot have.
    """
    return {
        rope: model.clone(config=with_rope_scaling(model.config, parse_rope_flag(rope)))
        for rope in ropes
    }


def measure(
    workdir: Path,
    models: Mapping[str, Decoder],
    params: Any,
    renderer: Renderer,
    plan: Plan,
    batch_size: Callable[[int], int],
    origin: Mapping[str, Any],
    judge: Decoder | None = None,
) -> list[Score]:
    """Adds what `workdir` does not have yet to its results, the same texts for every model.

    Args:
      workdir: of the results.
      models: by the name that results have as their scaling.
      params: of all of them.
      renderer: of texts.
      plan: what is asked.
      batch_size: texts of a length that run together.
      origin: what results are made with.
      judge: tells of tasks that are judged which tokens are scored, with the same parameters.

    Returns:
      All results of the workdir.
    """
    cut_tail(workdir)
    done = {(s.rope, s.task, s.length, s.seed, s.number) for s in read_scores(workdir)}
    units = [(name, length) for length in sorted(plan.lengths) for name in plan.tasks]
    total = len(units) * len(models)
    with tqdm.tqdm(total=total, desc="tasks x lengths x scalings", disable=None) as bar:
        for name, length in units:
            rows, task = batch_size(length), plan.tasks[name]
            wanted = draws(name, length, plan.places, plan.seeds, plan.examples)
            left = {
                rope: [d for d in wanted if (rope, name, length, d.seed, d.number) not in done]
                for rope in models
            }
            needed = dict.fromkeys(draw for own in left.values() for draw in own)
            texts = {draw: make_example(renderer, task, draw) for draw in needed}
            if is_judged(task):
                texts = _judged(texts, judge, params, rows)
            for rope, model in models.items():
                bar.set_postfix_str(f"{name} {length} {rope}")
                own = [(draw, texts[draw]) for draw in left[rope] if draw in texts]
                if own:
                    found = list(score(model, params, rope, own, rows))
                    add_scores(workdir, found, origin)
                bar.update()
    return read_scores(workdir)


def is_judged(task: Task) -> bool:
    """Whether a judge tells what of a task's texts is scored."""
    return isinstance(task, LossTask) and task.judged


def _judged(
    texts: Mapping[Draw, Example], judge: Decoder, params: Any, batch_size: int
) -> dict[Draw, Example]:
    """Texts of which tokens that need distant ones are scored; those without one are left out."""
    found = {}
    with tqdm.tqdm(texts.items(), desc="judging", leave=False, disable=None) as bar:
        for draw, example in bar:
            spans = key_spans(judge, params, example.ids, batch_size)
            if spans:
                found[draw] = dataclasses.replace(example, answers=spans)
    if len(found) < len(texts):
        warnings.warn(
            f"{len(texts) - len(found)} of {len(texts)} texts have no token that needs distant "
            "ones, and are left out; give longer --lengths or another --judge",
            stacklevel=2,
        )
    return found
