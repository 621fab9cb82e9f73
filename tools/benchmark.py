"""Speed and memory beside transformers, in one run, and as shares of the machine's own limits.

    python -m tools.benchmark --model=DIR --workdir=results
    python -m tools.benchmark --model=qwen3-0.6b --workdir=results --batch_size=8
    python -m tools.benchmark --workload=table --workdir=results
    python -m tools.benchmark --workload=train --model=configs/benchmark/train_step \\
        --workdir=results
    python -m tools.benchmark --workload=throughput --model=qwen3-0.6b --workdir=results
    python -m tools.benchmark --workload=growth --model=qwen3-0.6b --workdir=results
    python -m tools.benchmark --workload=dispatch --model=qwen3-30b-a3b --workdir=results
    python -m tools.benchmark --workload=speculation --model=embedded --workdir=results

A preset's name, or a directory with config.json alone, stands for random weights of that shape,
written by transformers in bfloat16 into --workdir. Everything runs in float32, each engine in a
process of its own, turn by turn; what they do is compared as well. How fast the machine reads
memory and multiplies matrices is measured before each repeat. Medians are printed with the lowest
and the highest figure, ratios above 1 being in this package's favour; results.jsonl gets every
measurement with what it was made with, table.md the table and speed.png its picture. Needs
requirements-dev.txt. --compare=OLD.jsonl tells what has changed since an earlier run.

Beside other engines:
  model        loading, prefill and decoding of one model. --peer_python=PYTHON measures another
               package beside, in the environment of that interpreter: google-tunix, by
               qwen_jax/benchmark/peers/tunix_peer.py, on Qwen3's dense models.
  table        all that README.md's table has, or --only=NAME,... of it. Goes on where it was cut.
  train        train steps, of --batch_size rows of --length tokens.
  throughput   tokens a second over --prompts=64 texts of random tokens, whose lengths are drawn
               evenly: prompts of 16 to 64 with answers of 8 to 256, then prompts of 16 to 512 with
               answers of 8 to 128; or --prompt_range and --answer_range, each LEAST,MOST. Rows that
               take one prompt after another (slots) stand beside batches of prompts of similar
               length, of ours and of transformers, each until its longest answer. Each is tried
               with each of --sizes rows, and its best size --repeats times in all. Goes on where it
               was cut.
This package by itself, of which only start needs the reference:
  start        what it takes until a process has its first tokens: imports beside JAX's, and starts
               with no compiled programs and with those of an earlier one.
  growth       how costs grow, with random weights of the model's shape, cut to --layers of its
               layers and as large a part of its vocabulary: a decode step by the cache's slots and
               by the tokens in it (--capacities), the temporaries of prefill by the prompt
               (--lengths), a batch of mixed lengths beside one of equal ones (--batch_size,
               --prompt_tokens, --decode_tokens), compiling by the layers (--layer_counts).
  profile      the share of each part of the model in a decode step of --batch_size rows after
               --prompt_tokens tokens, from a profiler's trace of --decode_tokens steps; of
               --decode_tokens=0, in the prefill of so many.
  dispatch     the ways of running one mixture-of-experts layer, for each number of --tokens.
  speculation  texts with each drafter that a checkpoint has (looking up, its MTP head,
               --draft_model) and without: the share of drafts that stood, tokens a pass, the
               speed-up. Needs trained weights: random ones guess nothing. Prompts are the embedded
               model's held-out problems with thinking, --problems of each kind, or lines
               {"prompt": "..."} of --input=FILE.jsonl, which are continued.

Pictures of throughput, growth, profile and dispatch are drawn as well, WORKLOAD.png.
"""

from collections.abc import Callable

from absl import flags

from qwen_jax.benchmark.engines import MOST_STEPS
from qwen_jax.errors import UserError
from tools import command_line, mesh_flag
from tools.workloads import costs, dispatch, speculation, speed, throughput
from tools.workloads.run import Run

_MODEL = flags.DEFINE_string("model", None, "Checkpoint or preset.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go.", required=True)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 512, "Tokens to prefill.", lower_bound=1)
_STEPS = flags.DEFINE_integer("decode_tokens", 16, "Tokens to decode.", 0, MOST_STEPS)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each figure.", lower_bound=1)
_ROWS = flags.DEFINE_integer(
    "batch_size", None, "Rows at once: 1, 4 of --workload=train, 8 of growth.", lower_bound=1
)
# Each checks what is asked for, before anything is written, and gives what measures and reports;
# beside it are the flags that it reads, but for --workdir and --repeats, which all do.
_WORKLOADS: dict[str, tuple[Callable[[Run], Callable[[], None]], tuple[flags.FlagHolder, ...]]] = {
    "model": (
        speed.prepare_model,
        (_MODEL, _PROMPT, _STEPS, _ROWS, mesh_flag.MESH, speed.PEER, speed.COMPARE),
    ),
    "table": (speed.prepare_table, (speed.ONLY, speed.PEER, speed.COMPARE)),
    "train": (speed.prepare_train, (_MODEL, _ROWS, speed.LENGTH, speed.COMPARE)),
    "throughput": (throughput.prepare, (_MODEL, *throughput.FLAGS)),
    "start": (costs.prepare_start, (_MODEL,)),
    "growth": (costs.prepare_growth, (_MODEL, _PROMPT, _STEPS, _ROWS, *costs.GROWTH_FLAGS)),
    "profile": (costs.prepare_profile, (_MODEL, _PROMPT, _STEPS, _ROWS, costs.LAYERS)),
    "dispatch": (dispatch.prepare, (_MODEL, *dispatch.FLAGS)),
    "speculation": (speculation.prepare, (_MODEL, _ROWS, *speculation.FLAGS)),
}
_WORKLOAD = flags.DEFINE_enum(
    "workload",
    "model",
    list(_WORKLOADS),
    "What to measure: loading, prefill and decoding of a model, all of the table, a train step, "
    "many texts, start-up, how costs grow, the parts of a decode step, the experts alone, or "
    "decoding with drafts.",
)


def main() -> None:
    """Checks what is asked for, has the workload measure it, and writes results.jsonl."""
    prepare, own = _WORKLOADS[_WORKLOAD.value]
    _check_flags({flag.name for flag in own})
    run = Run(
        workload=_WORKLOAD.value,
        model=_MODEL.value,
        workdir=command_line.path(_WORKDIR),
        repeats=_REPEATS.value,
        rows=_ROWS.value,
        prompt_tokens=_PROMPT.value,
        decode_tokens=_STEPS.value,
    )
    measure = prepare(run)
    _check_can_write(run)
    measure()


def _check_flags(own: set[str]) -> None:
    for name in {flag.name for _, reads in _WORKLOADS.values() for flag in reads} - own:
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} is not for --workload={_WORKLOAD.value}")
    if _MODEL.name in own and _MODEL.value is None:
        raise UserError(f"--workload={_WORKLOAD.value} needs --model, a checkpoint or a preset")


def _check_can_write(run: Run) -> None:
    """Before the minutes of measuring."""
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
        run.results.open("a").close()
    except OSError as error:
        message = f"--workdir={_WORKDIR.value}: cannot be written ({error.strerror or error})"
        raise UserError(message) from None


if __name__ == "__main__":
    command_line.run(main)
