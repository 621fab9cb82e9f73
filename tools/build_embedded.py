"""Makes a small chat model from nothing: problems, a tokenizer, training.

    python -m tools.build_embedded --workdir=runs/embedded

It is taught arithmetic of several digits, to read keys out of a passage, to sort and reverse short
lists and some phrases between English and Chinese, each with thinking and without, and to call a
calculator. WORKDIR/published is a checkpoint in Hugging Face's layout and bfloat16. A run that was
interrupted goes on when it is started again.
"""

from absl import flags

from qwen_jax.embedded.build import build
from qwen_jax.training.host_memory import keep_freed_memory
from tools import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes.", required=True)
_PROBLEMS = flags.DEFINE_integer("problems", 60_000, "Problems to learn from.", lower_bound=100)
_STEPS = flags.DEFINE_integer("steps", 2000, "Updates, of 4,096 tokens each.", lower_bound=4)
_SEED = flags.DEFINE_integer("seed", 0, "Of problems, order and parameters.", lower_bound=0)


def main() -> None:
    """Builds it."""
    keep_freed_memory()
    done = build(command_line.path(_WORKDIR), _PROBLEMS.value, _STEPS.value, _SEED.value)
    command_line.leave_if_stopped(done, _STEPS.value)


if __name__ == "__main__":
    command_line.run(main)
