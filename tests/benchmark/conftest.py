import pytest

from tests.reference import random_reference, save_reference
from tests.tools.conftest import environment, run_tool

__all__ = ["environment", "run_tool"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model of two layers."""
    directory = tmp_path_factory.mktemp("benchmark") / "tiny"
    return save_reference(random_reference("qwen3", num_hidden_layers=2), directory)
