"""The same directory through transformers and through this package, compared layer by layer."""

import contextlib
import dataclasses
import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.orbax_format import is_orbax
from qwen_jax.checkpoint.quantised import load_quantization
from qwen_jax.errors import UserError
from qwen_jax.pretrained import Weights, load_pretrained
from qwen_jax.reference import import_reference, load_reference


@dataclasses.dataclass(frozen=True)
class Difference:
    """One row of the comparison.

    Attributes:
      name: of the tensor.
      max_abs: largest absolute difference.
      scale: root mean square of the reference, at least 1: what `max_abs` is judged against.
    """

    name: str
    max_abs: float
    scale: float

    @property
    def relative(self) -> float:
        """`max_abs` as a fraction of `scale`; NaN on either side counts as infinite."""
        return self.max_abs / self.scale if np.isfinite(self.max_abs) else float("inf")


@dataclasses.dataclass(frozen=True)
class Parity:
    """Attributes:
    differences: embeddings, each layer's output, the final norm, the logits.
    top1_agreement: fraction of positions whose most likely token is the same.
    """

    differences: tuple[Difference, ...]
    top1_agreement: float

    @property
    def worst(self) -> Difference:
        """The row with the largest relative difference."""
        return max(self.differences, key=lambda row: row.relative)


def compare_with_reference(
    directory: Path, input_ids: np.ndarray, weights: Weights = "dense"
) -> Parity:
    """Runs `input_ids` [B, T] through both in float32, one after the other.

    The reference runs a quantised checkpoint dequantised, since it reads each format with a package
    of its own; here `weights` says how it is loaded.

    Raises:
      UserError: torch and transformers are not installed, or one side cannot load the directory.
    """
    if is_orbax(directory):
        raise UserError(
            f"{directory}: transformers does not read Orbax's format; convert it first with "
            "python -m tools.convert --format=hf"
        )
    # Ours first: it says in one line what is wrong with a directory.
    states, logits = _run_ours(directory, input_ids, weights)
    with _dequantised(directory) as dense:
        expected_states, expected_logits = _run_transformers(dense, input_ids)
    names = ["embeddings", *(f"layer {i}" for i in range(len(states) - 2)), "final norm"]
    rows = [
        _difference(name, ours, theirs)
        for name, ours, theirs in zip(names, states, expected_states, strict=True)
    ]
    agreement = np.mean(logits.argmax(-1) == expected_logits.argmax(-1))
    return Parity((*rows, _difference("logits", logits, expected_logits)), float(agreement))


def _difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    gap = np.abs(ours - theirs).max()
    scale = max(1.0, float(np.sqrt(np.mean(np.square(theirs, dtype=np.float64)))))
    return Difference(name, float(gap), scale)


@contextlib.contextmanager
def _dequantised(directory: Path) -> Iterator[Path]:
    """The directory itself, or if it is quantised, a dense copy for as long as it is needed."""
    if load_quantization(directory) is None:
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / directory.name
        convert(directory, dense, "hf", "float32")
        yield dense


def _run_ours(
    directory: Path, input_ids: np.ndarray, weights: Weights
) -> tuple[list[np.ndarray], np.ndarray]:
    model, params = load_pretrained(directory, dtype="float32", weights=weights)
    with jax.default_matmul_precision("highest"):
        out = model.apply({"params": params}, input_ids)
    return [np.asarray(state) for state in out.hidden_states], np.asarray(out.logits)


def _run_transformers(
    directory: Path, input_ids: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """Hidden states as transformers counts them, and logits."""
    torch, _ = import_reference()
    model = load_reference(directory, attn_implementation="eager")
    with torch.no_grad():
        out = model(torch.as_tensor(input_ids), use_cache=False, output_hidden_states=True)
    states = [state.numpy() for state in out.hidden_states]
    logits = out.logits.numpy()
    del model, out
    gc.collect()
    return states, logits
