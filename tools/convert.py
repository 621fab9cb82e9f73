"""Converts a checkpoint between Hugging Face and Orbax format.

python -m tools.convert --source=Qwen/Qwen3-0.6B --target=/data/qwen3-0.6b --format=orbax
python -m tools.convert --source=/data/qwen3-0.6b --target=/data/qwen3-0.6b-f32 --format=hf \\
  --dtype=float32

Tensors keep their bits unless --dtype is given; config.json, the tokenizer and the other files
beside the weights come along. The target appears when it is complete, and not before.
"""

from absl import flags

from qwen_jax.checkpoint.conversion import convert
from qwen_jax.hf_config import DTYPES
from tools.command_line import run

_SOURCE = flags.DEFINE_string(
    "source", None, "Checkpoint: a directory in either format, or a hub id.", required=True
)
_TARGET = flags.DEFINE_string("target", None, "Directory to create.", required=True)
_FORMAT = flags.DEFINE_enum("format", None, ["hf", "orbax"], "Format to write.", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, "Cast every tensor to this; otherwise each keeps its own."
)


def main() -> None:
    """Converts, then says what was written."""
    written = convert(_SOURCE.value, _TARGET.value, _FORMAT.value, _DTYPE.value)
    left_out = written.num_left_out
    print(
        f"wrote {_TARGET.value}: {written.num_tensors} tensors, {written.num_bytes / 1e6:.1f} MB, "
        f"{_FORMAT.value} format" + f"; left out {left_out} that are not text" * (left_out > 0)
    )


if __name__ == "__main__":
    run(main)
