"""What a wheel carries, by setuptools' own reading of pyproject.toml."""

from pathlib import Path

import pytest

from qwen_jax.checkpoint.hub import EMBEDDED, resolve_source

setuptools = pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def carried(monkeypatch):
    """Files that a wheel has, from the root."""
    from setuptools.config.pyprojecttoml import apply_configuration

    monkeypatch.chdir(ROOT)
    blank = setuptools.Distribution({"script_name": "setup.py"})
    distribution = apply_configuration(blank, "pyproject.toml")
    # It would write a list of files for that, and without MANIFEST.in has nothing to add.
    assert not (ROOT / "MANIFEST.in").exists()
    distribution.include_package_data = False
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    modules = {Path(path) for _, _, path in command.find_all_modules()}
    data = {Path(source, name) for _, source, _, names in command.data_files for name in names}
    return modules | data


def test_a_wheel_carries_all_files_of_the_package(carried):
    there = {
        path.relative_to(ROOT)
        for path in (ROOT / "qwen_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there - carried == set()
    model = Path(resolve_source(EMBEDDED)).relative_to(ROOT)
    assert {model / "config.json", model / "model.safetensors"} <= carried


def test_a_wheel_carries_recipes_and_command_lines_and_no_tests(carried):
    assert {Path("configs/train/sft.py"), Path("tools/train.py")} <= carried
    assert {path.parts[0] for path in carried} <= {"qwen_jax", "configs", "experiments", "tools"}
