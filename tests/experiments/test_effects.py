"""Differences with intervals, and what they say of effects that records were made to show."""

import numpy as np
import pytest

from experiments.long_context.compare import write_comparison
from experiments.long_context.effects import EFFECTS, findings
from experiments.long_context.intervals import difference
from experiments.long_context.records import add_scores, read_scores
from experiments.long_context.scoring import Score
from experiments.long_context.small_model import SmallModel
from experiments.long_context.small_report import write_small_report
from experiments.long_context.small_study import FINE_TUNED, TUNED, methods
from qwen_jax.errors import UserError
from qwen_jax.rope_scaling import parse_rope_flag

MODEL = SmallModel()
ROPES = methods(MODEL)


def made(rope, length, share, nats, seeds=2, task="recall", texts=6):
    rng = np.random.default_rng(length)
    return [
        Score(
            rope,
            task,
            length,
            None,
            seed,
            i,
            length,
            False,
            float(share),
            float(nats + 0.02 * rng.standard_normal()),
            f"{task} {length} {seed} {i}",
            ((0.5, nats),),
        )
        for seed in range(seeds)
        for i in range(texts)
    ]


def test_a_paired_difference_leaves_out_what_texts_have_in_common():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, (3, 40))
    noise = rng.normal(0, 0.1, (3, 40))
    one = {s: dict(enumerate(hard[s] + 1 + noise[s])) for s in range(3)}
    other = {s: dict(enumerate(hard[s])) for s in range(3)}
    paired, apart = difference(one, other, True), difference(one, other, False)
    assert paired.mean == pytest.approx(apart.mean)
    assert paired.low < 1 + noise.mean() < paired.high and paired.high - paired.low < 0.12
    assert apart.high - apart.low > 1


def test_models_that_differ_widen_the_interval():
    """With three seeds apart by 1 the interval reaches from near one to near another."""
    one = {s: {i: float(s) for i in range(50)} for s in range(3)}
    other = {s: dict.fromkeys(range(50), 0.0) for s in range(3)}
    found = difference(one, other, True)
    assert (found.mean, found.low, found.high) == (1.0, 0.0, 2.0)


def test_every_effect_is_of_methods_that_are_measured():
    for effect in EFFECTS:
        for side in (effect.one, effect.other):
            name = side.method.removesuffix(TUNED)
            assert name in ROPES, name
            if side.method != name:
                assert name in FINE_TUNED and side.times in (1, 4, 8)
    for rope in ROPES.values():
        parse_rope_flag(rope)


def test_verdicts_follow_the_interval():
    scores = [
        *made(ROPES["none"], 128, 1.0, 0.1),
        *made(ROPES["none"], 512, 0.1, 4.0),
        *made(ROPES["PI"], 128, 0.9, 0.05),
        *made(ROPES["YaRN"], 512, 0.9, 0.3),
        *made(ROPES["NTK"], 512, 0.9, 0.3),
    ]
    found = {f.effect.name: f for f in findings(scores, ROPES, 128)}
    assert len(found) == 3
    collapse, pi, ntk = found.values()
    assert collapse.seen and collapse.found.mean == pytest.approx(0.9)
    assert pi.verdict == "not seen, but its reverse"
    assert ntk.verdict == "not seen" and ntk.found.mean == 0


def write(workdir, scores):
    workdir.mkdir()
    add_scores(workdir, scores, {"seed": 0})


def test_two_workdirs_are_compared(tmp_path):
    here, there = made("none", 128, 0.75, 1.0), made("none", 128, 0.5, 1.5)
    for name, scores in (("here", here), ("there", there)):
        write(tmp_path / name, [*scores, *made(f"only {name}", 128, 1, 1)])
    text = write_comparison(
        read_scores(tmp_path / "here"), read_scores(tmp_path / "there"), "there", tmp_path / "here"
    )
    assert "| `none` | recall | 128 | +25 (+25 to +25) | -0.5 (-0.5 to -0.5) |" in text
    assert "same texts" in text and "only" not in text
    assert (tmp_path / "here" / "comparison.md").read_text() == text
    with pytest.raises(UserError, match="no scaling, task and length in common"):
        write_comparison(here, made("none", 256, 1, 1), "there", tmp_path)


def test_the_small_report_tells_what_was_made(tmp_path):
    scores = []
    for name, rope in ROPES.items():
        for times in (1, 4, 8):
            share = 1.0 if times == 1 or "logn" in name else 0.1
            scores += made(rope, 128 * times, share, 5 * (1 - share) + 0.1)
            scores += made(rope, 128 * times, 0, 2.5, task="loss")
    workdir = tmp_path / "study"
    write(workdir, scores)
    (workdir / "models/seed_0").mkdir(parents=True)
    gate = workdir / "models/seed_0/gate.json"
    gate.write_text('{"seed": 0, "tries": 2, "recall": 0.97}')
    text = write_small_report(workdir, MODEL, read_scores(workdir))
    assert "| 0 | 2 | 97.0% | yes |" in text and "says anything" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| none collapses")]
    assert "| above 30 | +90 (+90 to +90) points | seen |" in row
    (row,) = [line for line in text.splitlines() if line.startswith("| NTK falls")]
    assert "| +0 (+0 to +0) points | not seen (smaller than these texts can tell) |" in row
    row = "| Qwen1 NTK + logn | 3.78 | 0.10 | 3.58 | - | 3.56 | 0.10 | 4.62 | 0.10 |"
    assert row in text.replace("0.09", "0.10").replace("0.11", "0.10")
    for name in ("effects", "frequencies", "effective", "lengths"):
        assert (workdir / f"{name}.png").stat().st_size > 5000
    assert (workdir / "effects.csv").read_text().count("\n") > 20
    gate.write_text('{"seed": 0, "tries": 1, "recall": 0.5}')
    assert "nothing below says anything" in write_small_report(workdir, MODEL, scores)


def test_results_of_another_version_are_refused_by_their_field(tmp_path):
    write(tmp_path / "old", made("none", 64, 1, 1))
    path = tmp_path / "old" / "results.jsonl"
    path.write_text(path.read_text().replace('"digest"', '"hash"'))
    with pytest.raises(UserError, match="jsonl:1: has no digest, and is of another version"):
        read_scores(tmp_path / "old")
