"""A small random model that modules share the making of."""

import pytest

import qwen_jax
from tests.reference import random_reference, save_reference
from tests.training.data.conftest import write_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random model in both engines, and a directory with a tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    reference = random_reference("qwen3", num_hidden_layers=2, head_dim=16)
    save_reference(reference, directory)
    write_tokenizer(directory)
    return reference, *qwen_jax.load_pretrained(directory), directory
