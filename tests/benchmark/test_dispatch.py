"""`measure_dispatch`: what it runs, what it leaves out, and what its rows say."""

import json

import pytest

from qwen_jax.benchmark.dispatch import measure_dispatch
from qwen_jax.config import MoeSpec
from qwen_jax.nn.moe import Dispatch
from tests.reference import random_reference, save_reference
from tests.tools.conftest import refusal

SPEC = MoeSpec((0,), 8, 2, 16, True)


@pytest.mark.parametrize("gradient", [False, True])
def test_every_method_is_measured_at_every_number_of_tokens(gradient):
    rows = measure_dispatch(SPEC, 32, (1, 12), repeats=3, gradient=gradient)
    assert [(row.num_tokens, row.method) for row in rows] == [
        (num_tokens, method) for num_tokens in (1, 12) for method in Dispatch
    ]
    for row in rows:
        assert len(row.seconds) == 3
        assert min(row.seconds) <= row.median <= max(row.seconds)
    for start in (0, len(Dispatch)):
        some = rows[start : start + len(Dispatch)]
        best = min(row.median for row in some)
        assert best > 0
        assert [row.ratio for row in some] == [row.median / best for row in some]


def test_what_takes_too_much_memory_is_reported_and_not_run():
    methods = (Dispatch.DENSE, Dispatch.SORTED)
    dense, by_blocks = measure_dispatch(SPEC, 32, (512,), methods, repeats=1)
    # One copy of the tokens for each expert.
    assert dense.temporaries > 8 * 512 * 32 * 4 > by_blocks.temporaries
    limit = (dense.temporaries + by_blocks.temporaries) / 2
    dense, by_blocks = measure_dispatch(SPEC, 32, (512,), methods, 1, memory_limit=limit)
    assert (dense.seconds, dense.median, dense.ratio) == ((), None, None)
    assert dense.temporaries > limit
    assert (len(by_blocks.seconds), by_blocks.ratio) == (1, 1.0)
    (nothing,) = measure_dispatch(SPEC, 32, (512,), methods[:1], 1, memory_limit=0)
    assert (nothing.seconds, nothing.ratio) == ((), None)


def test_a_method_that_takes_too_long_is_not_measured():
    rows = measure_dispatch(SPEC, 32, (1, 2), (Dispatch.DENSE,), 1, time_limit=0.0)
    assert [row.seconds for row in rows] == [(), ()]


def test_the_command_prints_a_table_and_draws_it(run_tool, tmp_path):
    source = save_reference(random_reference("qwen3_moe"), tmp_path / "model")
    arguments = (f"--model={source}", f"--workdir={tmp_path / 'out'}", "--workload=dispatch")
    result = run_tool("benchmark", *arguments, "--tokens=1,20", "--repeats=2")
    assert (result.returncode, result.stderr) == (0, "")
    header, _, *rows, note = result.stdout.splitlines()
    assert header == f"| tokens | {' | '.join(Dispatch)} |"
    cells = [row.strip("|").split("|") for row in rows]
    assert [int(row[0]) for row in cells] == [1, 20]
    bold = [[i for i, cell in enumerate(row) if "**" in cell] for row in cells]
    assert bold == 2 * [[1 + list(Dispatch).index(Dispatch.SORTED)]]
    assert note == "ms (temporaries, MB); the default in bold"
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()]
    assert len(records) == 2 * len(Dispatch)
    assert all(len(record["seconds"]) == 2 and record["git"] for record in records)
    assert (tmp_path / "out" / "dispatch.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tokens", ["0", "x", "", "1,-2"])
def test_numbers_of_tokens_that_are_none_are_refused(run_tool, tmp_path, tokens):
    source = save_reference(random_reference("qwen3_moe"), tmp_path / "model")
    arguments = (f"--model={source}", f"--workdir={tmp_path}", "--workload=dispatch")
    assert "--tokens=" in refusal(run_tool("benchmark", *arguments, f"--tokens={tokens}"))


def test_a_dense_model_has_nothing_to_dispatch(run_tool, tmp_path):
    workdir = tmp_path / "out"
    arguments = ("--model=qwen3-0.6b", f"--workdir={workdir}", "--workload=dispatch")
    assert "has no experts" in refusal(run_tool("benchmark", *arguments))
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("workload", "flag"),
    [("dispatch", "prompt_tokens"), ("dispatch", "decode_tokens"), ("model", "tokens")],
)
def test_a_flag_of_the_other_workload_is_refused(run_tool, tmp_path, workload, flag):
    arguments = ("--model=qwen3-30b-a3b", f"--workdir={tmp_path}", f"--workload={workload}")
    message = refusal(run_tool("benchmark", *arguments, f"--{flag}=1"))
    assert message == f"--{flag} is not for --workload={workload}"
