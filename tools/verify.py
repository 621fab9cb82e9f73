"""Proves a checkpoint: the same directory through transformers and through this package.

    python -m tools.verify --model=DIR
    python -m tools.verify --model=qwen3-0.6b
    python -m tools.verify --model=qwen3-30b-a3b --layers=0,1

A preset's name stands for random weights of its shape, biases and norms included; `--layers` keeps
some of its layers, where all would not fit into memory. Prints the largest differences by layer in
float32, and exits with 1 when one is beyond --tolerance times the scale of what is compared. A
quantised checkpoint is compared with its weights dequantised.

Logits and a classifier's scores are compared too. Of a reward model or a guard the layers are, and
its head is not, since transformers has no class for it. Needs requirements-dev.txt.
"""

import tempfile
from pathlib import Path

import numpy as np
from absl import flags

import qwen_jax
from configs.models import get_preset, names_a_preset
from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.errors import UserError
from qwen_jax.evaluation.parity import Parity, compare_with_reference
from qwen_jax.evaluation.random_checkpoint import write_random_checkpoint
from qwen_jax.hf_config import load_config
from tools import command_line, mesh_flag, weights_flag

_MODEL = flags.DEFINE_string(
    "model", None, "Checkpoint directory, hub id, or preset for random weights.", required=True
)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to run; random tokens if not given.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "Number of random tokens.", lower_bound=1)
_LAYERS = flags.DEFINE_list(
    "layers", None, "Layers of a preset to keep, counted from 0, such as 2,3; all if not given."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random tokens and weights.", lower_bound=0)
_TOLERANCE = flags.DEFINE_float(
    "tolerance", 1e-4, "Accepted difference, as a fraction of the root mean square, at least 1."
)


def main() -> None:
    """Compares and prints the table."""
    if not _TOLERANCE.value >= 0:
        raise UserError(f"--tolerance={_TOLERANCE.value:g} should be a number of at least 0")
    if not names_a_preset(_MODEL.value):
        if _LAYERS.value is not None:
            raise UserError("--layers is for a preset; a checkpoint runs as it is")
        _verify(resolve_source(_MODEL.value))
        return
    preset = get_preset(_MODEL.value)
    if _LAYERS.value is not None:
        if not _LAYERS.value or not all(i.isdecimal() for i in _LAYERS.value):
            raise UserError(f"--layers={','.join(_LAYERS.value)} should be numbers, such as 2,3")
        layers = [int(i) for i in _LAYERS.value]
        if sorted(set(layers)) != layers:
            raise UserError(
                f"--layers={','.join(_LAYERS.value)} should name each layer once, in order"
            )
        preset = preset.with_layers(layers)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / _MODEL.value.lower()
        write_random_checkpoint(preset, directory, _SEED.value)
        _verify(directory)


def _verify(directory: Path) -> None:
    config = load_config(directory)
    if _PROMPT.value is not None:
        if flags.FLAGS["tokens"].present:
            raise UserError("give --prompt or --tokens, and not both")
        ids = np.array([qwen_jax.load_tokenizer(directory).encode(_PROMPT.value)])
        if not ids.size:
            raise UserError("--prompt is empty; give some text")
    else:
        rng = np.random.default_rng(_SEED.value)
        ids = rng.integers(0, config.vocab_size, (1, _TOKENS.value))
    if ids.size > config.max_position_embeddings:
        raise UserError(
            f"{ids.size} tokens are more than the model's {config.max_position_embeddings} "
            "positions (max_position_embeddings); give fewer"
        )
    parity = compare_with_reference(
        directory, ids, weights_flag.WEIGHTS.value, mesh_flag.MESH.value
    )
    _print_table(parity)
    if not parity.worst.relative <= _TOLERANCE.value:
        raise UserError(
            f"{directory}: {parity.worst.name} differs by {parity.worst.relative:.2e} of its "
            f"scale, beyond --tolerance={_TOLERANCE.value:g}"
        )


def _print_table(parity: Parity) -> None:
    print(f"{'':<12} {'max |diff|':>11} {'scale':>9} {'relative':>9}")
    for row in parity.differences:
        print(f"{row.name:<12} {row.max_abs:>11.2e} {row.scale:>9.3g} {row.relative:>9.1e}")
    if parity.top1_agreement is not None:
        print(f"top-1 agreement {parity.top1_agreement:.2%}")
    if parity.uncompared_head is not None:
        head = parity.uncompared_head.value
        print(f"the {head} head is not compared: transformers has no class for it")


if __name__ == "__main__":
    command_line.run(main)
