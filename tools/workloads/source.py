"""What a model's name stands for: a checkpoint, or a shape whose weights are drawn at random."""

import dataclasses
from pathlib import Path

from configs.models import get_preset, names_a_preset
from qwen_jax.checkpoint.hub import EMBEDDED, resolve_source
from qwen_jax.config import ModelConfig
from qwen_jax.evaluation.language_model import check_language_model
from qwen_jax.evaluation.random_checkpoint import write_random_checkpoint
from qwen_jax.hf_config import load_config
from qwen_jax.reference import import_reference


@dataclasses.dataclass(frozen=True)
class Source:
    """Attributes:
    directory: of the checkpoint.
    config: of the model.
    is_shape: whether there are no weights, but random ones may be written there.
    """

    directory: Path
    config: ModelConfig
    is_shape: bool

    def check_predicts_tokens(self) -> None:
        """Refuses what is no language model.

        Raises:
          UserError: it is not.
        """
        if not self.is_shape:
            check_language_model(self.directory, "are what is timed")

    def checkpoint(self) -> tuple[Path, ModelConfig]:
        """The directory and what its config.json says, random weights written if none are there.

        Raises:
          UserError: the reference is not installed.
        """
        import_reference()
        if self.is_shape and not (self.directory / "config.json").is_file():
            write_random_checkpoint(self.config, self.directory)
        return self.directory, load_config(self.directory)


def find_source(model: str, workdir: Path) -> Source:
    """What a preset, a directory, a hub id or "embedded" names.

    A directory with config.json alone is a shape.

    Raises:
      UserError: there is no such thing.
    """
    if names_a_preset(model) and model != EMBEDDED:
        return Source(workdir / model.lower(), get_preset(model), is_shape=True)
    directory = resolve_source(model)
    config = load_config(directory)
    is_shape = [path.name for path in directory.iterdir()] == ["config.json"]
    return Source(workdir / directory.name if is_shape else directory, config, is_shape)
