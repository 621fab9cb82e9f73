"""Differences with intervals, and what they say of effects that records were made to show."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.intervals import difference
from experiments.long_context.compare import Side, write_comparison
from experiments.long_context.effects import EFFECTS, findings
from experiments.long_context.records import add_scores, read_scores
from experiments.long_context.scoring import Score
from experiments.long_context.small_model import SmallModel
from experiments.long_context.small_report import named_scores, write_small_report
from experiments.long_context.small_study import FINE_TUNED, TUNED, methods
from experiments.results import cut_tail
from experiments.settings import read_settings, settle
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


def test_of_models_that_differ_the_interval_is_student_s():
    """Of means 0, 1 and 2: 1 with 4.303 times 1 / sqrt(3), from Student's table at 2 degrees."""
    one = {s: {i: float(s) for i in range(50)} for s in range(3)}
    other = {s: dict.fromkeys(range(50), 0.0) for s in range(3)}
    half = 4.303 / 3**0.5
    for found in (difference(one, other, True), difference(one, None, False)):
        assert found.mean == 1.0
        assert (found.low, found.high) == pytest.approx((1 - half, 1 + half), abs=1e-3)
    alone = difference({0: one[2]}, {0: other[2]}, True)
    assert (alone.mean, alone.low, alone.high) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="no seed in common"):
        difference({0: one[0]}, {1: other[1]}, False)


def test_intervals_over_models_hold_what_they_say():
    """Drawn models with noise of their own and texts with more: 95% of intervals have the mean."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        models = rng.normal(1.0, 0.5, 4)
        one = {s: dict(enumerate(rng.normal(m, 0.5, 20))) for s, m in enumerate(models)}
        found = difference(one, None, False)
        hits += found.low < 1.0 < found.high
    assert 0.91 < hits / 200 <= 1.0


def test_every_effect_is_of_methods_that_are_measured():
    for effect in EFFECTS:
        for side in filter(None, (effect.one, effect.other)):
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
    sides = [Side(name, read_scores(tmp_path / name), 1) for name in ("here", "there")]
    text = write_comparison(*sides, workdir=tmp_path / "here")
    assert "| `none` | recall | 128 | +25 (+25 to +25) | -0.5 (-0.5 to -0.5) |" in text
    assert "same texts" in text and "at some length or task: only here, only there." in text
    assert (tmp_path / "here" / "comparison.md").read_text() == text
    for other in (made("none", 256, 1, 1), [dataclasses.replace(s, seed=9) for s in there]):
        with pytest.raises(UserError, match="no scaling, task, length and seed in common"):
            write_comparison(sides[0], Side("there", other, 1), tmp_path)


def test_small_models_are_compared_by_names_and_trained_lengths():
    """One trained at 128 tokens with one at 256: YaRN at 4 times each."""
    other = SmallModel(256)
    here = made(ROPES["YaRN"], 512, 0.9, 1.0)
    there = made(methods(other)["YaRN"], 1024, 0.4, 2.0)
    sides = [
        Side(name, named_scores(scores, methods(model)), model.trained)
        for name, scores, model in (("here", here, MODEL), ("there", there, other))
    ]
    assert {s.rope for side in sides for s in side.scores} == {"YaRN"}
    (key,) = sides[0].by_key()
    assert key == ("YaRN", "recall", 4.0) and key in sides[1].by_key()


def test_the_small_report_tells_what_was_made(tmp_path):
    scores = []
    for name, rope in ROPES.items():
        for times in (1, 4, 8):
            share = 1.0 if times == 1 or "logn" in name else 0.1
            scores += made(rope, 128 * times, share, 5 * (1 - share) + 0.1)
            scores += made(rope, 128 * times, 0, 2.5, task="loss")
    workdir = tmp_path / "study"
    write(workdir, scores)
    steps = {ROPES["PI"]: [[0, 0.2], [5, 0.96], [10, 0.9], [15, 0.97], [20, 0.96]],
             ROPES["YaRN"]: [[0, 0.99], [5, 0.98], [10, 0.97]]}  # fmt: skip
    models = [{"seed": seed, "tries": 2, "recall": 0.97, "adapting": steps} for seed in range(2)]
    path = workdir / "models.jsonl"
    path.write_text("".join(json.dumps(own) + "\n" for own in models))
    text = write_small_report(workdir, MODEL, read_scores(workdir))
    assert "| 0 | 2 | 97.0% | yes |" in text and "left out of" not in text
    assert "| PI | 20%, 20% | 15, 15 | 96%, 96% |" in text
    assert "| YaRN | 99%, 99% | 0, 0 | 97%, 97% |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| none collapses")]
    assert "| above 30 | +90 (+90 to +90) points | seen |" in row
    (row,) = [line for line in text.splitlines() if line.startswith("| NTK falls")]
    assert "| +0 (+0 to +0) points | not seen (smaller than these texts can tell) |" in row
    row = "| Qwen1 NTK + logn | 3.78 | 0.10 | 3.58 | - | 3.56 | 0.10 | 4.62 | 0.10 |"
    assert row in text.replace("0.09", "0.10").replace("0.11", "0.10")
    for name in ("effects", "frequencies", "effective", "lengths"):
        assert (workdir / f"{name}.png").stat().st_size > 5000
    assert (workdir / "effects.csv").read_text().count("\n") > 20
    # What did not learn says nothing of scalings.
    models[0]["recall"] = 0.5
    path.write_text("".join(json.dumps(own) + "\n" for own in models))
    text = write_small_report(workdir, MODEL, scores)
    assert "left out of" in text and "of one model they tell nothing of others" in text
    path.unlink()
    text = write_small_report(workdir, MODEL, scores)
    assert "left out of" in text and "| seen |" not in text


def test_results_of_another_version_are_refused_by_their_field(tmp_path):
    write(tmp_path / "old", made("none", 64, 1, 1))
    path = tmp_path / "old" / "results.jsonl"
    path.write_text(path.read_text().replace('"digest"', '"hash"'))
    with pytest.raises(UserError, match="jsonl:1: has no digest, and is of another version"):
        read_scores(tmp_path / "old")


def test_a_line_that_a_kill_cut_is_left_out_and_others_follow(tmp_path):
    scores = made("none", 64, 1, 1)
    write(tmp_path / "cut", scores)
    path = tmp_path / "cut" / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    # Who reads leaves the file alone: another may be writing it.
    assert read_scores(tmp_path / "cut") == scores[:-1]
    assert path.read_bytes() == whole[:-30]
    cut_tail(tmp_path / "cut")
    add_scores(tmp_path / "cut", scores[-1:], {"seed": 0})
    assert path.read_bytes() == whole


def test_settings_are_kept_added_to_and_refused(tmp_path):
    settle(tmp_path / "run", {"model": "m", "depths": 5})
    settle(tmp_path / "run", {"model": "m", "judge": "none"})
    assert read_settings(tmp_path / "run") == {"model": "m", "depths": 5, "judge": "none"}
    with pytest.raises(UserError, match="there have depths = 5, not 4; set it back or give"):
        settle(tmp_path / "run", {"depths": 4})
    (tmp_path / "run" / "settings.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"settings\.json"):
        read_settings(tmp_path / "run")
