"""Rotary settings: how refusals name the place that they come from."""

import pytest

from qwen_jax.errors import UserError
from qwen_jax.hf_config import read_hf_config, with_rope_scaling
from qwen_jax.hf_rope import parse_rope_flag
from tests.test_hf_config import published


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_errors_name_the_field_of_config_json(name):
    with pytest.raises(UserError) as error:
        read_hf_config(published("Qwen3-0.6B") | {name: {"rope_type": "linear"}})
    assert str(error.value) == f"config.json: {name}: factor is missing and needed, as a number"


def test_errors_of_the_argument_name_it_once():
    config = read_hf_config(published("Qwen3-0.6B"))
    with pytest.raises(UserError) as error:
        with_rope_scaling(config, {"rope_type": "yarn"})
    assert str(error.value) == "rope_scaling: factor is missing and needed, as a number"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("yarn", "factor is missing and needed, as a number"),
        ("yarn:four", 'factor = "four" should be a number'),
        ("linear:2,original=32768", "linear does not read it"),
        ("yarn:4,original=0", "original_max_position_embeddings = 0"),
    ],
)
def test_errors_of_the_flag_name_it(text, words):
    with pytest.raises(UserError) as error:
        parse_rope_flag(text)
    assert str(error.value).startswith(f"--rope={text}: ")
    assert words in str(error.value)


def test_what_only_a_model_can_judge_is_left_to_it(recwarn):
    text = "yarn:4,partial_rotary_factor=0.25"
    assert parse_rope_flag(text) == {
        "rope_type": "yarn", "factor": 4, "partial_rotary_factor": 0.25
    }  # fmt: skip
    assert not recwarn.list
