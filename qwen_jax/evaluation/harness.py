"""Tasks of lm-evaluation-harness on a model of this package."""

import contextlib
import dataclasses
import io
import logging
import math
import random
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.evaluation.figures import Figure
from qwen_jax.evaluation.harness_requests import Respondent


@dataclasses.dataclass(frozen=True)
class HarnessOptions:
    """What is run.

    Attributes:
      tasks: names of tasks, groups or tags, patterns allowed.
      task_path: a directory of task files beside the harness's own; None for these alone.
      limit: documents of each task at most, the first; None for all.
      num_fewshot: examples before each question; None for the task's own number.
      chat: whether questions are put through the chat template.
    """

    tasks: tuple[str, ...]
    task_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False


def harness_model(respondent: Respondent, name: str) -> Any:
    """The model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate` and the like.

    Args:
      respondent: answers its requests.
      name: of the tokenizer, by which the harness keeps prompts apart that it caches.

    Raises:
      UserError: lm-eval is not installed.
    """
    check_installed()
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class HarnessModel(TemplateLM):
        """Hands every request to the respondent."""

        def __init__(self):
            super().__init__()
            self.tokenizer = respondent.tokenizer

        @property
        def eot_token_id(self) -> int | None:
            return respondent.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return respondent.prefix_id

        @property
        def max_length(self) -> int:
            return respondent.max_length

        @property
        def tokenizer_name(self) -> str:
            return name.replace("/", "__")

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return respondent.encode(string, add_special_tokens)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return respondent.render(chat_history, add_generation_prompt)

        def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
            if respondent.enable_thinking:
                tasks = sorted({str(request.task_name) for request in requests})
                raise UserError(
                    f"{', '.join(tasks)}: answers are scored and none is written, so that there is "
                    "no thinking; leave thinking out, or take tasks that write"
                )
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            found = respondent.likelihoods([pair[1:] for pair in requests])
            for (texts, _, _), answer in zip(requests, found, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
            return found

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
            windows, owners = [], []
            for i, request in enumerate(requests):
                for window in utils.get_rolling_token_windows(
                    token_list=respondent.encode(request.args[0]),
                    prefix_token=respondent.prefix_id,
                    max_seq_len=respondent.max_length,
                    context_len=1,
                ):
                    windows.append(utils.make_disjoint_window(window))
                    owners.append(i)
            sums = [0.0] * len(requests)
            for i, (found, _) in zip(owners, respondent.likelihoods(windows), strict=True):
                sums[i] += found
            for request, found in zip(requests, sums, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found)
            return sums

        def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
            found = respondent.texts([request.args for request in requests])
            for request, text in zip(requests, found, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            return found

    return HarnessModel()


def run_harness(
    respondent: Respondent,
    options: HarnessOptions,
    name: str,
    tasks: Mapping[str, Any] | None = None,
) -> tuple[list[Figure], list[dict[str, Any]]]:
    """Runs the tasks.

    Args:
      respondent: the model.
      options: what is run.
      name: of the model.
      tasks: as `find_tasks` returns them, where that has been called.

    Returns:
      The scores, and each document with what was answered and how that was scored.

    Raises:
      UserError: lm-eval is not installed, or a task is unknown, broken, or asks for what is not
        supported.
    """
    model = harness_model(respondent, name)
    from lm_eval.evaluator import evaluate

    tasks = find_tasks(options) if tasks is None else tasks
    for task in tasks["tasks"].values():
        _set_examples(task, options.num_fewshot, respondent.seed)
    # Tasks draw from these, and not from generators of their own.
    random.seed(respondent.seed)
    np.random.seed(respondent.seed)
    with _quiet():
        results = evaluate(
            model,
            tasks,
            limit=options.limit,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
            # Its bootstrap forks processes, which JAX's threads do not survive.
            bootstrap_iters=0,
        )
    samples = [
        {"task": task, **sample} for task, found in results["samples"].items() for sample in found
    ]
    return _figures(results, samples), samples


def _set_examples(task: Any, num_fewshot: int | None, seed: int) -> None:
    """As the harness does it: a task that says 0 has none, whatever is asked for."""
    own = task.get_config("num_fewshot")
    if own == 0 and num_fewshot:
        warnings.warn(
            f"task {task.config.task} allows no examples, and gets none of the {num_fewshot}",
            stacklevel=3,
        )
    elif num_fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


def find_tasks(options: HarnessOptions) -> Mapping[str, Any]:
    """Looks the tasks up and loads them, before a model has to run; as the harness has them.

    Raises:
      UserError: lm-eval is not installed, or a task is unknown or cannot be loaded.
    """
    check_installed()
    with _quiet():
        return _find_tasks(options)


def check_installed() -> None:
    """Imports lm-eval.

    Raises:
      UserError: it is not installed.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError:
        raise UserError(
            "tasks of lm-evaluation-harness need lm-eval; install it (pip install lm-eval)"
        ) from None


def _find_tasks(options: HarnessOptions) -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    path = options.task_path
    if path is not None and not path.is_dir():
        raise UserError(f"{path}: no directory of task files; give one")
    manager, missing = None, list(options.tasks)
    # Its own task files are thousands, which take half a minute to read.
    for include_defaults in (False, True):
        if not missing or (path is None and not include_defaults):
            continue
        manager = TaskManager(
            include_path=None if path is None else str(path), include_defaults=include_defaults
        )
        missing = [name for name in options.tasks if not manager.match_tasks([name])]
    if missing:
        where = "" if path is None else f" nor in {path}"
        raise UserError(
            f"task {missing[0]} is not in the harness{where}; python -m lm_eval ls tasks lists them"
        )
    found = (task for name in options.tasks for task in manager.match_tasks([name]))
    tasks = list(dict.fromkeys(found))
    try:
        loaded = manager.load(tasks)
    except Exception as error:  # Of the task's file, its data, or a package that it needs.
        raise UserError(
            f"task {', '.join(tasks)} cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    for name, task in loaded["tasks"].items():
        for trait, why in (
            ("UNSAFE_CODE", "runs code that the model has written"),
            ("MULTIMODAL", "asks about more than text"),
        ):
            if getattr(task, trait, False):
                raise UserError(f"task {name} {why}, which is not supported; leave it out")
    return loaded


def _figures(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> list[Figure]:
    figures = []
    for task, scores in results["results"].items():
        own = [sample for sample in samples if sample["task"] == task]
        count = results["n-samples"][task]["effective"] if task in results["n-samples"] else None
        for key, value in scores.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            values = [s.get(metric) for s in own if s.get("filter", filter_name) == filter_name]
            error = _standard_error(values, value)
            if filter_name != "none":
                metric = f"{metric}, {filter_name}"
            figures.append(
                Figure(
                    "harness",
                    task,
                    metric,
                    float(value),
                    None if error is None else value - 1.96 * error,
                    None if error is None else value + 1.96 * error,
                    count,
                )
            )
    return figures


def _standard_error(values: Sequence[Any], mean: float) -> float | None:
    """Of a score that is the mean of its documents'; None for any other."""
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return None
    if not math.isclose(statistics.fmean(values), mean, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return statistics.stdev(values) / len(values) ** 0.5


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness's remarks and bars to a terminal, and off standard output."""
    import datasets
    import tqdm
    from lm_eval.api import task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bar, were_off = task.tqdm, datasets.are_progress_bars_disabled()

    def terminal_bar(*arguments: Any, **settings: Any) -> Any:
        return tqdm.tqdm(*arguments, **{"disable": None, **settings})

    for logger in loggers:
        logger.setLevel(logging.ERROR)
    task.tqdm = terminal_bar
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        task.tqdm = bar
        if not were_off:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
