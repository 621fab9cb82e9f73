"""`--workload=speculation`: what its rows say, and what it refuses."""

import json

import pytest

import qwen_jax
from qwen_jax.benchmark.speculation import as_table, measure_speculation
from qwen_jax.inference.drafting import DraftModel, PromptLookup
from tests.tools.conftest import refusal


def test_rows_tell_what_stood_beside_plain_decoding():
    model, params = qwen_jax.load_pretrained("embedded")
    prompts = [[1, 2, 3], [4, 5, 6, 4, 5], [7]]
    drafters = {"itself": DraftModel(params, model, 3), "lookup": PromptLookup(2, 4)}
    plain, itself, lookup = measure_speculation(
        model, params, prompts, drafters, 8, stop_ids=(), batch_size=2, repeats=2
    )
    for row in (plain, itself, lookup):
        assert (row.tokens, row.same, len(row.seconds)) == (24, 1.0, 2)
        assert row.speedup == row.rate / plain.rate
    assert (plain.drafter, plain.passes, plain.drafted, plain.speedup) == ("none", 24, 0, 1)
    # Eight tokens of each row in two passes of four.
    assert (itself.passes, itself.drafted, itself.accepted) == (6, 18, 18)
    assert lookup.draft_tokens == 4
    _, _, *lines = as_table([plain, itself]).splitlines()
    assert lines[0].startswith("| none | 0 | - | 1.00 | ")
    assert lines[1].startswith("| itself | 3 | 100.0% | 4.00 | ")


def test_the_command_prints_a_table_and_keeps_its_rows(run_tool, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one two one two one"}\n')
    result = run_tool(
        "benchmark", "--workload=speculation", "--model=embedded", f"--workdir={tmp_path}",
        f"--input={tmp_path / 'prompts.jsonl'}", "--max_new_tokens=6", "--repeats=1",
        "--draft_model=embedded", "--draft_tokens=2",
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["none", "lookup", "draft"]
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [record["drafter"] for record in records] == ["none", "lookup", "draft"]
    assert records[2]["accepted"] == records[2]["drafted"] > 0
    assert all(record["workload"] == "speculation" and record["git"] for record in records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=qwen3-0.6b"], "--model=qwen3-0.6b: random weights guess nothing"),
        (["--model=embedded", "--speculate=draft"], "--speculate=draft needs --draft_model"),
        (["--model=embedded", "--speculate=lookup", "--draft_model=x"], "--draft_model needs"),
        (["--model=embedded", "--speculate=mtp"], "the model has no head for the token after"),
        (["--model=embedded", "--input=x", "--problems=3"], "--problems are asked where there is"),
        (["--model=embedded", "--decode_tokens=3"], "--decode_tokens is not for --workload=spec"),
        (["--model=embedded", "--temperature=-1"], "temperature = -1.0 should be"),
    ],
)
def test_bad_input_is_refused(run_tool, tmp_path, arguments, message):
    result = run_tool("benchmark", "--workload=speculation", f"--workdir={tmp_path}", *arguments)
    assert message in refusal(result)
