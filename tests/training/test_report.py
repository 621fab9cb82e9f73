"""What a run tells of itself, by hand."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.sharding.chips import CHIPS
from qwen_jax.training import report
from qwen_jax.training.report import Reporter, ReportOptions, draw_curve, open_sinks, read_log


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
