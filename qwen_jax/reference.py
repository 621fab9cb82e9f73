"""PyTorch and transformers: what this package is judged against, and runs without."""

from pathlib import Path
from types import ModuleType
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.json_fields import read_json_object


def import_reference() -> tuple[ModuleType, ModuleType]:
    """torch and transformers, without the latter's warnings and progress bars.

    Raises:
      UserError: one of them is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError(
            "torch and transformers are not installed; pip install -r requirements-dev.txt"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def check_has_reference(directory: Path) -> None:
    """Refuses a checkpoint of a model_type that transformers has no class for.

    Raises:
      UserError: that, or transformers is not installed, or config.json is absent or broken.
    """
    _, transformers = import_reference()
    model_type = str(read_json_object(directory / "config.json").get("model_type"))
    if model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"transformers cannot load {directory}: it has no class for model_type {model_type}, "
            "and code that a checkpoint brings is not run; there is nothing to compare with"
        )


def load_reference(
    directory: Path, auto_class: str = "AutoModelForCausalLM", **options: Any
) -> Any:
    """The model of `directory` as transformers loads it, in float32 and ready to be evaluated.

    Args:
      directory: of the checkpoint; code that it brings is not run.
      auto_class: of transformers, for the head. It makes up a head that the checkpoint has not.
      **options: for `from_pretrained`.

    Raises:
      UserError: transformers is not installed, or refuses the directory.
    """
    check_has_reference(directory)
    torch, transformers = import_reference()
    try:
        model = getattr(transformers, auto_class).from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=False, **options
        )
    except Exception as error:  # What it raises depends on what is wrong, and on its version.
        first, *rest = str(error).strip().splitlines() or [type(error).__name__]
        # Some of its messages have a heading.
        reason = f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
        raise UserError(f"transformers cannot load {directory}: {reason}") from None
    return model.eval()
