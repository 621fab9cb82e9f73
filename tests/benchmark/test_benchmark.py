"""`python -m tools.benchmark`, and that both of its engines do the same work."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

from qwen_jax.benchmark import measure as measure_module
from qwen_jax.benchmark.engines import ENGINES
from qwen_jax.benchmark.loading import measure_load
from qwen_jax.benchmark.measure import fit_together, measure
from qwen_jax.benchmark.report import Row, rows_of, table
from qwen_jax.benchmark.works import TABLE, Work
from qwen_jax.errors import UserError
from qwen_jax.hf_config import load_config
from qwen_jax.provenance import git_hash
from tests.commands import ROOT
from tests.reward_models import random_reward_model, save_reward_model
from tests.tools.conftest import refusal
from tools.workloads.source import find_source

FIGURES = [
    ("tiny: load", "s"),
    ("tiny: load + first forward, compiled anew", "s"),
    ("tiny: peak memory of a load", "GB"),
    ("tiny: prefill of 2 x 8", "tokens/s"),
    ("tiny: decode of 2, 8 in the cache", "tokens/s"),
]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_run_prints_every_figure_and_records_what_it_was_made_with(run_tool, tiny, tmp_path):
    arguments = (
        f"--model={tiny}",
        "--prompt_tokens=8",
        "--decode_tokens=2",
        "--batch_size=2",
        "--repeats=1",
        "--mesh=fsdp:2,tensor:2",
    )
    workdir = tmp_path / "first"
    result = run_tool("benchmark", *arguments, f"--workdir={workdir}", JAX_NUM_CPU_DEVICES="4")
    assert (result.returncode, result.stderr) == (0, "")
    header, _, *rows = map(cells, result.stdout.splitlines())
    assert header == ["", *ENGINES, "to transformers", "of the limit"]
    assert [row[0] for row in rows] == [f"{what}, {unit}" for what, unit in FIGURES]
    assert all(float(row[3]) >= 0 for row in rows)
    assert [row[4] == "-" for row in rows] == [True] * 3 + [False] * 2
    assert (workdir / "table.md").read_text() == result.stdout
    assert (workdir / "speed.png").stat().st_size > 5000

    records = [json.loads(line) for line in (workdir / "results.jsonl").open()]
    assert [(record["what"], record["unit"]) for record in records] == FIGURES
    for record in records:
        assert [len(values) for values in record["values"].values()] == [1, 1]
        assert record["git"] == git_hash(ROOT)
        assert set(record["versions"]) == {"jax", "jaxlib", "flax", "torch", "transformers"}
        assert all(record["versions"].values())
        assert (record["device"], record["dtype"]) == ("cpu", "float32")
        assert record["flags"] == {
            "model": str(tiny),
            "workdir": str(workdir),
            "prompt_tokens": 8,
            "decode_tokens": 2,
            "repeats": 1,
            "mesh": "fsdp:2,tensor:2",
            "workload": "model",
            "tokens": ["1", "8", "64", "256", "1024"],
            "batch_size": 2,
            "length": 512,
            "prompts": 64,
            "prompt_range": None,
            "answer_range": None,
            "sizes": ["4", "8", "16", "32"],
            "layers": None,
            "capacities": ["1024", "2048", "4096", "8192", "16384", "32768"],
            "lengths": ["512", "1024", "2048", "4096", "8192", "16384"],
            "layer_counts": ["2", "4", "8", "16"],
            "only": [],
            "peer_python": None,
            "compare": None,
            "input": None,
            "problems": 2,
            "max_new_tokens": 128,
            "temperature": 0.0,
            "speculate": None,
            "draft_model": None,
            "draft_tokens": None,
        }


def test_train_steps_are_timed_and_compared_with_an_earlier_run(run_tool, tiny, tmp_path):
    shape = tmp_path / "shape"
    shape.mkdir()
    shutil.copy(tiny / "config.json", shape)
    arguments = (f"--model={shape}", "--workload=train", "--batch_size=2", "--length=24")
    first, second = (tmp_path / name / "results.jsonl" for name in ("first", "second"))
    result = run_tool("benchmark", *arguments, f"--workdir={first.parent}", "--repeats=3")
    assert (result.returncode, result.stderr) == (0, "")
    *_, row = result.stdout.splitlines()
    what, *figures = cells(row)
    assert what == "shape: train step of 2 x 24, tokens/s"
    assert float(figures[2]) > 0
    (record,) = (json.loads(line) for line in first.open())
    assert [len(values) for values in record["values"].values()] == [3, 3]

    arguments += (f"--workdir={second.parent}", "--repeats=1", f"--compare={first}")
    result = run_tool("benchmark", *arguments)
    header, _, row = map(cells, result.stdout.splitlines()[-3:])
    assert header[:5] == ["what", "peer", "ratio then", "now", "change"]
    assert row[0] == "shape: train step of 2 x 24"
    assert row[2] == figures[2]


def small_work(kind, **changes):
    return dataclasses.replace(Work("w", "tiny", kind, rows=2, length=9, steps=12), **changes)


@pytest.mark.parametrize("kind", ["generate", "train"])
def test_engines_that_do_not_do_the_same_are_not_timed(tiny, monkeypatch, kind):
    found = measure(small_work(kind), tiny, 320, dict.fromkeys(ENGINES), 1)
    assert found.seconds.keys() == ENGINES.keys()
    monkeypatch.setattr(measure_module, "_LOSS_TOLERANCE", 0.0)
    monkeypatch.setattr(measure_module, "LEAST_EQUAL", 1.1)
    with pytest.raises(UserError, match=r"w: transformers and qwen_jax do not do the same"):
        measure(small_work(kind), tiny, 320, dict.fromkeys(ENGINES), 8)


def test_engines_that_do_not_fit_together_are_loaded_one_by_one(tiny):
    config = load_config(tiny)
    assert fit_together(config, 2)
    assert not fit_together(config, 10**8)
    found = measure(small_work("generate"), tiny, 320, dict.fromkeys(ENGINES), 3, together=False)
    assert len(found.limits) == 4
    for figures in found.seconds.values():
        assert all(len(values) == 4 for values in figures.values())


def test_a_script_of_another_package_is_measured_beside(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_module, "LEAST_EQUAL", 0.0)
    script = tmp_path / "peer.py"
    script.write_text(
        """
