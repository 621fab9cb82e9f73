"""Whether a checkpoint predicts the next token, which some measurements need."""

from pathlib import Path

from qwen_jax.checkpoint.loading import open_model
from qwen_jax.config import HeadKind
from qwen_jax.errors import UserError
from qwen_jax.hf_config import load_config
from qwen_jax.inference.checks import check_head


def check_language_model(directory: Path, purpose: str) -> None:
    """Refuses a checkpoint that predicts no tokens; weights are not read.

    Args:
      directory: of the checkpoint.
      purpose: what predictions are needed for, which ends the sentence: "..., which `purpose`".

    Raises:
      UserError: its head is not a vocabulary, or something is wrong with the directory.
    """
    # config.json alone does not always tell: embedders are published as language models.
    config = open_model(load_config(directory), directory).config
    otherwise = f"makes no predictions of the next token, which {purpose}"
    try:
        check_head(config, (HeadKind.VOCABULARY,), otherwise)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
