"""`python -m tools.families`: what README.md says of the families is true and complete."""

import dataclasses
import re
import shutil
import subprocess
import sys

import pytest

from qwen_jax.errors import UserError
from tests.commands import ROOT
from tests.tools.conftest import refusal
from tools.families import BEGIN, COLUMNS, END, FAMILIES, families_table, with_table

TEST = "tests/tools/test_families.py::test_the_readme_is_current"
NONE = dict.fromkeys(COLUMNS, ())
ROW = dataclasses.replace(
    FAMILIES[0], title="One", presets=r"(?P<line>one)-(?P<size>\d+b)(-chat)?", **NONE
)


def test_the_readme_is_current(run_tool):
    result = run_tool("families", "--check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_it_prints_what_the_readme_holds(run_tool):
    printed = run_tool("families")
    assert printed.returncode == 0, printed.stderr
    assert BEGIN + printed.stdout + END in (ROOT / "README.md").read_text(encoding="utf-8")


def test_an_old_table_is_found_and_replaced(run_tool, environment, tmp_path):
    for name in ("tools", "tests", "configs", "qwen_jax"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}old\n{END}after\n", encoding="utf-8")
    path = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    assert "README.md" in refusal(run_tool("families", "--check", **path))
    assert run_tool("families", "--write", **path).returncode == 0
    assert run_tool("families", "--check", **path).returncode == 0
    assert readme.read_text() == f"before\n{BEGIN}{families_table()}{END}after\n"


def test_sizes_come_from_the_presets_and_marks_from_the_tests():
    row = dataclasses.replace(ROW, logits=[TEST], export=[TEST])
    other = dataclasses.replace(ROW, title="Two", presets="", cache=[TEST])
    table = families_table([row, other], ["one-7b", "one-7b-chat", "one-14b"])
    mark = "[1](tests/tools/test_families.py)"
    assert table.splitlines() == [
        "| family | released | logits | cache | export | quantised |",
        "|---|---|---|---|---|---|",
        f"| One | One 7B, 14B | {mark} | - | {mark} | - |",
        f"| Two | - | - | {mark} | - | - |",
        "",
        f"1. `{TEST}`",
    ]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("tests/tools/test_families.py::test_absent", "has no such test"),
        ("tests/tools/test_absent.py::test_absent", "no such file"),
        # A fixture, a class or a name in a string is no test of the file.
        ("tests/tools/test_families.py::TEST", "has no such test"),
    ],
)
def test_a_test_that_is_not_there_is_refused_by_name(test, message):
    with pytest.raises(UserError, match=message) as error:
        families_table([dataclasses.replace(ROW, quantised=[test])], [])
    assert str(error.value).startswith(test)


def test_the_tests_of_a_family_run_for_its_model_type(environment):
    """A test that runs for several model types, and not for this one, says nothing of it."""
    cited = {t for family in FAMILIES for column in COLUMNS for t in getattr(family, column)}
    files = sorted({test.partition("::")[0] for test in cited})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", *files],
        cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    cases = dict.fromkeys(cited, frozenset())
    for line in done.stdout.splitlines():
        test, _, parameters = line.partition("[")
        if test in cases:
            cases[test] |= set(re.split(r"[-,\] ]+", parameters)) or {""}
    assert all(cases.values())
    known = {family.model_type for family in FAMILIES} - {""}
    for family in FAMILIES:
        for column in COLUMNS:
            for test in getattr(family, column) if family.model_type else ():
                types = cases[test] & known
                assert not types or family.model_type in types, (family.title, test)


def test_a_preset_belongs_to_one_family():
    with pytest.raises(UserError, match="preset two-7b belongs to no family"):
        families_table([ROW], ["two-7b"])
    with pytest.raises(UserError, match="preset one-7b belongs to One and One"):
        families_table([ROW, ROW], ["one-7b"])


@pytest.mark.parametrize("readme", ["", BEGIN, END + BEGIN, BEGIN + BEGIN + END, BEGIN + END + END])
def test_a_readme_without_its_marks_is_refused(readme):
    with pytest.raises(UserError, match=r"README\.md: needs one"):
        with_table(readme, "")