import json, sys
task = json.loads(sys.argv[1])
outcome = [0] * task["rows"] * (1 + task["steps"])
for _ in sys.stdin:
    reading = {"seconds": {"prefill": 10.0, "decode": 20.0}, "outcome": outcome}
    print(json.dumps(reading), flush=True)
"""
    )
    engines = {**dict.fromkeys(ENGINES), "peer": [sys.executable, str(script)]}
    work = small_work("generate")
    config = load_config(tiny)
    rows = rows_of(work, config, measure(work, tiny, 320, engines, 2))
    assert [row.values["peer"] for row in rows] == [[18 / 10] * 2, [24 / 20] * 2]
    header, _, *lines = map(cells, table(rows).splitlines())
    assert header[1:6] == [*engines, "to transformers", "to peer"]
    assert float(lines[0][5]) > 1
    script.write_text("raise SystemExit('no such package')")
    with pytest.raises(UserError, match="measuring peer failed: no such package"):
        measure(work, tiny, 320, engines, 1)


def test_a_table_that_is_there_is_not_measured_again(run_tool, tmp_path):
    values = {"qwen_jax": [1.0], "transformers": [2.0]}
    rows = [
        Row(work.describe(figure), work.model, "s", values)
        for work in TABLE
        for figure in work.figures
    ]
    # Of another workload, and in another order than the table's.
    records = [{"workload": "growth"}, *(row.record() for row in reversed(rows))]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    before = results.read_text()
    result = run_tool("benchmark", "--workload=table", f"--workdir={tmp_path}")
    assert (result.returncode, result.stderr) == (0, "")
    _, _, *lines = map(cells, result.stdout.splitlines())
    assert [line[0] for line in lines] == [f"{row.what}, s" for row in rows]
    assert {line[3] for line in lines} == {"2.00"}
    assert results.read_text() == before


def test_a_flag_of_another_workload_is_refused(run_tool, tiny, tmp_path):
    line = refusal(run_tool("benchmark", f"--model={tiny}", f"--workdir={tmp_path}", "--length=2"))
    assert line == "--length is not for --workload=model"


def test_the_engines_choose_the_same_tokens(tiny):
    ids = np.random.default_rng(0).integers(0, 320, (2, 9))
    chosen = []
    engines = [make(tiny, None) for make in ENGINES.values()]
    for engine in (*engines, ENGINES["qwen_jax"](tiny, "fsdp:2,tensor:2")):
        # The second time from a new cache: nothing of the first may be left.
        for _ in range(2):
            chosen.append(np.concatenate([engine.prefill(ids), engine.decode(12)], axis=1))
    assert chosen[0].shape == (2, 13)
    for other in chosen[1:]:
        np.testing.assert_array_equal(chosen[0], other)


def test_a_load_that_fails_says_why(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UserError, match=r"^measuring transformers failed: transformers cannot lo"):
        measure_load("transformers", tmp_path)


@pytest.mark.parametrize("inside", [False, True], ids=["directory", "results"])
def test_a_workdir_that_cannot_be_written_is_refused(run_tool, tiny, tmp_path, inside):
    workdir = tmp_path / "results"
    if inside:
        (workdir / "results.jsonl").mkdir(parents=True)
    else:
        workdir.write_text("a file")
    line = refusal(run_tool("benchmark", f"--model={tiny}", f"--workdir={workdir}"))
    assert line.startswith(f"--workdir={workdir}: cannot be written (")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("qwen3-0.6", "preset 'qwen3-0.6' is unknown; the nearest"),
        ("./absent", "./absent: no such directory, and not a hub id"),
        ("", "the source is empty"),
    ],
    ids=["preset", "path", "empty"],
)
def test_an_unknown_model_is_refused(run_tool, tmp_path, model, message):
    workdir = tmp_path / "results"
    line = refusal(run_tool("benchmark", f"--model={model}", f"--workdir={workdir}"))
    assert line.startswith(message)
    assert not workdir.exists()


def test_a_model_that_predicts_no_tokens_is_refused(run_tool, tmp_path):
    source = save_reward_model(random_reward_model(1, num_hidden_layers=1), tmp_path / "reward")
    workdir = tmp_path / "results"
    line = refusal(run_tool("benchmark", f"--model={source}", f"--workdir={workdir}"))
    assert line == (
        f"{source}: the model is a reward model, which makes no predictions of the next token, "
        "which are what is timed"
    )
    assert not workdir.exists()


def test_an_empty_workdir_is_not_the_current_directory(run_tool, tiny):
    line = refusal(run_tool("benchmark", f"--model={tiny}", "--workdir="))
    assert line.startswith("--workdir is empty")


def test_the_embedded_model_is_a_checkpoint(tmp_path):
    source = find_source("embedded", tmp_path)
    assert not source.is_shape
    assert (source.directory / "config.json").is_file()
