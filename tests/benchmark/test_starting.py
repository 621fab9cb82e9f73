"""Start-up: what is counted, and that a warm start finds what an earlier one has compiled."""

import json
import statistics

import pytest

from qwen_jax.benchmark import starting
from qwen_jax.benchmark.loading import LoadMeasurement, measure_import, measure_load
from qwen_jax.benchmark.starting import measure_start
from qwen_jax.errors import UserError


def test_imports_are_timed_in_processes_of_their_own():
    # Both are imported here already; a hundredth of the one's time would be all of the other's.
    package, jax = (
        statistics.median(measure_import(f"import {name}") for _ in range(3))
        for name in ("qwen_jax", "jax")
    )
    assert 0 < package < jax / 2
    with pytest.raises(UserError, match="measuring import qwen_jux failed: ModuleNotFoundError"):
        measure_import("import qwen_jux")


def test_a_start_counts_from_the_command_to_the_second_token(tiny, tmp_path):
    compiled = tmp_path / "compiled"
    found = [
        measure_load("qwen_jax", tiny, first="two tokens", compilation_cache=compiled)
        for _ in range(2)
    ]
    programs = {path.name for path in compiled.iterdir() if path.name.endswith("-cache")}
    for name in ("prefill", "_decode_step"):
        assert any(f"jit_{name}-" in program for program in programs), programs
    for start in found:
        # Imports of JAX are no part of the load, but of the whole.
        assert start.whole_s > start.load_s + start.first_s + 0.2
        assert 0 < start.tracing_s < start.tracing_s + start.getting_s < start.first_s
    # To read a program is faster than to compile it; to trace it is the same.
    cold, warm = found
    assert warm.getting_s < cold.getting_s / 2


def test_figures_are_ratios_of_the_same_turn_and_the_first_turn_does_not_count(
    tmp_path, monkeypatch
):
    seconds = {"import jax": 2.0, "import qwen_jax": 0.1}
    loads = []

    def load(engine, directory, first, compilation_cache):
        loads.append((engine, directory, first, compilation_cache is None))
        whole = 20.0 if compilation_cache is None else 4.0
        return LoadMeasurement(1.0, 2.0, 0.5, 0.25, 0, whole if len(loads) > 2 else 1e9)

    monkeypatch.setattr(starting, "measure_import", lambda statement: seconds.get(statement, 3.0))
    monkeypatch.setattr(starting, "measure_load", load)
    found = {demand.what: demand for demand in measure_start(tmp_path, repeats=2)}
    assert loads == [("qwen_jax", tmp_path, "two tokens", cold) for cold in (True, False)] * 3
    bare = found["import qwen_jax to import jax"]
    assert (bare.values, bare.is_met) == ((0.05, 0.05), True)
    used = found["from qwen_jax import generate, load_pretrained to import jax"]
    assert (used.values, used.is_met) == ((1.5, 1.5), None)
    cold, warm = (found[f"{name} start to the second token"] for name in ("cold", "warm"))
    assert (cold.values, cold.is_met) == ((20.0, 20.0), True)
    assert (warm.values, warm.is_met) == ((4.0, 4.0), True)
    assert found["cold start to the second token, of them tracing"].values == (0.5, 0.5)
    assert found["warm start to the second token, of them reading programs"].values == (0.25, 0.25)


def test_the_command_prints_figures_and_aims(run_tool, tiny, tmp_path):
    arguments = (f"--model={tiny}", f"--workdir={tmp_path}", "--workload=start", "--repeats=1")
    result = run_tool("benchmark", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    header, _, *rows = result.stdout.splitlines()
    assert header == "| figure | median (lowest to highest) | aim | met |"
    assert len(rows) == 12
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [record["workload"] for record in records] == ["start"] * 12
    assert (tmp_path / "start.md").read_text() == result.stdout
