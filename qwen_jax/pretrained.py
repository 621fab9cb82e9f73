"""From the name of a published checkpoint to a model that runs."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.checkpoint.hub import resolve_source
from qwen_jax.checkpoint.loading import load_params, open_model
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.hf_config import DTYPES, load_config
from qwen_jax.json_fields import read_json_object
from qwen_jax.models.decoder import Decoder, parameter_shapes
from qwen_jax.rope_scaling import with_rope_scaling
from qwen_jax.sharding import axes

if TYPE_CHECKING:
    from qwen_jax.text import Tokenizer

Weights = Literal["dense", "packed"]


def load_pretrained(
    source: str | Path,
    dtype: jnp.dtype | str | None = None,
    mesh: Mesh | str | None = None,
    *,
    rope_scaling: dict[str, Any] | None = None,
    allow_nonfinite: bool = True,
    weights: Weights = "dense",
) -> tuple[Decoder, dict[str, Any]]:
    """Loads a published checkpoint.

    Args:
      source: a directory in Hugging Face or Orbax format, or a hub id such as `Qwen/Qwen3-0.6B`.
      dtype: of the parameters and activations: float32, bfloat16 or float16. None means float32
        on CPU, whose other products are slow, and the checkpoint's own elsewhere. Biases of
        routers' scores are float32 in any.
      mesh: the devices that the parameters are spread over, as `sharding.axes.RULES` say: JAX's, or
        text such as "fsdp:4,tensor:2"; None for the default device. Each process reads what its own
        devices hold of a tensor, and all processes of the mesh call this.
      rope_scaling: replaces the checkpoint's, the dict that config.json would hold, such as
        `{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`; what it
        can say besides is told in `qwen_jax.rope_scaling`.
      allow_nonfinite: whether NaN and infinite weights are warned of; else they are refused.
      weights: of a quantised checkpoint: "dense" dequantises them here, "packed" keeps them as they
        are and dequantises within each product, for less memory and more work.

    Returns:
      The model and its parameters: `model.apply({"params": params}, input_ids)`.

    Raises:
      UserError: whatever is wrong with the source, in one line that names file, field or tensor.
    """
    if weights not in get_args(Weights):
        raise UserError(
            f"weights = {weights} is not supported; known: {', '.join(get_args(Weights))}"
        )
    mesh = axes.as_mesh(mesh)
    directory = resolve_source(source)
    config = load_config(directory)
    if rope_scaling is not None:
        config = with_rope_scaling(config, rope_scaling)
    dtype = _resolve_dtype(dtype, config)
    _warn_of_wide_copies(config, dtype)
    stored = open_model(config, directory, packed=weights == "packed")
    shardings = None
    if mesh is not None:
        axes.check_mesh(stored.config, mesh, parameter_shapes(stored.config))
        shardings = {
            path: axes.parameter_sharding(stored.config, mesh, "/".join(path))
            for path in stored.tensors
        }
    params = load_params(stored.tensors, directory, dtype, allow_nonfinite, shardings)
    return Decoder(stored.config, mesh=mesh), params


def _warn_of_wide_copies(config: ModelConfig, dtype: jnp.dtype) -> None:
    if config.moe is not None and dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        warnings.warn(
            f"{config.moe.num_experts} experts in bfloat16 on CPU: XLA copies all of them to "
            "float32 in every call, for twice their memory besides; load as float32 or float16",
            stacklevel=3,
        )


def _resolve_dtype(dtype: jnp.dtype | str | None, config: ModelConfig) -> jnp.dtype:
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else config.dtype
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise UserError(f"dtype = {name} is not supported; known: {', '.join(DTYPES)}")
    return jnp.dtype(name)


def parameter_bytes(params: Any) -> int:
    """The memory that parameters take, packed ones as they are packed."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def load_tokenizer(source: str | Path) -> "Tokenizer":
    """The tokenizer of a checkpoint directory or a hub id; no weights are read.

    Raises:
      UserError: no tokenizer files, broken ones, or one with ids that the model of the same
        directory has no embedding for.
    """
    # Tokenizers, templates and their libraries, which a model needs nothing of.
    from qwen_jax import text

    directory = resolve_source(source, weights=False)
    tokenizer = text.load_tokenizer(directory)
    config = directory / "config.json"
    if config.is_file():
        raw = read_json_object(config)
        # A vision-language model has its vocabulary in its text tower.
        tower = raw.get("text_config")
        vocab_size = (tower if isinstance(tower, dict) else raw).get("vocab_size")
        if isinstance(vocab_size, int):
            text.check_vocabulary_fits(tokenizer, vocab_size)
    return tokenizer
