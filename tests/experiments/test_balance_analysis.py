"""`python -m experiments.moe_balance --analyze` on random checkpoints, and how two differ."""

import csv
import json

import numpy as np
import pytest

from experiments.moe_balance.analysis import information_interval, read_analysis
from experiments.moe_balance.texts import read_domains, rows_of
from qwen_jax.errors import UserError
from qwen_jax.pretrained import load_tokenizer
from tests.experiments.conftest import run as run_module
from tests.reference import random_reference, save_reference
from tests.tools.conftest import write_tokenizer


def run(*arguments, **more):
    return run_module(*arguments, module="experiments.moe_balance", **more)


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """A file, a directory of two files, and another file."""
    directory = tmp_path_factory.mktemp("domains")
    (directory / "prose.txt").write_text(
        "The sea was calm that night, and the moon was full. " * 60
    )
    (directory / "code").mkdir()
    (directory / "code" / "a.py").write_text("def f(x):\n    return x + 1\n" * 40)
    (directory / "code" / "b.py").write_text("for i in range(10):\n    print(f(i))\n" * 40)
    (directory / "numbers.txt").write_text("".join(f"{n * n}, " for n in range(600)))
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One with and one without an expert that all tokens go to, of different sizes."""
    found = []
    for family, fields in (
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2}),
        ("qwen2_moe", {"num_experts": 6, "num_experts_per_tok": 3}),
    ):
        directory = tmp_path_factory.mktemp(family)
        reference = random_reference(family, num_hidden_layers=2, **fields)
        save_reference(reference, directory)
        write_tokenizer(directory)
        found.append(directory)
    return found


@pytest.fixture(scope="module")
def analysed(checkpoints, domains, tmp_path_factory):
    workdirs = []
    for checkpoint in checkpoints:
        workdir = tmp_path_factory.mktemp("analysis")
        done = run(
            "--analyze",
            f"--model={checkpoint}",
            f"--workdir={workdir}",
            f"--domains={domains}",
            "--tokens=512",
            "--length=64",
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == (workdir / "report.md").read_text() + "\n"
        workdirs.append(workdir)
    return workdirs


def test_a_checkpoint_is_looked_at_by_layer_and_domain(analysed, checkpoints):
    report = (analysed[0] / "report.md").read_text()
    for name in ("layers.png", "domains.png", "together.png"):
        assert f"({name})" in report and (analysed[0] / name).stat().st_size > 5000
    for word in ("| code |", "| numbers |", "| prose |", "2 layers of 8 experts", "1,536 tokens"):
        assert word in report
    rows = [json.loads(line) for line in (analysed[0] / "layers.jsonl").open()]
    assert [row["layer"] for row in rows] == [0, 1] and rows[0]["versions"]["jax"]
    with (analysed[0] / "domains.csv").open() as file:
        shares = list(csv.DictReader(file))
    assert len(shares) == 2 * 3 * 8
    for layer in "01":
        for domain in ("code", "numbers", "prose"):
            own = [
                float(row["share"])
                for row in shares
                if (row["layer"], row["domain"]) == (layer, domain)
            ]
            assert sum(own) == pytest.approx(1)
    found = read_analysis(analysed[0])
    low, high = information_interval(found)
    assert low < found.measured.figures["domain_information"].mean() < high


def test_the_report_is_made_again_of_what_is_there(analysed, tmp_path):
    before = (analysed[1] / "report.md").read_text()
    (analysed[1] / "report.md").unlink()
    done = run("--report_only", f"--workdir={analysed[1]}")
    assert (done.returncode, done.stdout) == (0, before + "\n")
    done = run("--report_only", f"--workdir={analysed[1]}", "--tokens=3")
    assert done.returncode == 1 and "--tokens changes nothing of results" in done.stderr
    done = run("--report_only", f"--workdir={tmp_path}")
    assert done.returncode == 1 and "has no results; run the study there first" in done.stderr
    done = run(f"--workdir={analysed[1]}", "--seeds=1")
    assert done.returncode == 1 and "has results of --analyze; give another" in done.stderr


def test_two_checkpoints_are_compared(analysed):
    done = run(f"--workdir={analysed[0]}", f"--compare={analysed[1]}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "I(expert; domain), the first less the second: " in done.stdout
    assert "saturation" not in done.stdout
    assert (analysed[0] / "compare.png").stat().st_size > 5000
    # With itself: the same experts, and no difference.
    done = run(f"--workdir={analysed[0]}", f"--compare={analysed[0]}")
    assert "+0.000 bits" in done.stdout and "no difference that these texts" in done.stdout
    assert "100.0% are the same in both" in done.stdout


def test_a_mesh_finds_the_same(analysed, checkpoints, domains, tmp_path):
    done = run(
        "--analyze",
        f"--model={checkpoints[0]}",
        f"--workdir={tmp_path}",
        f"--domains={domains}",
        "--tokens=512",
        "--length=64",
        "--mesh=data:2,expert:2",
        devices=4,
    )
    assert done.returncode == 0, done.stderr
    one, other = (read_analysis(workdir).measured for workdir in (analysed[0], tmp_path))
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4)
    np.testing.assert_array_equal(one.by_domain, other.by_domain)
    np.testing.assert_array_equal(one.choices, other.choices)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--analyze"], "--model is needed with --analyze"),
        (["--model=M"], "--model is of --analyze; leave it out"),
        (["--analyze", "--model=M", "--seeds=2"], "--seeds is not of --analyze; leave it out"),
        (["--arms=nine"], "--arms: 'nine' is no arm; known: none"),
        (["--hidden_size=20"], "--hidden_size=20: four heads have an even number"),
        (["--compare=nowhere"], "measured.npz: is not there; run --analyze with"),
        (["--compare=x", "--report_only"], "two things; give one"),
        (["--analyze", "--model=M", "--domains=nowhere"], "--domains: nowhere is no directory"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path):
    done = run(f"--workdir={tmp_path}", *arguments)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


def test_a_model_without_experts_and_other_domains_are_refused(analysed, domains, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    save_reference(random_reference("qwen3", num_hidden_layers=1), dense)
    write_tokenizer(dense)
    done = run("--analyze", f"--model={dense}", f"--workdir={tmp_path}", f"--domains={domains}")
    assert done.returncode == 1 and "has no experts; give a checkpoint of a mixture" in done.stderr


def test_domains_are_read_from_files_directories_and_names(domains, checkpoints):
    found = read_domains([str(domains)])
    assert list(found) == ["code", "numbers", "prose"]
    assert found["code"].startswith("def f") and found["code"].rstrip().endswith("print(f(i))")
    named = read_domains([f"a={domains / 'prose.txt'}", f"b={domains / 'code'}"])
    assert named == {"a": found["prose"], "b": found["code"]}
    assert list(read_domains([])) == ["python", "english"]
    rows = rows_of(found, load_tokenizer(checkpoints[0]), 200, 64)
    assert rows["input_ids"].shape == (9, 64)
    assert rows["domains"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    tokenizer = load_tokenizer(checkpoints[0])
    ids = tokenizer.encode(found["numbers"])
    np.testing.assert_array_equal(rows["input_ids"][3:6].ravel(), ids[:192])
    with pytest.raises(UserError, match=r"domain code has [\d,]+ tokens, and 99,968 are asked for"):
        rows_of(found, tokenizer, 100_000, 64)
    with pytest.raises(UserError, match="--tokens=9: less than a row of --length=64"):
        rows_of(found, tokenizer, 9, 64)


def test_domains_that_cannot_be_read_are_named(domains, tmp_path):
    with pytest.raises(UserError, match="is one domain, a; what experts have"):
        read_domains([f"a={domains / 'prose.txt'}"])
    with pytest.raises(UserError, match="two domains called code; rename one"):
        read_domains([str(domains), f"code={domains / 'prose.txt'}"])
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="bad: is not UTF-8 text"):
        read_domains([str(tmp_path)])
    (tmp_path / "bad").write_text(" \n")
    with pytest.raises(UserError, match="bad: has no text"):
        read_domains([str(tmp_path)])
    (tmp_path / "bad").unlink()
    with pytest.raises(UserError, match="is empty; put a file or directory"):
        read_domains([str(tmp_path)])
    with pytest.raises(UserError, match="gone: cannot be read"):
        read_domains([f"a={tmp_path / 'gone'}"])
