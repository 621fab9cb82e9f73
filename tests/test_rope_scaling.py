"""Scalings in place of a model's own, and how refusals name the place that they come from."""

import dataclasses
import json

import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from configs.models import get_preset
from qwen_jax.config import DualChunkSpec, FarSpec, LayerKind
from qwen_jax.errors import UserError
from qwen_jax.hf_config import read_hf_config, write_hf_config
from qwen_jax.nn.rope import inverse_frequencies
from qwen_jax.rope_scaling import parse_rope_flag, with_rope_scaling
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
        ("ntk", "factor is missing"),
        ("ntk:2,original=9", "ntk does not read it"),
        ("ntk_by_parts:4,attention_factor=2", "ntk_by_parts does not read it"),
        ("dynamic_yarn:4", "dynamic_yarn does not read it"),
        ("llama3:8,low_freq_factor=1", "high_freq_factor is missing"),
        ("llama3:8,low_freq_factor=4,high_freq_factor=4", "below 4.0 is needed"),
        ("yarn_by_rotations:8,beta_slow=3,beta_fast=3", "another number than beta_fast"),
        ("yarn_by_rotations:8,truncate=true", "yarn_by_rotations does not read it"),
        ("longrope:4,original=64", "short_factor is missing and needed, as a list of numbers"),
        ("proportional,partial_rotary_factor=1.5", "a share from 0 to 1"),
        ("resonance_linear", "factor is missing"),
        ("resonance:4", "resonance does not read it"),
        ("resonanceyarn:4", "kind 'resonanceyarn' is unknown"),
        ("resonance_resonance", "kind 'resonance_resonance' is unknown"),
        ("resonance_", "kind 'resonance_' is unknown"),
        ("dca:4", "default does not read it"),
        ("dca,original=8", "at least 16 is needed"),
        ("dca,temperature=2", "temperature = 2 should be a boolean"),
        ("yarn:4,chunk_size=8", "yarn does not read it"),
        ("none,logn=1", "true, false or a length"),
        ("none,logn=often", "true, false or a length"),
        ("none,window=0", "at least 1 is needed"),
        ("none,window_layers=2", "a window beside it"),
        ("none:2", "default does not read it"),
        ("rerope,window=0", "at least 1 is needed"),
        ("rerope,stretch=0.5", "at least 1 is needed"),
        ("self_extend", "factor is missing"),
        ("self_extend:0.5", "at least 1 is needed"),
        ("sinks,sinks=0", "at least 1 is needed"),
        ("sinks,window=8,window_layers=1", "a window beside it"),
        ("rerope,sinks=4", "default does not read it"),
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


SCALINGS = [
    "ntk:4",
    "ntk_by_parts:4,original=32768,beta_fast=16",
    "yarn:4,original=32768,mscale=1,mscale_all_dim=0.5",
    "yarn_by_rotations:4,original=32768",
    "dynamic_yarn,original=32768,truncate=false",
    "llama3:8,original=32768,low_freq_factor=1,high_freq_factor=4",
    "proportional,partial_rotary_factor=0.75",
    "stepped_ntk,original=32768",
    "resonance",
    "resonance_yarn:4,original=32768",
    "resonance_llama3:8,original=32768,low_freq_factor=1,high_freq_factor=4",
]
# That transformers reads the same.
COMMON = ("ntk_by_parts", "yarn:", "llama3", "proportional")


@pytest.mark.parametrize("text", SCALINGS)
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-next-80b-a3b-instruct"])
def test_every_scaling_is_written_and_read_back(text, name):
    ours = with_rope_scaling(get_preset(name), parse_rope_flag(text))
    written = write_hf_config(ours)
    assert read_hf_config(written) == ours
    kind = written["rope_scaling"]["rope_type"]
    assert (kind in ROPE_INIT_FUNCTIONS) == text.startswith(COMMON)


