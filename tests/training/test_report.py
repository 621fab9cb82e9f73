"""What a run tells of itself, by hand."""

import io
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tqdm.std

from qwen_jax.errors import UserError
from qwen_jax.sharding.chips import CHIPS
from qwen_jax.training import report
from qwen_jax.training.report import (
    Bar,
    Reporter,
    ReportOptions,
    WeightsAndBiases,
    draw_curve,
    open_sinks,
    read_log,
)


class Kept:
    def __init__(self):
        self.rows = []

    def write(self, step, row):
        self.rows.append((step, dict(row)))

    def close(self):
        pass


def metrics(loss, tokens=10.0, **more):
    values = {"loss": loss, "tokens": tokens, "grad_norm": 1.0, "finite": True, **more}
    return {name: jnp.asarray(value) for name, value in values.items()}


def test_a_line_is_the_mean_of_its_steps_and_mfu_is_work_by_time_by_peak(monkeypatch):
    clock = iter([0.0, 4.0, 10.0])
    monkeypatch.setattr(report, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    kept = Kept()
    reporter = Reporter([kept], every=2, flops=100.0, peak=1000.0)
    losses = [4.0, 2.0, 1.0, 5.0]
    for number, loss in enumerate(losses, 1):
        read = reporter.step(number, metrics(loss, learning_rate=0.1 * number))
        # What is read is the step before.
        assert (read is None) == (number == 1)
        if read is not None:
            assert read[0] == number - 1
            assert read[1]["loss"] == losses[number - 2]
    assert reporter.flush()[0] == 4
    assert reporter.flush() is None
    (first, one), (second, two) = kept.rows
    assert (first, second) == (2, 4)
    assert (one["loss"], two["loss"]) == (3.0, 3.0)
    np.testing.assert_allclose([one["learning_rate"], two["learning_rate"]], [0.15, 0.35])
    np.testing.assert_allclose([one["tokens_per_second"], two["tokens_per_second"]], [5, 20 / 6])
    np.testing.assert_allclose([one["mfu"], two["mfu"]], [200 / 4 / 1000, 200 / 6 / 1000])


def test_lines_are_at_multiples_and_at_the_end_and_pauses_do_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(report, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    kept = Kept()
    reporter = Reporter([kept], every=3)
    for number in range(5, 9):
        reporter.step(number, metrics(float(number)))
        now[0] += 2
    with reporter.paused():
        now[0] += 100
    reporter.flush()
    reporter.close()
    reporter.close()
    assert [(step, row["loss"]) for step, row in kept.rows] == [(6, 5.5), (8, 7.5)]
    # Step 6 is read when 7 begins, after 4 s; 8 behind the pause, 4 s later.
    assert [row["seconds_per_step"] for _, row in kept.rows] == [2, 2]


def test_of_experts_the_busiest_is_told():
    kept = Kept()
    reporter = Reporter([kept])
    counts = jnp.array([[5, 5, 5, 5], [2, 14, 2, 2]])
    reporter.step(1, metrics(1.0, expert_counts=counts))
    reporter.flush()
    assert kept.rows[0][1]["busiest_expert"] == pytest.approx(14 / 5)
    assert "expert_counts" not in kept.rows[0][1]


def test_figures_of_routers_are_told_as_means_and_of_each_layer(tmp_path):
    sinks = open_sinks(tmp_path, ReportOptions(every=2), start=0, stop=9, settings={})
    reporter = Reporter(sinks, every=2)
    for number, figures in enumerate(([1.0, 3.0], [2.0, 6.0]), 1):
        reporter.step(number, metrics(1.0) | {"router": {"max_vio": jnp.array(figures)}})
    reporter.flush()
    reporter.note(2, {"eval_loss": 1.0, "eval_router": {"max_vio": np.array([0.5, 1.5])}})
    reporter.note(3, {"loss": 1.0})
    for sink in sinks:
        sink.close()
    training, evaluation, plain = read_log(tmp_path)
    assert training["router/max_vio"] == 3
    assert "router" not in training
    assert evaluation == {"step": 2, "eval_loss": 1.0, "eval_router/max_vio": 1.0}
    assert plain == {"step": 3, "loss": 1.0}
    assert read_log(tmp_path, "router.jsonl") == [
        {"step": 2, "router": {"max_vio": [1.5, 4.5]}},
        {"step": 2, "eval_router": {"max_vio": [0.5, 1.5]}},
    ]


def test_dense_layers_have_no_log_of_routers(tmp_path):
    for sink in open_sinks(tmp_path, ReportOptions(), start=0, stop=9, settings={}):
        sink.write(1, {"loss": 1.0})
        sink.close()
    assert not (tmp_path / "router.jsonl").exists()


def test_a_log_of_routers_goes_on_behind_the_checkpoint(tmp_path):
    rows = [{"step": step, "router": {"max_vio": [float(step)]}} for step in range(1, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "router.jsonl").write_text(text + '{"step": 6, "rou')
    for sink in open_sinks(tmp_path, ReportOptions(), start=3, stop=9, settings={}):
        sink.write(4, {"router": {"max_vio": np.array([9.0])}})
        sink.close()
    wanted = [*rows[:3], {"step": 4, "router": {"max_vio": [9.0]}}]
    assert read_log(tmp_path, "router.jsonl") == wanted
    # And where it goes on without figures.
    for sink in open_sinks(tmp_path, ReportOptions(), start=2, stop=9, settings={}):
        sink.write(3, {"loss": 1.0})
        sink.close()
    assert read_log(tmp_path, "router.jsonl") == rows[:2]


def test_a_log_goes_on_behind_the_checkpoint_and_without_what_a_kill_cut(tmp_path):
    rows = [{"step": step, "loss": float(step)} for step in range(1, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    assert read_log(tmp_path) == rows
    sinks = open_sinks(tmp_path, ReportOptions(), start=3, stop=9, settings={})
    for sink in sinks:
        sink.write(4, {"loss": float("nan")})
        sink.close()
    assert read_log(tmp_path) == [*rows[:3], {"step": 4, "loss": "nan"}]
    draw_curve(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_gets_every_figure(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    sinks = open_sinks(tmp_path, ReportOptions(tensorboard=True), start=0, stop=9, settings={})
    for sink in sinks:
        sink.write(7, {"loss": 2.5, "mfu": 0.5})
        sink.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), {}
    while data:
        size = int.from_bytes(data[:8], "little")
        assert masked_crc32c(data[:8]) == int.from_bytes(data[8:12], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        data = data[16 + size :]
    assert found == {("loss", 7): 2.5, ("mfu", 7): 0.5}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_bar_tells_loss_speed_and_the_time_left(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(tqdm.std, "time", lambda: clock.now)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    # Of a run that goes on behind step 3.
    bar = Bar(3, 9)
    clock.now += 20
    bar.write(5, {"loss": 2.5, "grad_norm": 7.7, "tokens_per_second": 12345.6, "mfu": 0.4125})
    shown = screen.getvalue().rpartition("\r")[2]
    # Of 9 steps 5 are made, 2 of them in 20 seconds: 4 take 40 more.
    for part in ("5/9", "00:20<00:40", "loss=2.5000", "tokens/s=12,346", "MFU=41.2%"):
        assert part in shown
    assert "7.7" not in shown
    clock.now += 20
    bar.write(5, {"eval_loss": 2.25})
    bar.write(9, {"loss": 2.0})
    bar.close()
    shown = screen.getvalue().rstrip().rpartition("\r")[2]
    assert "9/9" in shown
    assert "loss=2.0000" in shown


def test_elsewhere_the_bar_is_silent(capsys):
    bar = Bar(0, 2)
    bar.write(1, {"loss": 2.5})
    bar.close()
    assert capsys.readouterr() == ("", "")


class FakeWandb(types.ModuleType):
    """Keeps what runs are begun with, and what they are told."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **settings):
        self.runs.append(run := FakeRun(settings))
        return run


class FakeRun:
    def __init__(self, settings):
        self.settings, self.points, self.finished = settings, [], False

    def log(self, row, step):
        assert not self.finished
        self.points.append((step, row))

    def finish(self):
        self.finished = True


def test_wandb_gets_every_figure_and_a_workdir_keeps_its_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    settings = {"seed": 5}
    for start in (0, 3):
        for sink in open_sinks(one, ReportOptions(wandb_project="qwen"), start, 9, settings):
            sink.write(start + 1, {"loss": 2.5, "mfu": 0.5})
            sink.close()
    WeightsAndBiases(other, "qwen", settings).close()
    first, second, another = wandb.runs
    assert (first.points, second.points, another.points) == (
        [(1, {"loss": 2.5, "mfu": 0.5})],
        [(4, {"loss": 2.5, "mfu": 0.5})],
        [],
    )
    assert all(run.finished for run in wandb.runs)
    for run, workdir in zip(wandb.runs, (one, one, other), strict=True):
        assert run.settings["project"] == "qwen"
        assert run.settings["config"] == settings
        assert run.settings["dir"] == str(workdir)
        # A run of that id is gone on with, and begun where there is none.
        assert run.settings["resume"] == "allow"
    assert first.settings["id"] == second.settings["id"] != another.settings["id"]


@pytest.mark.parametrize(
    ("options", "package"),
    [({"tensorboard": True}, "tensorboardX"), ({"wandb_project": "p"}, "wandb")],
)
def test_what_needs_a_package_that_is_not_there_says_so(tmp_path, monkeypatch, options, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}; install it"):
        open_sinks(tmp_path, ReportOptions(**options), start=0, stop=9, settings={})


def test_the_peak_of_a_known_tpu_is_that_of_all_its_chips():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    assert report.known_peak([Device("TPU v5 lite")] * 4) == 4 * CHIPS["v5e"].flops
    assert report.known_peak([Device("cpu")]) is None
    assert report.known_peak([Device("TPU v4"), Device("cpu")]) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"every": 0}, "every = 0 must be at least 1"), ({"peak_flops": 0.0}, "peak_flops = 0.0")],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ReportOptions(**fields)
