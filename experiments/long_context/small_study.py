"""All scalings on small models that the study trains itself: minutes on two cores.

For each seed a model is trained, asked what it has learned at its trained length, read with every
scaling at up to 16 times that, and fine-tuned for a few steps with some of them.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm

from experiments.files import replace
from experiments.long_context.measuring import Plan, is_judged, measure, scaled_models
from experiments.long_context.measuring import check as check_texts
from experiments.long_context.scoring import Score
from experiments.long_context.small_model import (
    SmallModel,
    TrainingTexts,
    fine_tune,
    recall,
    same_regime_beta_fast,
    train_from_scratch,
)
from experiments.long_context.tasks import Task
from experiments.long_context.tokens import Language, TokenRenderer
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.training.report import read_log
from tools.jsonl_rows import read_rows

# Recall at the trained length from which a model's answers beyond it say something.
LEARNED = 0.95
# Where recall has not formed at a quarter of the length behind the steps there, another draw of the
# parameters is taken.
_FORMED, _TRIES = 0.9, 3
FACTOR = 4
_FINE_TUNING_STEPS, _BETWEEN = 60, 5
_RECALL_TEXTS = 16
# Of each seed's model, a line.
_MODELS = "models.jsonl"
# Of the fine-tuned, in the results.
TUNED = " (fine-tuned)"

LANGUAGE = Language()


def methods(model: SmallModel) -> dict[str, str]:
    """What is compared, by what reports call it, as `--rope` has it."""
    trained, s = model.trained, FACTOR
    ramp = f"original={trained},beta_fast={same_regime_beta_fast(trained, model.theta):.3g}"
    stepped = f"stepped_ntk,original={trained}"
    abf = f"none,rope_theta={10 * model.theta:.6g}"
    half, quarter = trained // 2, trained // 4
    logn = "logn=true"
    return {
        "none": "none",
        "none + logn": f"none,{logn}",
        "PI": f"linear:{s}",
        "NTK": f"ntk:{s}",
        "NTK + logn": f"ntk:{s},{logn}",
        "dynamic NTK": "dynamic:1",
        "Qwen1 NTK": stepped,
        "Qwen1 NTK + logn": f"{stepped},{logn}",
        "Qwen1 NTK + logn + window": f"{stepped},{logn},window={half},window_layers=1",
        "by parts": f"ntk_by_parts:{s},{ramp}",
        "YaRN": f"yarn:{s},{ramp}",
        "YaRN + logn": f"yarn:{s},{ramp},{logn}",
        "YaRN x16": f"yarn:16,{ramp}",
        "dynamic YaRN": f"dynamic_yarn,{ramp}",
        "resonance YaRN": f"resonance_yarn:{s},{ramp}",
        "llama3": f"llama3:{s},original={trained},low_freq_factor=1,high_freq_factor=4",
        "ABF": abf,
        "ABF + logn": f"{abf},{logn}",
        "p-RoPE": "proportional,partial_rotary_factor=0.625",
        "DCA": "dca",
        "DCA + logn": f"dca,{logn}",
        "DCA + temperature": "dca,temperature=true",
        "ReRoPE": f"rerope,window={half}",
        "ReRoPE + logn": f"rerope,window={half},{logn}",
        "leaky ReRoPE + logn": f"rerope,window={half},stretch=16,{logn}",
        "Self-Extend": f"self_extend:16,window={quarter}",
        "Self-Extend + logn": f"self_extend:16,window={quarter},{logn}",
        "window": f"none,window={half}",
        "sinks": f"sinks,window={half - 4}",
    }


# What is trained on with longer texts, of `methods`.
FINE_TUNED = ("none", "PI", "NTK", "YaRN", "ABF")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A seed's model: what it has learned before any scaling, and how fast it adapts to each.

    Attributes:
      seed: of the model.
      tries: draws of its parameters, the last of which is the model.
      recall: share of right answers at the trained length.
      adapting: scaling -> pairs of the steps of fine-tuning and the share of right answers at the
        longer length, from before the first step on.
    """

    seed: int
    tries: int
    recall: float
    adapting: Mapping[str, Sequence[tuple[int, float]]]

    @property
    def learned(self) -> bool:
        """Whether its answers beyond the trained length say something."""
        return self.recall >= LEARNED

    def steps(self, rope: str) -> int | None:
        """From which on enough is right; None for never."""
        found = None
        for step, share in self.adapting[rope]:
            if share < LEARNED:
                found = None
            elif found is None:
                found = step
        return found


def check(tasks: Mapping[str, Task], lengths: Sequence[int], depths: int) -> None:
    """Checks that texts of all tasks can be made, before anything is trained.

    Raises:
      UserError: a task that needs words or a judge, or a length that does not hold it.
    """
    for name, task in tasks.items():
        if is_judged(task):
            raise UserError(f"--tasks={name} needs a judge; give a --model")
    check_texts(TokenRenderer(LANGUAGE), Plan(tasks, lengths, (0,), depths, 1))


