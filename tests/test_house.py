"""The rules of the house, checked on the source."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("qwen_jax", "tools", "configs")
# Peers are scripts for environments of their own.
SOURCES = [
    path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.parent.name != "peers"
]
FAMILY_ROOMS = ("nn", "models", "inference", "evaluation")
# Distributions that do not bear the name of what is imported from them.
DISTRIBUTIONS = {"absl": "absl-py", "google": "protobuf", "orbax": "orbax-checkpoint"}
# Imported where the reference is wanted, and only there.
OPTIONAL = {"datasets", "lm_eval", "tensorboardX", "torch", "transformers", "wandb"}


def relative(path):
    return str(path.relative_to(ROOT))


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def docstrings(tree):
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr):
            yield node.body[0].value


def family_keys(path):
    """Strings that begin with a family's name, and comparisons or lookups of `family`."""
    tree = parse(path)
    prose = set(docstrings(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            if re.match(r"(?i)(qwen|qwq)", node.value):
                yield f"{relative(path)}:{node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Attribute) and node.attr in ("family", "model_type"):
            yield f"{relative(path)}:{node.lineno}: .{node.attr}"


@pytest.mark.parametrize("room", FAMILY_ROOMS)
def test_behaviour_is_keyed_by_mechanism_and_not_by_family(room):
    paths = sorted((ROOT / "qwen_jax" / room).glob("*.py"))
    assert paths
    assert [key for path in paths for key in family_keys(path)] == []


def test_the_search_for_family_keys_finds_them():
    assert list(family_keys(ROOT / "qwen_jax" / "hf_config.py"))


def test_no_file_is_a_drawer():
    names = r"_?(utils?|helpers?|commons?|misc|tools?)(_.*|\d*)|.*_(utils?|helpers?)"
    everything = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
    assert [relative(path) for path in everything if re.fullmatch(names, path.stem)] == []


def test_importing_the_package_imports_no_reference():
    code = (
        "import sys; from qwen_jax import *; "
        "print([m for m in ('torch', 'transformers', 'sentencepiece', 'dashscope') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def programs():
    paths = sorted((ROOT / "tools").glob("*.py"))
    return [path for path in paths if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", programs(), ids=lambda path: path.stem)
def test_a_command_line_says_how_it_is_called(path):
    docstring = ast.get_docstring(parse(path)) or ""
    assert f"python -m tools.{path.stem}" in docstring
    assert docstring.partition("\n")[0].endswith((".", ":"))


def imported(path):
    """Top-level names that a file imports, with whether that is at the head of the file."""
    tree = parse(path)
    head = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node in head
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            yield node.module.partition(".")[0], node in head


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_requirements_are_what_is_imported():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {
        normal(re.match(r"[\w.-]+", line)[0]) for line in lines if line and line[0] not in "#-"
    }
    names = {name for path in SOURCES for name, _ in imported(path)}
    outside = names - set(sys.stdlib_module_names) - set(ROOMS) - OPTIONAL
    assert {normal(DISTRIBUTIONS.get(name, name)) for name in outside} == required


def test_every_requirement_is_installed_in_the_version_it_asks_for():
    from packaging.requirements import Requirement

    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and line[0] not in "#-":
            requirement = Requirement(line)
            assert requirement.specifier.contains(metadata.version(requirement.name)), line


def test_the_reference_is_imported_where_it_is_used_only():
    early = [
        relative(path)
        for path in SOURCES
        for name, at_head in imported(path)
        if name in OPTIONAL and at_head
    ]
    assert early == []