@pytest.mark.parametrize("text", ["longrope:4,original=64", "resonance_longrope:4,original=64"])
def test_lists_come_from_a_file(text, tmp_path):
    path = tmp_path / "factors.json"
    lists = {"short_factor": [1.0] * 64, "long_factor": [1.5 + i for i in range(64)]}
    path.write_text(json.dumps(lists))
    plain = read_hf_config(published("Qwen3-0.6B"))
    ours = with_rope_scaling(plain, parse_rope_flag(f"{text},factors={path}"))
    assert list(ours.rope.long_factors) == lists["long_factor"]
    assert read_hf_config(write_hf_config(ours)) == ours
    path.write_text(json.dumps(lists | {"long_factor": [2.0]}))
    with pytest.raises(UserError, match="long_factor has 1 numbers for 64 frequencies"):
        with_rope_scaling(plain, parse_rope_flag(f"{text},factors={path}"))
    with pytest.raises(UserError, match="no-such-file: no such file"):
        parse_rope_flag(f"{text},factors=no-such-file")
    path.write_text(json.dumps(lists | {"factor": 2.0}))
    with pytest.raises(UserError, match="factor is given twice; keep one"):
        parse_rope_flag(f"{text},factors={path}")


def test_a_model_that_rotates_a_part_can_turn_that_share_of_all_pairs():
    plain = get_preset("qwen3-next-80b-a3b-instruct")
    assert plain.rotary_dim == plain.head_dim // 4
    ours = with_rope_scaling(plain, {"rope_type": "proportional"})
    assert ours.rotary_dim == plain.head_dim
    turning = inverse_frequencies(ours.rope, ours.rotary_dim) > 0
    assert turning.sum() == plain.rotary_dim // 2


def scaled(text, name="qwen3-0.6b"):
    return with_rope_scaling(get_preset(name), parse_rope_flag(text))


def test_chunks_go_by_the_trained_length():
    assert scaled("dca").dual_chunk == DualChunkSpec(30720, 2560, 0)
    assert scaled("dca,original=32768").dual_chunk == DualChunkSpec(24576, 2048, 0)
    ours = scaled("dca,original=32768,temperature=true,chunk_size=100,local_size=0")
    assert ours.dual_chunk == DualChunkSpec(100, 0, 32768)
    assert ours.rope == scaled("none").rope
    # Another scaling takes their place.
    assert with_rope_scaling(ours, {"rope_type": "default"}).dual_chunk is None


def test_logn_is_the_model_s_own_habit_unless_told():
    assert scaled("yarn:4,original=64").logn_length is None
    assert scaled("none,logn=true").logn_length == 40960
    assert scaled("yarn:4,original=64,logn=true").logn_length == 64
    assert scaled("ntk:4,logn=32768").logn_length == 32768
    own = dataclasses.replace(scaled("none"), logn_length=77)
    for logn, length in ((None, 77), (True, 77), (False, None), (9, 9)):
        scaling = {"rope_type": "linear", "factor": 2.0, "logn": logn}
        assert with_rope_scaling(own, scaling).logn_length == length


def test_windows_are_of_the_first_layers_of_full_attention():
    full, sliding = LayerKind.FULL_ATTENTION, LayerKind.SLIDING_ATTENTION
    ours = scaled("none,window=64,window_layers=2")
    assert ours.sliding_window == 64
    assert ours.layer_types == (sliding,) * 2 + (full,) * 26
    assert set(scaled("stepped_ntk,original=2048,window=64").layer_types) == {sliding}
    hybrid = scaled("none,window=9,window_layers=1", "qwen3-next-80b-a3b-instruct").layer_types
    assert hybrid.count(sliding) == 1 and hybrid.index(sliding) == 3
    with pytest.raises(UserError, match=r"window_layers = 29, but the model has 28 layers"):
        scaled("none,window=9,window_layers=29")
    with pytest.raises(UserError, match="chunks together with sliding layers"):
        scaled("dca,window=9")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("rerope,original=32768", FarSpec(16384)),
        ("rerope,window=512,stretch=8", FarSpec(512, 8.0)),
        ("self_extend:8,original=32768", FarSpec(16384, 8.0, whole=True)),
        ("sinks,original=4096", FarSpec(4092, sinks=4)),
        ("sinks,window=1020,sinks=2", FarSpec(1020, sinks=2)),
    ],
)
def test_what_lies_far_goes_by_the_trained_length(text, spec):
    ours = scaled(text)
    assert ours.far == spec
    assert dataclasses.replace(ours, far=None) == scaled("none")
    with pytest.raises(UserError, match=r"cannot say far = FarSpec"):
        write_hf_config(ours)
    assert with_rope_scaling(ours, {"rope_type": "default"}).far is None
