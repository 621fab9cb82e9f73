"""`python -m experiments.long_context` on a random checkpoint, and the report of known records."""

import json

import numpy as np
import pytest

from experiments.intervals import bootstrap_interval
from experiments.long_context.report import effective_length, write_report
from experiments.long_context.scalings import split_scalings
from experiments.long_context.scoring import Score
from qwen_jax.errors import UserError
from tests.experiments.conftest import run
from tests.reference import random_reference, save_reference
from tests.tools.conftest import write_tokenizer

ROPES = "none,yarn:2,original=128,dca,original=64"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    reference = random_reference("qwen3", num_hidden_layers=2, max_position_embeddings=128)
    save_reference(reference, directory)
    write_tokenizer(directory)
    return directory


def lines(path):
    return [json.loads(line) for line in path.open()]


def test_a_run_measures_reports_and_goes_on(checkpoint, tmp_path):
    arguments = (
        f"--model={checkpoint}",
        f"--workdir={tmp_path}",
        "--tasks=passkey",
        "--depths=3",
        "--examples=1",
    )
    done = run(*arguments, "--lengths=300", f"--rope={ROPES}")
    assert (done.returncode, done.stderr) == (0, "")
    records = lines(tmp_path / "results.jsonl")
    assert [r["rope"] for r in records[::3]] == ["none", "yarn:2,original=128", "dca,original=64"]
    assert len(records) == 9 and len({r["digest"] for r in records}) == 3
    assert len({r["nats"] for r in records}) == 9
    report = (tmp_path / "report.md").read_text()
    assert done.stdout == report + "\n"
    for name in ("lengths.png", "heatmap_passkey.png", "effective.png", "frequencies.png"):
        assert f"({name})" in report and (tmp_path / name).stat().st_size > 5000

    # Cut in the middle of a line, as by a kill.
    whole = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    done = run(*arguments, "--lengths=300,350", f"--rope={ROPES}")
    assert (done.returncode, done.stderr) == (0, "")
    again = lines(tmp_path / "results.jsonl")
    assert len(again) == 18
    own = ("rope", "task", "length", "depth", "number", "nats", "digest")

    def rows(records):
        return {tuple(r[name] for name in own) for r in records if r["length"] == 300}

    assert {row[:5] for row in rows(again)} == {row[:5] for row in rows(records)}
    assert {row[6] for row in rows(again)} == {row[6] for row in rows(records)}

    report = (tmp_path / "report.md").read_text()
    for name in ("report.md", "lengths.png", "results.csv"):
        (tmp_path / name).unlink()
    done = run(f"--workdir={tmp_path}", "--report_only")
    assert (done.returncode, done.stdout) == (0, report + "\n")
    done = run(f"--workdir={tmp_path}", "--report_only", "--rope=dca")
    assert (
        done.returncode == 1 and "--rope changes nothing of results that are there" in done.stderr
    )
    done = run(f"--workdir={tmp_path}", f"--compare={tmp_path}")
    assert done.returncode == 0 and "+0 (+0 to +0)" in done.stdout, done.stderr
    assert (tmp_path / "results.csv").read_text().count("\n") == 19

    done = run(*arguments[:-1], "--examples=2", "--lengths=300")
    assert done.returncode == 1
    assert "the results there have examples = 1, not 2" in done.stderr