def run(
    workdir: Path,
    model: SmallModel,
    seeds: int,
    tasks: Mapping[str, Task],
    lengths: Sequence[int],
    depths: int,
    examples: int,
    origin: Mapping[str, Any],
) -> list[Score]:
    """Trains, measures and fine-tunes what `workdir` does not have yet.

    Args:
      workdir: of the study; models are in `models/`, a directory for each run of training.
      model: what is trained.
      seeds: how many models.
      tasks: that are asked, by name.
      lengths: of texts, in tokens.
      depths, examples: as `Plan` has them.
      origin: what results are made with.

    Returns:
      All results of the workdir.

    Raises:
      UserError: recall has formed in none of several draws of a seed's parameters.
    """
    renderer, decoder = TokenRenderer(LANGUAGE), Decoder(model.config(LANGUAGE))
    ropes = methods(model)
    scores: list[Score] = []
    for seed in range(seeds):
        params, tries = _learned(workdir, model, decoder, seed)
        share = recall(decoder, params, LANGUAGE, model.trained, 4 * _RECALL_TEXTS, seed)
        known = Trained(seed, tries, share, {})
        _note(workdir, known)
        scaled = scaled_models(decoder, list(ropes.values()))
        plan = Plan(tasks, lengths, (seed,), depths, examples)
        # Two batches of a length, so that programs are few.
        rows = -(-depths * examples // 2)
        run_of = workdir, renderer, rows, origin
        scores = _measure(*run_of, scaled, params, plan)
        longer = FACTOR * model.trained
        for name in FINE_TUNED:
            rope = ropes[name]
            tuned, steps = _fine_tuned(workdir, model, scaled[rope], rope, params, seed)
            known = dataclasses.replace(known, adapting={**known.adapting, rope: steps})
            _note(workdir, known)
            own = {f"{ropes[name]}{TUNED}": scaled[ropes[name]]}
            some = [length for length in lengths if length in (model.trained, longer, 2 * longer)]
            plan = Plan(tasks, some, (seed,), depths, examples)
            scores = _measure(*run_of, own, tuned, plan)
    return scores


def _measure(workdir, renderer, rows, origin, models, params, plan) -> list[Score]:
    return measure(workdir, models, params, renderer, plan, lambda length: rows, origin)


def _learned(workdir: Path, model: SmallModel, decoder: Decoder, seed: int) -> tuple[Any, int]:
    """The parameters of a seed's model, and how many draws of them it took."""
    early = round(model.steps * 4 / 9)
    for number in range(1, _TRIES + 1):
        directory = _model_directory(workdir, seed) / f"try_{number}"
        own = 1000 * number + seed
        gate = directory / "gate.json"
        if not gate.is_file():
            tqdm.tqdm.write(f"seed {seed}: training, draw {number}", file=sys.stderr)
            params = train_from_scratch(model, LANGUAGE, own, directory, early)
            short = model.trained // 4
            formed = recall(decoder, params, LANGUAGE, short, 4 * _RECALL_TEXTS, own)
            replace(gate, json.dumps({"length": short, "recall": formed}) + "\n")
        if json.loads(gate.read_text(encoding="utf-8"))["recall"] >= _FORMED:
            return train_from_scratch(model, LANGUAGE, own, directory), number
    raise UserError(
        f"seed {seed}: recall has not formed in {_TRIES} draws of {early} steps each; give more "
        "--train_steps"
    )


def _model_directory(workdir: Path, seed: int) -> Path:
    return workdir / "models" / f"seed_{seed}"


def _fine_tuned(
    workdir: Path, model: SmallModel, scaled: Decoder, rope: str, params: Any, seed: int
) -> tuple[Any, list[tuple[int, float]]]:
    """The parameters behind a few steps on texts of the longer length, and recall on the way."""
    longer = FACTOR * model.trained
    texts = TrainingTexts(
        LANGUAGE, 10_000 + seed, (longer,) * _FINE_TUNING_STEPS, 16 * model.trained
    )

    def ask(params: Any) -> dict[str, float]:
        share = recall(scaled, params, LANGUAGE, longer, _RECALL_TEXTS, 20_000 + seed)
        return {"eval_recall": share}

    name = "".join(c if c.isalnum() else "_" for c in rope)
    directory = _model_directory(workdir, seed) / f"tuned_{name}"
    tuned = fine_tune(scaled, params, texts, directory, ask, _BETWEEN)
    steps = [(0, ask(params)["eval_recall"])]
    rows = read_log(directory)
    steps += [(row["step"], row["eval_recall"]) for row in rows if "eval_recall" in row]
    return tuned, steps


def _note(workdir: Path, known: Trained) -> None:
    """Enters what is known of a seed's model."""
    found = {own.seed: own for own in read_trained(workdir)} | {known.seed: known}
    rows = (json.dumps(dataclasses.asdict(own)) + "\n" for _, own in sorted(found.items()))
    replace(workdir / _MODELS, "".join(rows))


def read_trained(workdir: Path) -> list[Trained]:
    """What is known of all models there, by their seeds."""
    path = workdir / _MODELS
    return [Trained(**fields) for _, fields in read_rows(path)] if path.is_file() else []
