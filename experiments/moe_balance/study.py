"""All arms on small models that the study trains itself: minutes on two cores.

For each seed every arm is trained and measured on the same held-out texts, on the way and at the
end, with routers at rest: each token takes its likeliest experts.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from experiments.moe_balance.arms import ARMS, MICROBATCH_ROWS, Arm
from experiments.moe_balance.domains import DOMAINS, held_out_batches
from experiments.moe_balance.measuring import Measured, Reader, saturation
from experiments.moe_balance.training import (
    Sizes,
    config_of,
    phases_of,
    train_arm,
)
from experiments.results import add_results, cut_tail, read_results
from experiments.workers import run_jobs
from qwen_jax.config import ModelConfig
from qwen_jax.models.decoder import Decoder
from qwen_jax.nn.router import Assignment, RouterOptions
from qwen_jax.training.report import ROUTER_LOG, read_log

# How often held-out texts are measured on the way, and what of it is kept.
_MEASUREMENTS = 10
_KEPT = "held_out_"
_FOLLOWED = ("max_vio", "max_vio_micro", "domain_information")


@dataclasses.dataclass(frozen=True)
class Result:
    """Of an arm and a seed, measured on held-out texts.

    Attributes:
      arm, seed: which.
      steps: of training.
      losses: nats a token of each row.
      domains: of each row, an index into `DOMAINS`.
      figures: of the end, [L] each.
      by_domain: [L, domains, E], choices of experts at the end.
      by_domain_before: the same before the first step with experts.
      together: [L, E, E], tokens that chose both.
      history: on the way, from before the first step on: "step", "loss", "saturation" against the
        end, and figures of routers, means over layers.
      loads: pairs of step and [L, E], in training, as multiples of the even share.
      trained_losses: with the router as training has it, where that looks at several tokens at
        once; None for the other arms.
      seconds: of training and measuring.
    """

    arm: str
    seed: int
    steps: int
    losses: list[float]
    domains: list[int]
    figures: dict[str, list[float]]
    by_domain: list[list[list[int]]]
    by_domain_before: list[list[list[int]]]
    together: list[list[list[int]]]
    history: list[dict[str, float]]
    loads: list[list[Any]]
    trained_losses: list[float] | None
    seconds: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(np.mean(self.losses))

    def figure(self, name: str) -> float:
        """Mean over layers."""
        return float(np.mean(self.figures[name]))


def run(
    workdir: Path,
    sizes: Sizes,
    arms: Sequence[Arm],
    seeds: int,
    origin: Mapping[str, Any],
    workers: int = 1,
) -> list[Result]:
    """Trains and measures what is missing in a workdir.

    Args:
      workdir: with the models and `results.jsonl`.
      sizes: of the models.
      arms: that are compared.
      seeds: how many models of each.
      origin: what the results are made with.
      workers: processes that train arms at the same time, each on a core of its own.

    Returns:
      All results there.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    cut_tail(workdir)
    done = {(result.arm, result.seed) for result in read(workdir)}
    wanted = [(arm, seed) for seed in range(seeds) for arm in arms]
    left = [pair for pair in wanted if (pair[0].name, pair[1]) not in done]
    work = functools.partial(_measured_together, workdir, sizes)
    jobs = run_jobs(work, _jobs(workdir, sizes, left), workers)
    bar = tqdm.tqdm(total=len(left), desc="arms", unit="arm", disable=None)
    with contextlib.closing(jobs), bar:
        for results in jobs:
            add_results(workdir, map(dataclasses.asdict, results), origin)
            bar.set_postfix_str(f"seed {results[-1].seed}: {results[-1].arm}")
            bar.update(len(results))
    return read(workdir)


def _jobs(
    workdir: Path, sizes: Sizes, pairs: Sequence[tuple[Arm, int]]
) -> list[list[tuple[Arm, int]]]:
    """Arms and seeds in jobs; those that have phases in common, made once, are of one."""
    jobs: list[tuple[set[Path], list[tuple[Arm, int]]]] = []
    for arm, seed in pairs:
        directories = {directory for _, directory, *_ in phases_of(workdir, sizes, arm, seed)}
        for known, job in jobs:
            if known & directories:
                known |= directories
                job.append((arm, seed))
                break
        else:
            jobs.append((directories, [(arm, seed)]))
    return [job for _, job in jobs]


