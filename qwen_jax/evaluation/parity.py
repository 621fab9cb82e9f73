"""The same directory through transformers and through this package, compared layer by layer."""

import contextlib
import dataclasses
import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.checkpoint.conversion import convert
from qwen_jax.checkpoint.orbax_format import is_orbax
from qwen_jax.checkpoint.quantised import load_quantization
from qwen_jax.config import HeadKind
from qwen_jax.errors import UserError
from qwen_jax.pretrained import Weights, load_pretrained
from qwen_jax.reference import check_has_reference, import_reference, load_reference

# What reads the final hidden states -> the class of transformers that does the same, and what the
# head's output is called. AutoModel has no head.
_CLASSES = {
    HeadKind.VOCABULARY: ("AutoModelForCausalLM", "logits"),
    HeadKind.NONE: ("AutoModel", None),
    HeadKind.SCORE: ("AutoModelForSequenceClassification", "scores"),
    HeadKind.SCORE_WITH_BIAS: ("AutoModelForTokenClassification", "scores"),
    HeadKind.TWO_LAYER_SCORE: ("AutoModel", None),
    HeadKind.GUARD: ("AutoModel", None),
}


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
    differences: embeddings, each layer's output, the final norm, and the logits or scores where
      transformers has the head.
    top1_agreement: fraction of positions whose most likely token is the same; None of a model that
      predicts no tokens.
    uncompared_head: the head that transformers has no class for, None where there is none such.
    """

    differences: tuple[Difference, ...]
    top1_agreement: float | None
    uncompared_head: HeadKind | None

    @property
    def worst(self) -> Difference:
        """The row with the largest relative difference."""
        return max(self.differences, key=lambda row: row.relative)


def compare_with_reference(
    directory: Path,
    input_ids: np.ndarray,
    weights: Weights = "dense",
    mesh: Mesh | str | None = None,
) -> Parity:
    """Runs `input_ids` [B, T] through both in float32, one after the other.

    A sequence classifier's scores are read at the last token, as transformers reads them. Of a head
    that transformers has no class for, what it reads is compared and the head is not.

    The reference runs a quantised checkpoint dequantised, since it reads each format with a package
    of its own; here `weights` says how it is loaded, and `mesh` onto which devices.

    Raises:
      UserError: torch and transformers are not installed, or one side cannot load the directory.
    """
    if is_orbax(directory):
        raise UserError(
            f"{directory}: transformers does not read Orbax's format; convert it first with "
            "python -m tools.convert --format=hf"
        )
    check_has_reference(directory)
    # Ours first: it says in one line what is wrong with a directory.
    head, states, output = _run_ours(directory, input_ids, weights, mesh)
    auto_class, output_name = _CLASSES[head]
    with _dequantised(directory) as dense:
        expected_states, expected_output = _run_transformers(dense, input_ids, auto_class)
    names = ["embeddings", *(f"layer {i}" for i in range(len(states) - 2)), "final norm"]
    rows = [
        _difference(name, ours, theirs)
        for name, ours, theirs in zip(names, states, expected_states, strict=True)
    ]
    if output_name is not None:
        rows.append(_difference(output_name, output, expected_output))
    agreement = None
    if head is HeadKind.VOCABULARY:
        agreement = float(np.mean(output.argmax(-1) == expected_output.argmax(-1)))
    is_uncompared = output is not None and output_name is None
    return Parity(tuple(rows), agreement, head if is_uncompared else None)


def _difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    if ours.shape != theirs.shape:
        raise UserError(
            f"{name}: shape {list(ours.shape)} here, {list(theirs.shape)} in transformers; the two "
            "did not load the same model"
        )
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
    directory: Path, input_ids: np.ndarray, weights: Weights, mesh: Mesh | str | None
) -> tuple[HeadKind, list[np.ndarray], np.ndarray | None]:
    """The head, hidden states, and what the head makes of them: [B, V] of a sequence classifier."""
    model, params = load_pretrained(directory, "float32", mesh, weights=weights)
    with jax.default_matmul_precision("highest"):
        out = model.apply({"params": params}, input_ids)
    head, output = model.config.head, out.logits
    if head is HeadKind.SCORE:
        output = output[:, -1]
    states = [np.asarray(state) for state in out.hidden_states]
    return head, states, None if output is None else np.asarray(output)


def _run_transformers(
    directory: Path, input_ids: np.ndarray, auto_class: str
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Hidden states as transformers counts them, and what the head makes of them."""
    torch, _ = import_reference()
    model = load_reference(directory, auto_class, attn_implementation="eager")
    # No token is padding here, though a classifier would take it for that by its id.
    model.config.get_text_config().pad_token_id = -1
    with torch.no_grad():
        out = model(torch.as_tensor(input_ids), use_cache=False, output_hidden_states=True)
    states = [state.numpy() for state in out.hidden_states]
    output = out.logits.numpy() if "logits" in out else None
    del model, out
    gc.collect()
    return states, output
