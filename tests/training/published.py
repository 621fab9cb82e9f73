"""Trees like the parameters' in the names and shapes of the reference's."""

import numpy as np

from qwen_jax.checkpoint.names import leaf_at, regions
from qwen_jax.checkpoint.reader import StoredTensor
from qwen_jax.checkpoint.regions import to_stored


def published(config, tree):
    """Arrays by the names of `named_parameters`, from a tree like the parameters."""
    sparse = config.moe.layers if config.moe else ()
    table = regions(config, {f"model.layers.{i}." for i in sparse})
    arrays = {path: np.asarray(leaf_at(tree, path)) for path in {region.path for region in table}}
    tensors = {path: stored(values) for path, values in arrays.items()}
    return {name: tensor.read() for name, tensor in to_stored(table, tensors).items()}


def stored(values):
    return StoredTensor("", None, values.shape, values.dtype, lambda: values)
