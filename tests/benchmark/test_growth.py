"""The curves of `measure_growth`: what is run, what is asked of them, and the command."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from qwen_jax.benchmark import growth
from qwen_jax.benchmark.growth import (
    MIXED,
    UNIFORM,
    Point,
    Sizes,
    demands,
    exponent,
    measure_compiling,
    measure_decoding,
    measure_mixing,
    measure_prefill_memory,
    mixed_lengths,
)
from qwen_jax.benchmark.programs import DecodeSteps, filled_cache, lower_train, random_params
from qwen_jax.benchmark.report import demand_table
from qwen_jax.errors import UserError
from qwen_jax.hf_config import load_config
from qwen_jax.models.decoder import Decoder
from tests.tools.conftest import refusal

SMALL = Sizes(capacities=(32, 128), batch_size=3, prompt_tokens=16, decode_tokens=2)


def curve(figure, values, series="s", unit="s"):
    return [Point(figure, series, x, unit, tuple(own)) for x, own in values.items()]


@pytest.mark.parametrize("power", [0, 1, 2])
def test_the_exponent_is_that_of_the_upper_half(power):
    points = curve("prefill memory", {n: (3.0 * n**power + 1e4,) for n in (1, 2, 4)})
    points += curve("prefill memory", {n: (3.0 * n**power,) for n in (2**20, 2**21, 2**22)})
    assert exponent(points) == pytest.approx(power)
    assert exponent(points[-2:]) == pytest.approx(power)


@pytest.mark.parametrize("rows", [2, 3, 8])
@pytest.mark.parametrize("mean", [8, 255])
def test_mixed_lengths_are_as_many_tokens(rows, mean):
    lengths = mixed_lengths(rows, mean)
    assert (len(lengths), sum(lengths)) == (rows, rows * mean)
    assert (min(lengths), max(lengths)) == (lengths[0], lengths[-1])
    assert 1 <= lengths[0] <= mean // 8 + 1


def test_demands_are_ratios_of_the_last_to_the_first():
    points = [
        *curve("capacity", {1024: (1.0, 2.0), 4096: (1.05, 2.1), 8192: (1.2, 2.4)}),
        *curve("filled", {1024: (1.0, 1.0), 8192: (4.0, 4.0)}),
        *curve("prefill memory", {n: (float(n * n),) for n in (16, 32, 64)}),
        *curve("mixed lengths", {UNIFORM: (1.0, 1.0), MIXED: (1.9, 1.9)}, growth.PADDED),
        *curve("mixed lengths", {UNIFORM: (1.0, 2.0), MIXED: (1.05, 2.0)}, growth.SLOTS),
        *curve("compiling", {2: (1.0, 1.0), 28: (9.0, 9.0)}, growth.DECODE_COMPILED),
        *curve("compiling", {2: (2.0, 2.0), 28: (2.1, 2.1)}, growth.TRAIN_COMPILED),
    ]
    found = demands(points)
    assert [demand.median for demand in found] == pytest.approx([1.2, 4, 2, 1.025, 1.9, 1.05, 9])
    assert [demand.is_met for demand in found] == [False, None, False, True, None, True, None]
    _, _, first, second, *_ = demand_table(found).splitlines()
    assert first == (
        "| decode step, 1024 tokens in a cache of 8192 slots to one of 1024, times "
        "| 1.2 (1.2 to 1.2) | at most 1.1 | no |"
    )
    assert second.endswith("| 4 (4 to 4) | - | - |")


def test_a_decode_step_is_that_of_the_model(tiny):
    config = load_config(tiny)
    params = random_params(config)
    steps = DecodeSteps(config, params, rows=2, capacity=16)
    state = steps._state
    assert steps.seconds(filled=5) > 0
    # Told by another program: a pass over the same cache, made by hand.
    cache = filled_cache(config, 2, 16, 5)
    ids = jax.numpy.zeros((2, 1), int)
    out = Decoder(config).apply({"params": params}, ids, cache=cache)
    np.testing.assert_array_equal(steps._state.tokens, out.logits[:, 0].argmax(-1))
    np.testing.assert_array_equal(steps._state.cache.lengths, [6, 6])
    np.testing.assert_array_equal(out.cache.positions, steps._state.cache.positions)
    assert steps.seconds(filled=15) > 0
    np.testing.assert_array_equal(steps._state.cache.lengths, [16, 16])
    # Donated: no copy of a large cache is timed.
    assert state.cache.layers[0].keys.is_deleted()


def test_every_point_is_measured(tiny):
    config = load_config(tiny)
    params = random_params(config)
    points = measure_decoding(config, params, SMALL, repeats=3)
    assert [(p.figure, p.series, p.x) for p in points] == [
        ("capacity", "32 tokens", 32),
        ("capacity", "32 tokens", 128),
        ("filled", "128 slots", 32),
        ("filled", "128 slots", 128),
    ]
    points += measure_mixing(config, params, SMALL, repeats=3)
    assert [(p.series, p.x) for p in points[4:]] == [
        (series, x) for series in (growth.PADDED, growth.SLOTS) for x in (UNIFORM, MIXED)
    ]
    assert all(len(p.values) == 3 and min(p.values) > 0 for p in points)


def test_prefill_memory_is_the_compilers(tiny):
    config = load_config(tiny)
    points = measure_prefill_memory(config, (16, 64, 256))
    sizes = [p.median for p in points]
    # Each token has at least the activations of a feed-forward block.
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 256 * config.intermediate_size * 4


def test_a_scanned_train_step_has_no_more_products_with_more_layers(tiny):
    shallow = load_config(tiny)
    deep = dataclasses.replace(shallow, layer_types=shallow.layer_types * 2)
    (scanned, still), (unrolled, more) = (
        [
            lower_train(config, 1, 16, scan).compile().as_text().count(" dot(")
            for config in (shallow, deep)
        ]
        for scan in (True, False)
    )
    assert scanned == still < unrolled < more


def test_both_programs_are_compiled_for_each_number_of_layers(tiny):
    points = measure_compiling({2: load_config(tiny)}, repeats=2)
    assert [(p.series, p.x) for p in points] == [
        (growth.DECODE_COMPILED, 2),
        (growth.TRAIN_COMPILED, 2),
    ]


def test_the_command_prints_what_is_asked_and_draws_the_curves(run_tool, tiny, tmp_path):
    arguments = (f"--model={tiny}", f"--workdir={tmp_path}", "--workload=growth", "--repeats=1")
    arguments += ("--layers=1", "--capacities=16,32", "--lengths=8,16", "--layer_counts=1,2")
    arguments += ("--batch_size=2", "--prompt_tokens=8", "--decode_tokens=2")
    result = run_tool("benchmark", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    header, _, *rows = result.stdout.splitlines()
    assert header == "| figure | median (lowest to highest) | aim | met |"
    assert len(rows) == 7
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert len(records) == 2 + 2 + 2 + 4 + 4 + 7
    assert all(record["workload"] == "growth" and record["git"] for record in records)
    for point in records[:-7]:
        assert (point["layers"], point["sizes"]["capacities"]) == (1, [16, 32])
        assert {point["sizes"][name] for name in ("batch_size", "decode_tokens")} == {2}
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "growth.md").read_text() == result.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--capacities=1024", "capacities = 1024 should be at least two numbers, each larger"),
        ("--lengths=64,32", "lengths = 64,32 should be"),
        ("--layer_counts=1,x", "--layer_counts=1,x should be numbers above 0, such as 1,64"),
        ("--layer_counts=1,3", "--layer_counts=1,3: the model has 2"),
        ("--layers=5", "--layers=5 is more than the model's 2"),
        ("--batch_size=1", "batch_size = 1 must be at least 2"),
        ("--prompt_tokens=7", "prompt_tokens = 7 must be at least 8"),
    ],
)
def test_sizes_without_a_curve_are_refused(run_tool, tiny, tmp_path, flag, message):
    counts = () if "counts" in flag else ("--layer_counts=1,2",)
    arguments = (f"--model={tiny}", f"--workdir={tmp_path / 'out'}", "--workload=growth", *counts)
    assert refusal(run_tool("benchmark", *arguments, flag)).startswith(message)
    assert not (tmp_path / "out").exists()


def test_sizes_say_what_is_wrong():
    with pytest.raises(UserError, match="decode_tokens = 0 must be at least 1"):
        Sizes(decode_tokens=0)
