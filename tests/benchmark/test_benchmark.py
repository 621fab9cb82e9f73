"""`python -m tools.benchmark`, and that both of its engines do the same work."""

import json
import shutil

import numpy as np
import pytest

from qwen_jax.benchmark import training
from qwen_jax.benchmark.engines import ENGINES
from qwen_jax.benchmark.loading import measure_load
from qwen_jax.errors import UserError
from qwen_jax.provenance import git_hash
from tests.reward_models import random_reward_model, save_reward_model
from tests.tools.conftest import ROOT, refusal

FIGURES = [
    "load, s",
    "load + first forward, s",
    "peak memory of a load, GB",
    "prefill of 8, tokens/s",
    "decode after 8, tokens/s",
]


def test_a_run_prints_every_figure_and_records_what_it_was_made_with(run_tool, tiny, tmp_path):
    result = run_tool(
        "benchmark",
        f"--model={tiny}",
        f"--workdir={tmp_path}",
        "--prompt_tokens=8",
        "--decode_tokens=2",
        "--repeats=1",
        "--mesh=fsdp:2,tensor:2",
        JAX_NUM_CPU_DEVICES="4",
    )
    assert (result.returncode, result.stderr) == (0, "")
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()
    ]
    assert header == [f"{tiny}, float32", "qwen_jax", "transformers", "ratio"]
    assert [row[0] for row in rows] == FIGURES
    assert all(float(row[-1]) >= 0 for row in rows)

    records = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [(record["engine"], record["what"]) for record in records] == [
        (engine, what) for engine in ENGINES for what in FIGURES
    ]
    for record in records:
        assert len(record["values"]) == 1
        assert record["git"] == git_hash(ROOT)
        assert set(record["versions"]) == {"jax", "jaxlib", "flax", "torch", "transformers"}
        assert all(record["versions"].values())
        assert (record["device"], record["dtype"]) == ("cpu", "float32")
        assert record["flags"] == {
            "model": str(tiny),
            "workdir": str(tmp_path),
            "prompt_tokens": 8,
            "decode_tokens": 2,
            "repeats": 1,
            "mesh": "fsdp:2,tensor:2",
            "workload": "model",
            "tokens": ["1", "8", "64", "256", "1024"],
            "batch_size": 4,
            "length": 512,
        }


def test_train_steps_are_timed_where_both_engines_do_the_same(run_tool, tiny, tmp_path):
    shape = tmp_path / "shape"
    shape.mkdir()
    shutil.copy(tiny / "config.json", shape)
    result = run_tool(
        "benchmark",
        f"--model={shape}",
        f"--workdir={tmp_path / 'results'}",
        "--workload=train",
        "--batch_size=2",
        "--length=24",
        "--repeats=3",
    )
    assert (result.returncode, result.stderr) == (0, "")
    *_, row = result.stdout.splitlines()
    what, *cells = (cell.strip() for cell in row.strip("|").split("|"))
    assert what == "train step of 2 x 24, tokens/s"
    assert float(cells[-1]) > 0
    records = [json.loads(line) for line in (tmp_path / "results/results.jsonl").open()]
    assert [len(record["values"]) for record in records] == [3, 3]


def test_train_steps_that_are_not_the_same_are_not_timed(tiny, monkeypatch):
    monkeypatch.setattr(training, "_TOLERANCE", 0.0)
    with pytest.raises(UserError, match=r"losses of step \d are .* do not do the same"):
        training.measure_training(tiny, 2, 24, 8)


def test_a_flag_of_another_workload_is_refused(run_tool, tiny, tmp_path):
    line = refusal(
        run_tool("benchmark", f"--model={tiny}", f"--workdir={tmp_path}", "--batch_size=2")
    )
    assert line == "--batch_size is not for --workload=model"


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
