"""Which frequencies a scaling leaves turning: closed forms, and the command."""

import csv
import json

import pytest

from configs.models import get_preset
from experiments.long_context.frequencies import scalings, some_of_each
from qwen_jax.errors import UserError
from tests.experiments.conftest import run

QWEN3 = get_preset("qwen3-0.6b")


def one(text, length=4 * 32768):
    (found,) = scalings(QWEN3, [text], 32768, length)
    return found


def test_of_qwen3_s_pairs_37_5_percent_never_turn_in_training():
    """40 of 64: with base 1e6 and 32,768 tokens the others are slower than one turn."""
    assert one("none").turning == 40
    assert one("none").unseen == 24
    # Of those none passes what it has seen, as far as the text is no longer than trained.
    assert one("none", 32768).unseen == 0


@pytest.mark.parametrize(
    ("text", "unseen"),
    [
        ("linear:4", 0),
        ("yarn:4,original=32768", 0),
        ("dynamic_yarn,original=32768", 0),
        ("proportional,partial_rotary_factor=0.625", 0),
        # All but the slowest are faster than a fourth.
        ("ntk:4", 23),
        ("resonance", 24),
    ],
)
def test_only_what_divides_slow_pairs_by_the_factor_shows_no_new_angles(text, unseen):
    assert one(text).unseen == unseen


def test_temperatures_are_those_of_the_length():
    assert one("yarn:4,original=32768").temperature == pytest.approx(1.296477, abs=1e-6)
    assert one("dynamic_yarn,original=32768").temperature == pytest.approx(1.296477, abs=1e-5)
    assert one("dynamic_yarn,original=32768", 100).temperature == 1


def test_whole_heads_are_needed_to_compare_pairs():
    config = get_preset("qwen3-next-80b-a3b-instruct")
    with pytest.raises(UserError, match="128 pairs where the model has 32"):
        scalings(config, ["proportional"], 32768, 65536)


def test_the_command_writes_figures_tables_and_a_picture(tmp_path):
    done = run(
        "--study=frequencies", "--model=qwen3-0.6b", "--trained=32768", f"--workdir={tmp_path}"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "frequencies.md").read_text() == done.stdout
    assert (tmp_path / "frequencies.png").stat().st_size > 5000
    records = [json.loads(line) for line in (tmp_path / "frequencies.jsonl").open()]
    assert list(dict.fromkeys(r["rope"] for r in records)) == some_of_each(32768, 4)
    with (tmp_path / "frequencies.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records) == 64 * len(some_of_each(32768, 4))
    assert float(rows[0]["scaled"]) == 1


def test_help_and_bad_flags(tmp_path):
    assert "experiments.long_context:" in run("--study=frequencies", "--help").stdout
    workdir = f"--workdir={tmp_path / 'new'}"
    for arguments, words in (
        (["--model=qwen3-0.6b", "--rope=yarn"], "--rope=yarn: factor is missing"),
        (["--model=qwen4"], "qwen4"),
    ):
        done = run("--study=frequencies", *arguments, workdir)
        assert done.returncode == 1 and words in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()
