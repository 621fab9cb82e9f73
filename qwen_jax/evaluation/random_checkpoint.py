"""A checkpoint of random weights, for whatever needs a model's shape and not its words."""

from pathlib import Path

from qwen_jax.checkpoint.writer import new_directory
from qwen_jax.config import HeadKind, ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_config import write_hf_config
from qwen_jax.reference import import_reference


def write_random_checkpoint(config: ModelConfig, directory: Path, seed: int = 0) -> None:
    """Has transformers write a model of `config` to the new `directory`, in bfloat16.

    Biases and norm weights are random too: fresh ones are 0 and 1, which hide mistakes.

    Raises:
      UserError: torch and transformers are not installed, transformers has no such model, or
        `directory` cannot be written.
    """
    torch, transformers = import_reference()
    fields = write_hf_config(config)
    family = fields.pop("model_type")
    if family not in transformers.CONFIG_MAPPING or config.head is not HeadKind.VOCABULARY:
        raise UserError(
            f"transformers has no language model to write for model_type {family} with "
            f"a {config.head.value} head; give a checkpoint directory"
        )
    reference = transformers.CONFIG_MAPPING[family](**fields)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(reference, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                is_factor = name.endswith("linear_attn.norm.weight")
                centered = config.zero_centered_norm and not is_factor
                parameter.normal_(0.0 if centered else 1.0, 0.3)
            elif name.endswith("dt_bias"):
                # States that last, as trained ones do: what decays at once leaves rounding errors.
                parameter.normal_(-3.0, 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
    with new_directory(directory) as partial:
        model.save_pretrained(partial)
