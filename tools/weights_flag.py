"""The flag of the command lines that load quantised checkpoints, and what they say of memory."""

import sys
from pathlib import Path
from typing import Any, get_args

from absl import flags

from qwen_jax.checkpoint.quantised import load_quantization
from qwen_jax.pretrained import Weights, parameter_bytes

WEIGHTS = flags.DEFINE_enum(
    "weights",
    "dense",
    get_args(Weights),
    "Of a quantised checkpoint: dequantised at load, or kept packed for less memory.",
)


def report_memory(directory: Path, params: Any) -> None:
    """Says on stderr what the parameters of a quantised checkpoint take; nothing of a plain one."""
    quantization = load_quantization(directory)
    if quantization is not None:
        print(
            f"{quantization.method}, {quantization.bits} bits, {WEIGHTS.value}: parameters take "
            f"{parameter_bytes(params) / 1e6:.1f} MB",
            file=sys.stderr,
        )
