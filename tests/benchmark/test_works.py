"""The least that a piece of work takes, by hand, and that every row of the table can be made."""

import dataclasses

import pytest

from configs.models import get_preset, names_a_preset
from qwen_jax.benchmark.limits import Limits
from qwen_jax.benchmark.works import DECODE, PREFILL, TABLE, TRAIN, Work, decode_bytes
from qwen_jax.hf_config import load_config
from qwen_jax.sharding.flops import analytic_flops
from tests.commands import ROOT


def config_of(model):
    return get_preset(model) if names_a_preset(model) else load_config(ROOT / model)


def test_a_step_of_0_6b_reads_all_weights_and_the_filled_cache():
    # 28 layers of 15,730,944 numbers and the tied table; keys and values of 8 heads of 128.
    weights = 28 * 15_730_944 + 151_936 * 1024 + 1024
    cache = 2 * 28 * 8 * 128
    for rows, filled in ((1, 512), (8, 100)):
        expected = 4 * (weights + rows * filled * cache)
        assert decode_bytes(get_preset("qwen3-0.6b"), rows, filled) == expected


def test_of_experts_those_that_are_chosen_are_read():
    config = config_of("configs/benchmark/qwen3_30b_a3b_4_layers")
    one, two, many = (decode_bytes(config, rows, 0) for rows in (1, 2, 10_000))
    expert, table_row = 4 * 4 * 3 * 2048 * 768, 4 * 2048
    # Of 128, eight; of the second token's eight, one in sixteen is the first's as well.
    assert two - one == pytest.approx(8 * (1 - 8 / 128) * expert + table_row)
    assert many - one == pytest.approx(120 * expert + 9_999 * table_row)


@pytest.mark.parametrize("work", TABLE, ids=lambda work: work.name)
def test_rows_of_the_table_have_sizes_and_aims_of_their_own_figures(work):
    config = config_of(work.model)
    assert {figure for figure, _ in work.aims} <= set(work.figures)
    assert work.length + work.steps <= config.max_position_embeddings
    limits = Limits(1e10, 1e11)
    for figure in work.figures:
        least = work.least_seconds(figure, config, limits)
        assert (least is None) == (work.kind == "start")
        faster = work.least_seconds(figure, config, Limits(2e10, 2e11))
        assert least is None or faster == pytest.approx(least / 2)


def test_products_bound_prefill_and_train_steps():
    config = get_preset("qwen3-0.6b")
    work = Work("w", "qwen3-0.6b", rows=2, length=100)
    for figure, mode in ((PREFILL, "prefill"), (TRAIN, "train")):
        flops = sum(analytic_flops(config, mode, 2, 100).values())
        assert work.least_seconds(figure, config, Limits(1.0, 1e9)) == pytest.approx(flops / 1e9)
    decoding = dataclasses.replace(work, steps=8)
    expected = 8 * decode_bytes(config, 2, 104) / 1e9
    assert decoding.least_seconds(DECODE, config, Limits(1e9, 1.0)) == pytest.approx(expected)


def test_names_differ():
    names = [work.describe(figure) for work in TABLE for figure in work.figures]
    assert len(set(names)) == len(names)
