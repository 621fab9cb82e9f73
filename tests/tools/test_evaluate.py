"""`python -m tools.evaluate`: what it prints and writes, and what it refuses in one line."""

import csv
import json

import pytest
import yaml

import qwen_jax
from qwen_jax.embedded.tokenizer import write_tokenizer
from qwen_jax.errors import UserError
from qwen_jax.evaluation.cache_divergence import measure_cache_divergence
from qwen_jax.evaluation.perplexity import measure_perplexity, read_text_ids
from qwen_jax.evaluation.problems import held_out_problems
from qwen_jax.evaluation.run import EvaluateOptions, check_options
from qwen_jax.provenance import git_hash
from tests.commands import ROOT
from tests.reference import random_reference, save_reference
from tests.tools.conftest import refusal

TEXT = "The river rises in the hills above the town, where snow lies until April.\n" * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights under the embedded model's tokenizer and template."""
    directory = tmp_path_factory.mktemp("evaluated")
    fields = {"num_hidden_layers": 1, "vocab_size": 400, "max_position_embeddings": 512}
    save_reference(random_reference("qwen3", 81, **fields), directory)
    write_tokenizer(directory, [problem.question for problem in held_out_problems(9, 0)], 400)
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    (directory / "river.txt").write_text(TEXT)
    documents = [{"question": f"{i} and {i}?", "gold": i % 2} for i in range(4)]
    data = directory / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["one", "two"],
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (directory / "sums.yaml").write_text(yaml.safe_dump(task))
    return directory


def test_one_run_measures_all_that_is_asked_for(run_tool, model, files, tmp_path):
    workdir = tmp_path / "results"
    result = run_tool(
        "evaluate",
        f"--model={model}",
        f"--workdir={workdir}",
        f"--text={files / 'river.txt'}",
        "--length=40",
        "--stride=24",
        "--tasks=sums",
        f"--task_path={files}",
        "--limit=3",
        "--problems=1",
        "--max_new_tokens=4",
        "--batch_size=4",
        "--seed=5",
        "--cache_dtype=int8",
        HF_HOME=str(tmp_path / "hf"),
        HF_DATASETS_OFFLINE="1",
    )
    assert (result.returncode, result.stderr) == (0, "")
    rows = [json.loads(line) for line in (workdir / "evaluate.jsonl").read_text().splitlines()]
    found = {(row["measure"], row["name"], row["metric"]): row for row in rows}

    loaded = qwen_jax.load_pretrained(model)
    tokenizer = qwen_jax.load_tokenizer(model)
    ids = read_text_ids(files / "river.txt", tokenizer)
    expected = measure_perplexity(*loaded, ids, 40, 24, tokenizer=tokenizer)
    row = found["text", "river.txt", "perplexity"]
    assert row["value"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert row["count"] == len(ids) - 1
    bits = found["text", "river.txt", "bits per byte"]
    assert bits["value"] == pytest.approx(expected.bits_per_byte, rel=1e-4)
    of = "river.txt, int8 cache"
    moved = measure_cache_divergence(*loaded, ids, 40, 24, "int8")
    for metric, value in (("mean KL, nats", moved.kl.mean()), ("largest KL, nats", moved.kl.max())):
        assert found["cache", of, metric]["value"] == pytest.approx(value, rel=0.05)
        assert found["cache", of, metric]["count"] == len(ids) - 1
    assert found["cache", of, "same likeliest token"]["value"] == moved.agrees.mean()
    assert found["cache", of, "share of the full bytes"]["value"] == pytest.approx((24 + 4) / 96)
    assert found["harness", "sums", "acc"]["count"] == 3
    for mode in ("with thinking", "without thinking"):
        assert found["problems", "answers, all", f"right, {mode}"]["count"] == 7
        assert found["problems", "calls, all", f"in format, {mode}"]["count"] == 3
        # Random weights do not come to an end in four tokens.
        assert found["problems", "answers, all", f"cut off, {mode}"]["value"] > 0.5
    for row in rows:
        assert (row["model"], row["seed"], row["device"]) == (str(model), 5, "cpu")
        assert (row["dtype"], row["git"]) == ("float32", git_hash(ROOT))
        assert row["versions"]["lm_eval"]
        assert (row["flags"]["stride"], row["flags"]["tasks"]) == (24, ["sums"])
    with (workdir / "evaluate.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)

    assert "| river.txt | perplexity | " in result.stdout
    assert f"windows of 40 tokens, 24 apart; {len(ids) - 1} of {len(ids)} tokens" in result.stdout
    assert f"| {of} | mean KL, nats | " in result.stdout
    assert "| sums | acc | " in result.stdout
    assert "| problems | count | with thinking | without |" in result.stdout
    assert "cut off (counted as wrong)" in result.stdout
    answers = [json.loads(line) for line in (workdir / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 * (7 + 3)
    assert {answer["num_tokens"] for answer in answers} <= {1, 2, 3, 4}
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert [sample["task"] for sample in samples] == ["sums"] * 3
    assert (workdir / "problems.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to evaluate; give --text, --tasks or --problems"),
        (("--problems=1", "--length=9"), "--length needs --text or --tasks"),
        (("--text=TEXT", "--length=600"), "length = 600 is more than max_position_embeddings ="),
    ],
    ids=["nothing", "a flag of something else", "too long"],
)
def test_what_cannot_be_measured_is_refused(run_tool, model, files, tmp_path, flags, message):
    flags = [flag.replace("TEXT", str(files / "river.txt")) for flag in flags]
    result = run_tool("evaluate", f"--model={model}", f"--workdir={tmp_path / 'results'}", *flags)
    assert refusal(result).startswith(message)
    assert not (tmp_path / "results" / "evaluate.jsonl").exists()


def test_what_can_be_known_before_the_model_is_loaded_is(tmp_path, files):
    text = files / "river.txt"
    for options, message in (
        (EvaluateOptions(text, length=8, stride=9), "stride = 9 is more than length = 8"),
        (EvaluateOptions(tmp_path / "no"), f"{tmp_path / 'no'}: cannot be read"),
        (EvaluateOptions(text, cache_dtype="int3"), "cache_dtype = 'int3': give int8"),
        (EvaluateOptions(tmp_path), f"{tmp_path}: cannot be read"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            check_options(options, tmp_path / "results")
        assert not (tmp_path / "results").exists()
    with pytest.raises(UserError, match=f"^{text}: cannot be written"):
        check_options(EvaluateOptions(text), text)
