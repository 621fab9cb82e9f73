"""The committed plans: of every released size, and what they say of themselves."""

import json
from pathlib import Path

import jax
import pytest

import configs.plans
from configs.models import PRESETS, get_preset
from configs.plans import ROWS
from qwen_jax.sharding import aot
from qwen_jax.sharding.plan import compile_plan
from tests.tools.conftest import refusal
from tools.plan_figures import as_json
from tools.plan_table import expected_traffic, found_traffic, job_of, page

FOLDER = Path(configs.plans.__file__).parent


@pytest.fixture(scope="module")
def figures():
    return json.loads((FOLDER / "plans.json").read_text())


def shape_of(config):
    moe = config.moe and (config.moe.num_experts, config.moe.intermediate_size)
    return (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        None if moe else config.intermediate_size,
        moe,
        config.dual_chunk is not None,
    )


def test_every_released_shape_has_a_row():
    planned = {shape_of(get_preset(row.model)) for row in ROWS}
    missing = [name for name, config in PRESETS.items() if shape_of(config) not in planned]
    assert not missing


def test_the_table_is_made_from_the_figures_of_its_rows(figures):
    assert [figures[row.model]["row"] for row in ROWS] == [row._asdict() for row in ROWS]
    assert (FOLDER / "README.md").read_text() == page(figures)


def test_every_program_fits(figures):
    for row in ROWS:
        plan = figures[row.model]
        assert plan["fits"] and plan["needed"] <= plan["available"], row


def test_decoding_needs_little_beside_weights_and_cache_and_copies_neither(figures):
    for row in (row for row in ROWS if row.mode == "decode"):
        plan = figures[row.model]
        memory = plan["memory"]
        assert memory["temporaries"] <= 0.05 * memory["cache"] + 64e6, row
        assert plan["weight_reads"] == pytest.approx(1, abs=0.01), row
        assert plan["weight_copies"] == 0, row
        # The windows of DeltaNet's convolutions, a thousandth of it, come in another layout.
        assert plan["cache_copies"] <= 0.01 * memory["cache"], row


def test_what_a_train_step_sends_is_what_the_arithmetic_says(figures):
    (row,) = (row for row in ROWS if row.model == "qwen3-30b-a3b")
    plan = figures[row.model]
    for wanted in expected_traffic(row):
        assert found_traffic(plan, wanted) == pytest.approx(wanted.sent, rel=0.001), wanted


@pytest.mark.skipif(not aot.has_compiler(), reason="needs libtpu")
def test_the_cheapest_row_is_what_the_compiler_says_now(figures):
    (row,) = (row for row in ROWS if row.model == "qwen2-0.5b")
    with jax.default_matmul_precision("default"):  # As the command has it, and other tests do not.
        plan = json.loads(json.dumps(as_json(compile_plan(job_of(row)))))
    assert plan["memory"] == figures[row.model]["memory"]
    assert plan["traffic"] == figures[row.model]["traffic"]


def test_an_unknown_row_is_refused(run_tool, tmp_path):
    line = refusal(run_tool("plan_table", "--only=qwen9", f"--workdir={tmp_path}"))
    assert "--only=qwen9: there is no row of it" in line