def read(workdir: Path) -> list[Result]:
    """The results of a workdir, by seed, and in the order of the arms.

    Raises:
      UserError: they are of another version.
    """
    names = [field.name for field in dataclasses.fields(Result)]
    places = {arm.name: place for place, arm in enumerate(ARMS)}
    results = [Result(**row) for row in read_results(workdir, names)]
    return sorted(results, key=lambda r: (r.seed, places.get(r.arm, len(places))))


@functools.cache
def _reader(config: ModelConfig, router: RouterOptions) -> Reader:
    return Reader(Decoder(config, router=router), len(DOMAINS), MICROBATCH_ROWS)


@functools.cache
def _held_out(seed: int, length: int) -> dict[str, np.ndarray]:
    batches = held_out_batches(seed, microbatch_rows=MICROBATCH_ROWS, length=length)
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def _measured_together(
    workdir: Path, sizes: Sizes, pairs: Sequence[tuple[Arm, int]]
) -> list[Result]:
    return [_measured(workdir, sizes, arm, seed) for arm, seed in pairs]


def _measured(workdir: Path, sizes: Sizes, arm: Arm, seed: int) -> Result:
    begun = time.monotonic()
    texts = _held_out(seed, sizes.length)
    reader = _reader(config_of(sizes, arm), RouterOptions())

    def measure(directory: Path, step: int, params: Any) -> dict[str, float]:
        found = reader.read(params, [texts])
        _keep(directory, step, found)
        return {"eval_loss": found.loss}

    every = max(sizes.steps // _MEASUREMENTS, 1)
    params = train_arm(workdir, sizes, arm, seed, measure, every)
    end = reader.read(params, [texts])
    trained_losses = None
    if arm.router.assignment != Assignment.TOP_K:
        trained = _reader(config_of(sizes, arm), arm.router).read(params, [texts])
        trained_losses = np.round(trained.losses, 5).tolist()
    history, loads, before = [], [], None
    for phase, directory, start, _ in phases_of(workdir, sizes, arm, seed):
        if phase.balance is not None:
            if before is None:
                before = _first(directory)
            history += _history(directory, end)
            loads += _loads(directory, start)
    return Result(
        arm=arm.name,
        seed=seed,
        steps=sizes.steps,
        losses=np.round(end.losses, 5).tolist(),
        domains=end.domains.tolist(),
        figures={n: np.round(v, 5).tolist() for n, v in end.figures.items() if v.ndim == 1},
        by_domain=end.by_domain.tolist(),
        by_domain_before=before,
        together=end.together.tolist(),
        history=history,
        loads=loads,
        trained_losses=trained_losses,
        seconds=round(time.monotonic() - begun, 1),
    )


def _keep(directory: Path, step: int, found: Measured) -> None:
    """Enters what was measured on the way; choices are compared with those of the end."""
    directory.mkdir(parents=True, exist_ok=True)
    path, temporary = directory / f"{_KEPT}{step:06}.npz", directory / "kept.tmp"
    with temporary.open("wb") as file:
        figures = {name: found.figures[name].mean() for name in _FOLLOWED}
        own = {"by_domain": found.by_domain, "choices": found.choices}
        np.savez(file, step=step, loss=found.loss, **own, **figures)
    temporary.replace(path)


def _first(directory: Path) -> list[Any]:
    with np.load(min(directory.glob(f"{_KEPT}*.npz"))) as kept:
        return kept["by_domain"].tolist()


def _history(directory: Path, end: Measured) -> list[dict[str, float]]:
    rows = []
    for path in sorted(directory.glob(f"{_KEPT}*.npz")):
        with np.load(path) as kept:
            row = {name: float(kept[name]) for name in ("step", "loss", *_FOLLOWED)}
            row["saturation"] = float(saturation(kept["choices"], end.choices).mean())
        rows.append({name: round(value, 5) for name, value in row.items()})
    return rows


def _loads(directory: Path, start: int) -> list[list[Any]]:
    return [
        [start + row["step"], np.round(row["router"]["load"], 3).tolist()]
        for row in read_log(directory, ROUTER_LOG)
        if "router" in row
    ]