def test_on_a_mesh_that_cuts_texts_results_are_the_same(checkpoint, tmp_path):
    arguments = (f"--model={checkpoint}", "--tasks=recall,key_loss", "--depths=1", "--examples=1")
    arguments += ("--lengths=900", "--rope=none,rerope,window=32", "--haystack=README.md")
    found = []
    for mesh in ((), ("--mesh=context:2",)):
        workdir = tmp_path / str(len(mesh))
        done = run(f"--workdir={workdir}", *arguments, *mesh, devices=2)
        assert done.returncode == 0, done.stderr
        found.append(
            [(r["rope"], r["digest"], r["nats"]) for r in lines(workdir / "results.jsonl")]
        )
    assert len(found[0]) >= 2
    for one, other in zip(*found, strict=True):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=1e-4)
    (tmp_path / "other.txt").write_text("Other text. " * 900)
    arguments = [a for a in arguments if "haystack" not in a]
    done = run(f"--workdir={tmp_path / '0'}", *arguments, f"--haystack={tmp_path / 'other.txt'}")
    assert done.returncode == 1 and "the results there have haystack = " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--study=tasks"], "--model is needed"),
        (["--lengths="], "--lengths is empty"),
        (["--model=M", "--judge=none,dca"], "--judge=none,dca should be one scaling"),
        (["--report_only", "--compare=x"], "are two things; give one"),
        (["--model=M", "--layers=3"], "--layers is of --study=small; leave it out"),
        (["--rope=dca"], "--rope is of --study=tasks or frequencies; leave it out"),
        (["--tasks=cwe"], "need words; leave the task out of --tasks"),
        (["--report_only"], "has no results; run the study there first"),
        (["--model=M", "--rope=yarn"], "--rope=yarn: factor is missing"),
        (["--model=M", "--rope=none,none"], "should be different scalings by commas"),
        (["--model=M", "--tasks=mmlu"], "--tasks=mmlu is unknown"),
        (["--model=M", "--lengths=4K"], "'4K' should be a number of tokens"),
        (["--model=M", "--haystack=/nowhere"], "/nowhere: cannot be read as text"),
        (["--model=./nowhere"], "nowhere"),
        (
            ["--model=M", "--trained=64"],
            "--trained is of --study=small or frequencies; leave it out",
        ),
        (
            ["--study=base_bound", "--rope=dca"],
            "--rope is of --study=tasks or frequencies; leave it out",
        ),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(arguments, words, tmp_path):
    done = run(f"--workdir={tmp_path / 'new'}", *arguments)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_options_belong_to_the_scaling_before_them():
    assert split_scalings(ROPES) == ["none", "yarn:2,original=128", "dca,original=64"]
    assert split_scalings("yarn:4,original=9,logn=true") == ["yarn:4,original=9,logn=true"]
    with pytest.raises(UserError, match="different scalings"):
        split_scalings("none,,dca")


@pytest.mark.parametrize(
    ("shares", "whole", "reached"),
    [
        ({1: 1.0, 2: 0.9, 4: 0.86, 8: 0.85, 16: 1.0}, 1.0, 4),
        ({1: 0.5, 2: 0.428, 4: 0.42}, 0.5, 2),
        ({1: 0.5, 2: 0.4}, 0.5, 1),
        ({1: 0.5, 2: 0.4}, 0.6, None),
        ({1: 0.0, 2: 0.0}, 0.0, None),
    ],
)
def test_the_effective_length_ends_before_the_first_that_falls_short(shares, whole, reached):
    assert effective_length(shares, whole) == reached


def test_resampled_intervals_are_those_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values.tolist())
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.2 * error)


def test_the_report_says_what_the_records_say(tmp_path):
    scores = [
        Score(rope, "vt", length, None, 0, i, length, i < right, share, nats, "d", ((0.9, nats),))
        for rope, length, right, share, nats in (
            ("none", 64, 4, 1.0, 0.5),
            ("none", 128, 1, 0.5, 2.0),
            ("yarn:2", 64, 3, 1.0, 0.75),
            ("yarn:2", 128, 2, 0.875, 1.0),
        )
        for i in range(4)
    ]
    text = write_report(scores, "A title", tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["`none`", "64", "64"] in rows and ["`yarn:2`", "128", "128"] in rows
    assert ["`none`", "100% (51% to 100%)", "25% (5% to 70%)"] in rows
    assert ["`yarn:2`", "0.75 (0.75 to 0.75)", "1 (1 to 1)"] in rows
    assert ["`none`", "100% (100% to 100%)", "50% (50% to 50%)"] in rows
    assert "- Fewest nats at 64 tokens: none 0.50, yarn:2 0.75" in text
    assert "- Fewest nats at 128 tokens: yarn:2 1.00, none 2.00" in text
    assert "heatmap" not in text
    assert (tmp_path / "places.csv").read_text().splitlines()[1] == "none,vt,64,,0,0,0.9,0.5"


def test_losses_have_nats_and_perplexity_and_no_right_answers(tmp_path):
    scores = [
        Score("none", "loss", 64, None, 0, i, 64, False, 0.0, nats, "d", ((0.1, 1.0), (0.6, 2.0)))
        for i, nats in enumerate((1.0, 2.0))
    ]
    text = write_report(scores, "A title", tmp_path)
    assert "| `none` | 1.5 (1 to 2) |" in text and "| `none` | 4.482 (2.718 to 7.389) |" in text
    assert "right" not in text and "All tasks" not in text
    assert "(positions_loss.png)" in text and (tmp_path / "positions_loss.png").is_file()
