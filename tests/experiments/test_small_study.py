"""The study on models of its own, made small: what is measured, resumed, gated and reported."""

import signal

import pytest

from experiments.long_context import small_study
from experiments.long_context.measuring import scaled_models
from experiments.long_context.records import read_scores
from experiments.long_context.small_model import SmallModel, TrainingTexts
from experiments.long_context.small_report import write_small_report
from experiments.long_context.tasks import find_tasks
from experiments.settings import settle
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder

MODEL = SmallModel(trained=64, head_dim=16, layers=1, steps=9)
LENGTHS = (64, 256)


@pytest.fixture
def quick(monkeypatch):
    """Two scalings, one of them fine-tuned for four steps, and no demands on what is learned."""
    methods = small_study.methods(MODEL)
    few = {name: methods[name] for name in ("none", "YaRN")}
    monkeypatch.setattr(small_study, "methods", lambda model: few)
    monkeypatch.setattr(small_study, "FINE_TUNED", ("YaRN",))
    monkeypatch.setattr(small_study, "_FINE_TUNING_STEPS", 4)
    monkeypatch.setattr(small_study, "_BETWEEN", 2)
    monkeypatch.setattr(small_study, "_FORMED", 0.0)
    return few


def run(workdir, seeds=1):
    tasks = find_tasks(("recall", "loss"))
    return small_study.run(workdir, MODEL, seeds, tasks, LENGTHS, 2, 1, {"origin": 1})


def test_a_run_trains_measures_and_goes_on(quick, tmp_path):
    settle(tmp_path, {"small": 1})
    scores = run(tmp_path)
    ropes = [*quick.values(), f"{quick['YaRN']}{small_study.TUNED}"]
    expected = {(r, t, n) for r in ropes for t in ("recall", "loss") for n in LENGTHS}
    assert {(s.rope, s.task, s.length) for s in scores} == expected
    assert len(scores) == 2 * len(expected)
    # All scalings have read the same texts.
    texts = {(s.task, s.length, s.number) for s in scores}
    assert len({s.digest for s in scores}) == len(texts) == 8
    (known,) = small_study.read_trained(tmp_path)
    assert (known.seed, known.tries, known.learned) == (0, 1, False)
    ((rope, steps),) = known.adapting.items()
    assert rope == quick["YaRN"] and [step for step, _ in steps] == [0, 2, 4]
    assert known.steps(rope) is None

    # What is there stays; what a kill took is made again, and is the same.
    path = tmp_path / "results.jsonl"
    whole = path.read_text()
    assert run(tmp_path) == scores and path.read_text() == whole
    path.write_text(whole[: len(whole) // 2])
    again = run(tmp_path)

    def key(score):
        return score.rope, score.task, score.length, score.number

    for one, other in zip(sorted(scores, key=key), sorted(again, key=key), strict=True):
        assert key(one) == key(other) and one.digest == other.digest
        assert one.nats == pytest.approx(other.nats, rel=1e-5)
    more = run(tmp_path, seeds=2)
    assert len(more) == 2 * len(scores) and {s.seed for s in more} == {0, 1}

    text = write_small_report(tmp_path, MODEL, read_scores(tmp_path))
    assert "left out of" in text and "| > 4, > 4 |" in text
    for name in ("report.md", "adapting.png", "effects.png", "positions_loss.png", "results.csv"):
        assert (tmp_path / name).is_file()


def test_a_run_that_is_told_to_stop_measures_nothing(quick, tmp_path, monkeypatch):
    """As after SIGTERM in training: what is not trained to its end is no model yet."""
    batch, made = TrainingTexts.__getitem__, []

    def stopping(self, number):
        made.append(number)
        if len(made) == 3:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, number)

    monkeypatch.setattr(TrainingTexts, "__getitem__", stopping)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.rglob("gate.json")) and not (tmp_path / "results.jsonl").exists()
    monkeypatch.setattr(TrainingTexts, "__getitem__", batch)
    assert len(run(tmp_path)) == 24


def test_models_that_do_not_learn_are_drawn_again_and_then_refused(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(small_study, "_FORMED", 1.1)
    with pytest.raises(UserError, match="has not formed in 3 draws of 4 steps each; give more"):
        run(tmp_path)
    tries = sorted((tmp_path / "models/seed_0").iterdir())
    assert [path.name for path in tries] == ["try_1", "try_2", "try_3"]
    assert not (tmp_path / "results.jsonl").exists()


def test_tasks_that_need_more_than_tokens_are_refused_before_training():
    with pytest.raises(UserError, match="--tasks=key_loss needs a judge; give a --model"):
        small_study.check(find_tasks(("key_loss",)), LENGTHS, 5)
    with pytest.raises(UserError, match="need words"):
        small_study.check(find_tasks(("cwe",)), (400,), 5)


def test_every_method_can_be_had_of_every_small_model():
    """Of other lengths, bases and heads too."""
    for model in (SmallModel(), SmallModel(256, 500.0, 64, 1, False), SmallModel(64, head_dim=16)):
        ropes = small_study.methods(model)
        assert len(ropes) == len(set(ropes.values())) == 29
        decoder = Decoder(model.config(small_study.LANGUAGE))
        assert len(scaled_models(decoder, list(ropes.values()))) == 29
