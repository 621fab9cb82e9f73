"""What importing and using the package loads: little, and nothing that is not used."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_jax

ROOT = Path(__file__).parents[1]
# Each takes a good part of a second, or a good part of one together with what it imports.
HEAVY = {
    *("datasets", "grain", "matplotlib", "optax", "orbax", "pandas", "pyarrow", "scipy"),
    *("jinja2", "sentencepiece", "tiktoken", "tokenizers", "torch", "transformers"),
}
LOAD_AND_GENERATE = """
from qwen_jax import generate, load_pretrained
model, params = load_pretrained("qwen_jax/embedded/model")
assert len(generate(model, params, [[1, 2, 3]], max_new_tokens=2)[0]) == 2
"""


def modules_after(code):
    """Names of the modules that a fresh process has loaded after `code`."""
    code = f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(modules):
    return {name.partition(".")[0] for name in modules}


def test_importing_the_package_loads_nothing_but_itself():
    plain = modules_after("")
    own = modules_after("import qwen_jax") - plain
    assert {name for name in own if name.startswith("qwen_jax")} == {"qwen_jax", "qwen_jax.errors"}
    assert not packages(own) & {*HEAVY, "jax", "jaxlib", "flax", "numpy"}
    # What is imported beside it is of the standard library, and a hundredth of JAX.
    assert packages(own) - set(sys.stdlib_module_names) == {"qwen_jax"}
    assert len(own) < 30 < 300 < len(modules_after("import jax") - plain)


@pytest.mark.parametrize(
    ("code", "used"),
    [
        (LOAD_AND_GENERATE, set()),
        ("from qwen_jax import save_pretrained", set()),
        (
            'import qwen_jax; qwen_jax.load_tokenizer("qwen_jax/embedded/model")',
            {"jinja2", "tokenizers", "tiktoken"},
        ),
    ],
    ids=["load and generate", "save", "tokenizer"],
)
def test_what_is_not_used_is_not_loaded(code, used):
    assert packages(modules_after(code)) & HEAVY == used


def test_names_are_there_before_and_after_they_are_used():
    code = (
        "import qwen_jax; before = dir(qwen_jax); from qwen_jax import *; "
        "assert set(qwen_jax.__all__) <= set(before) <= set(dir(qwen_jax)); "
        "assert load_pretrained is qwen_jax.pretrained.load_pretrained"
    )
    assert "qwen_jax.pretrained" in modules_after(code)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'qwen_jax' has no attribute 'generat'"):
        _ = qwen_jax.generat


def test_type_checkers_see_the_same_names_in_the_same_places():
    tree = ast.parse(Path(qwen_jax.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == qwen_jax._HOMES
    assert {*seen, "UserError"} == set(qwen_jax.__all__)
