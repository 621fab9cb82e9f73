"""Writes what the small variants of the recipes in configs/train begin with.

    python -m tools.build_samples --workdir=runs/small

WORKDIR gets `data/`, the embedded model's problems as texts, conversations and pairs of answers,
trained on and held out; and `base/` and `student/`, a tokenizer and the sizes of a model and of a
smaller one, without weights.
"""

from absl import flags

from qwen_jax.embedded.build import write_base
from qwen_jax.embedded.samples import write_samples
from qwen_jax.errors import UserError
from tools import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes.", required=True)
_RECORDS = flags.DEFINE_integer("records", 6000, "Records of each kind.", lower_bound=10)
_HELD_OUT = flags.DEFINE_integer("held_out", 100, "The same, held out.", lower_bound=10)
_SEED = flags.DEFINE_integer("seed", 0, "Of problems and tokenizer.", lower_bound=0)

_BASE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
_STUDENT = _BASE | {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}


def main() -> None:
    """Writes them."""
    workdir = command_line.path(_WORKDIR)
    try:
        write_samples(workdir / "data", _RECORDS.value, _HELD_OUT.value, _SEED.value)
        write_base(workdir / "base", _SEED.value, **_BASE)
        write_base(workdir / "student", _SEED.value, **_STUDENT)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--workdir={_WORKDIR.value}: cannot be written ({reason})") from None


if __name__ == "__main__":
    command_line.run(main)
