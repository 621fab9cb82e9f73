"""Speed and memory beside transformers, on one checkpoint, in one run.

    python -m tools.benchmark --model=DIR --workdir=results
    python -m tools.benchmark --model=qwen3-0.6b --workdir=results

A preset's name stands for random weights of its shape, written by transformers in bfloat16 into
--workdir. Everything runs in float32. Medians are printed with the lowest and the highest figure,
and results.jsonl gets every measurement with what it was made with. Needs requirements-dev.txt.
"""

import json
import statistics
from pathlib import Path

import tqdm
from absl import flags

from configs.models import get_preset, names_a_preset
from qwen_jax.benchmark.engines import ENGINES
from qwen_jax.benchmark.loading import measure_load
from qwen_jax.benchmark.provenance import provenance
from qwen_jax.benchmark.throughput import measure_throughput
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.errors import UserError
from qwen_jax.evaluation.random_checkpoint import write_random_checkpoint
from qwen_jax.hf_config import load_config
from qwen_jax.reference import import_reference
from tools import command_line

_MODEL = flags.DEFINE_string("model", None, "Checkpoint or preset.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go.", required=True)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 512, "Tokens to prefill.", lower_bound=1)
_STEPS = flags.DEFINE_integer("decode_tokens", 16, "Tokens to decode.", 1, 128)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each figure.", lower_bound=1)
_FLAGS = (_MODEL, _WORKDIR, _PROMPT, _STEPS, _REPEATS)


def main() -> None:
    """Measures, prints the table, writes results.jsonl."""
    workdir = Path(_WORKDIR.value)
    preset = get_preset(_MODEL.value) if names_a_preset(_MODEL.value) else None
    directory = resolve_source(_MODEL.value) if preset is None else workdir / _MODEL.value.lower()
    results = workdir / "results.jsonl"
    try:
        # Before the minutes of measuring.
        workdir.mkdir(parents=True, exist_ok=True)
        results.open("a").close()
    except OSError as error:
        message = f"--workdir={_WORKDIR.value}: cannot be written ({error.strerror or error})"
        raise UserError(message) from None
    import_reference()
    if preset is not None and not (directory / "config.json").is_file():
        write_random_checkpoint(preset, directory)
    config = load_config(directory)
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in ENGINES}
    for _ in tqdm.trange(_REPEATS.value, desc="loading", disable=None):
        for name in ENGINES:
            load = measure_load(name, directory)
            for key, value in (
                ("load, s", load.load_s),
                ("load + first forward, s", load.load_s + load.forward_s),
                ("peak memory of a load, GB", load.peak_bytes / 1e9),
            ):
                figures[name].setdefault(key, []).append(value)
    speeds = measure_throughput(
        directory, config.vocab_size, _PROMPT.value, _STEPS.value, _REPEATS.value
    )
    for name, speed in speeds.items():
        figures[name][f"prefill of {_PROMPT.value}, tokens/s"] = speed["prefill"]
        figures[name][f"decode after {_PROMPT.value}, tokens/s"] = speed["decode"]
    flag_values = {flag.name: flag.value for flag in _FLAGS}
    origin = provenance("float32", flag_values)
    with results.open("a", encoding="utf-8") as file:
        for name, measured in figures.items():
            for what, values in measured.items():
                record = {"model": _MODEL.value, "engine": name, "what": what, "values": values}
                file.write(json.dumps({**record, **origin}) + "\n")
    _print_table(figures)


def _print_table(figures: dict[str, dict[str, list[float]]]) -> None:
    ours, peer = ENGINES
    print(f"| {_MODEL.value}, float32 | {ours} | {peer} | ratio |\n|---|---|---|---|")
    for what, values in figures[ours].items():
        medians = [statistics.median(v) for v in (values, figures[peer][what])]
        cells = [
            f"{statistics.median(v):.3g} ({min(v):.3g} to {max(v):.3g})"
            for v in (values, figures[peer][what])
        ]
        print(f"| {what} | {' | '.join(cells)} | {medians[0] / medians[1]:.2f} |")


if __name__ == "__main__":
    command_line.run(main)
