"""`python -m tools.curves`: the picture, what is said of it, and what it refuses."""

import json

import pytest

from tests.tools.conftest import refusal


@pytest.fixture
def runs(tmp_path):
    for name, rewards in (("a", [0.0, 0.5]), ("b", [0.5, 1.0])):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "reward": reward} for step, reward in enumerate(rewards, 1)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return f"{tmp_path / 'a'},{tmp_path / 'b'}"


def test_the_picture_of_several_runs_is_drawn(run_tool, runs, tmp_path):
    output = tmp_path / "reward.png"
    done = run_tool("curves", f"--runs={runs}", f"--output={output}", "--smooth=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "reward, mean and range of 2 runs: 0.25 (0 to 0.5) in the first 1 of 2 points, "
        "0.75 (0.5 to 1) in the last 1",
        f"written: {output}",
    ]
    assert output.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs=", "--output=x.png"], "no run is named; give the workdir of one at least"),
        (
            ["--runs={runs}", "--output={folder}/no/such/x.png"],
            "{folder}/no/such/x.png: cannot be written (No such file or directory)",
        ),
        (["--runs={runs}", "--output={folder}"], "{folder}: is a directory; name a file for"),
        (["--runs={runs}", "--output="], "--output is empty; give a path"),
    ],
)
def test_bad_input_is_one_line(run_tool, runs, tmp_path, arguments, message):
    places = {"runs": runs, "folder": tmp_path}
    line = refusal(run_tool("curves", *(argument.format(**places) for argument in arguments)))
    assert line.startswith(message.format(**places))
