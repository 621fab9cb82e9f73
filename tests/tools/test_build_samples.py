"""`python -m tools.build_samples`: what recipes find, and a place that cannot be written."""

import json

from qwen_jax.hf_config import load_config
from qwen_jax.text import load_tokenizer
from tests.tools.conftest import refusal

RECORDS, HELD_OUT = 12, 10


def test_data_and_sizes_that_recipes_begin_with_are_written(run_tool, tmp_path):
    counts = [f"--records={RECORDS}", f"--held_out={HELD_OUT}"]
    done = run_tool("build_samples", f"--workdir={tmp_path}", *counts)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    data = tmp_path / "data"
    records = {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in data.iterdir()
    }
    for name in ("general", "reasoning", "long"):
        assert all(record.keys() == {"text"} for record in records[name])
        assert (len(records[name]), len(records[f"{name}_held_out"]) > 2) == (RECORDS, True)
    for name in ("short_chats", "questions", "pairs"):
        assert (len(records[name]), len(records[f"{name}_held_out"])) == (RECORDS, HELD_OUT)
        assert not set(map(json.dumps, records[name])) & set(
            map(json.dumps, records[f"{name}_held_out"])
        )
    assert all(record["chosen"] != record["rejected"] for record in records["pairs"])
    assert all(record["answer"] for record in records["questions"])
    # Two of a problem, with thinking and without, and more of those with a calculator.
    assert len(records["chats"]) >= 2 * RECORDS
    base, student = (load_config(tmp_path / name) for name in ("base", "student"))
    assert (base.hidden_size, student.hidden_size) == (128, 64)
    tokenizer = load_tokenizer(tmp_path / "student")
    assert tokenizer.max_id < student.vocab_size == base.vocab_size
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_workdir_that_cannot_be_written_is_refused_in_a_line(run_tool, tmp_path):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / "small"
    line = refusal(run_tool("build_samples", f"--workdir={workdir}", "--records=10"))
    assert line == f"--workdir={workdir}: cannot be written (Not a directory)"
