"""Converts a checkpoint between Hugging Face and Orbax format.

python -m tools.convert --source=Qwen/Qwen3-0.6B --target=/data/qwen3-0.6b --format=orbax
python -m tools.convert --source=/data/qwen3-0.6b --target=/data/qwen3-0.6b-f32 --format=hf \\
  --dtype=float32
python -m tools.convert --source=/data/qwen3-0.6b --target=/data/qwen3-0.6b-int4 --format=hf \\
  --quantize=int4 --measure
python -m tools.convert --source=/data/qwen3-0.6b --target=/data/merged --format=hf --adapter=DIR

Tensors keep their bits unless --dtype is given; config.json, the tokenizer and the other files
beside the weights come along, but for descriptions of a quantisation that is undone. The target
appears when it is complete, and not before.

A quantised source (GPTQ, AWQ, FP8 or our own) is dequantised. --quantize rounds the linear layers
and experts to 8 or 4 bits, with a scale for every 128 inputs, in a format that this package reads.

--adapter merges a LoRA in PEFT's format into the weights.
"""

from absl import flags

from qwen_jax.checkpoint.conversion import QUANTIZATIONS, convert
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.errors import UserError
from qwen_jax.evaluation.language_model import check_language_model
from qwen_jax.evaluation.quantisation import measure_divergence
from qwen_jax.hf_config import DTYPES
from tools.command_line import path, run

_SOURCE = flags.DEFINE_string(
    "source", None, "Checkpoint: a directory in either format, or a hub id.", required=True
)
_TARGET = flags.DEFINE_string("target", None, "Directory to create.", required=True)
_FORMAT = flags.DEFINE_enum("format", None, ["hf", "orbax"], "Format to write.", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    DTYPES,
    "Cast every tensor to this but the scales of --quantize; otherwise each keeps its own.",
)
_QUANTIZE = flags.DEFINE_enum(
    "quantize",
    None,
    list(QUANTIZATIONS),
    "With --format=hf: round linear layers and experts to this.",
)
_ADAPTER = flags.DEFINE_string(
    "adapter", None, "Directory of a LoRA in PEFT's format, to merge into the weights."
)
_MEASURE = flags.DEFINE_bool(
    "measure",
    False,
    "With --quantize, of language models: run both checkpoints, and print how far they differ.",
)


def main() -> None:
    """Converts, then says what was written."""
    target = path(_TARGET)
    if _MEASURE.value and _QUANTIZE.value is None:
        raise UserError("--measure needs --quantize: it is of what quantising changes")
    if _MEASURE.value and _ADAPTER.value is not None:
        raise UserError("--measure is of what quantising changes; merge --adapter first")
    if _MEASURE.value:
        source = resolve_source(_SOURCE.value)
        check_language_model(source, "--measure compares; leave it out")
    written = convert(
        _SOURCE.value,
        target,
        _FORMAT.value,
        _DTYPE.value,
        _QUANTIZE.value,
        adapter=None if _ADAPTER.value is None else path(_ADAPTER),
    )
    notes = ", dequantised" if written.dequantised else ""
    notes += f", {_ADAPTER.value} merged" if _ADAPTER.value is not None else ""
    if _QUANTIZE.value is not None:
        ratio = written.num_bytes / written.num_bytes_dense
        notes += f", {_QUANTIZE.value}: {ratio:.2f} of the size unquantised"
    if written.num_left_out:
        notes += f"; left out {written.num_left_out} that are not text"
    print(
        f"wrote {_TARGET.value}: {written.num_tensors} tensors, {written.num_bytes / 1e6:.1f} MB, "
        f"{_FORMAT.value} format{notes}"
    )
    if _MEASURE.value:
        found = measure_divergence(source, target)
        print(
            f"KL(original || quantised) {found.mean_kl:.2e} nats a token, top-1 agreement "
            f"{found.top1_agreement:.1%}, over {found.num_tokens} "
            f"{'tokens of text' if found.is_text else 'random tokens'}"
        )


if __name__ == "__main__":
    run(main)
