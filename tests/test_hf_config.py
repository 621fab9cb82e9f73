"""The config.json reader and writer against transformers, and what they refuse."""

import copy
import dataclasses
import json
import random
import warnings

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from configs.models import get_preset
from qwen_jax.config import DualChunkSpec, LayerKind, ModelConfig, RopeKind, RopeSpec
from qwen_jax.errors import UserError
from qwen_jax.hf_config import load_config, read_hf_config, write_hf_config
from qwen_jax.nn.rope import inverse_frequencies

SEEDS = pytest.mark.parametrize("seed", range(80))

# transformers warns about each odd rope setting that it nevertheless computes with.
transformers.logging.set_verbosity_error()


# Drawn files leave the trained length out now and then; one test below is about the warning.
@pytest.fixture(autouse=True)
def _no_length_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*original_max_position_embeddings.*")
        yield


def draw_rope(rng: random.Random, more: tuple[str, ...] = ()) -> dict | None:
    """A rope dict without its base, or None, with every option in turn absent, null, 0 or set.

    The lists of a "longrope" among `more` kinds are left to the caller.
    """
    kind = rng.choice(["absent", "default", "linear", "dynamic", "yarn", "yarn", "yarn", *more])
    if kind == "absent":
        return None
    rope = {rng.choice(["rope_type", "type"]): kind}
    if kind == "default":
        return rope
    rope["factor"] = rng.choice([1, 1.5, 2, 4.0, 8.25])
    if kind == "llama3":
        rope["low_freq_factor"], rope["high_freq_factor"] = rng.choice([(1, 4), (0.5, 30.0)])
    if kind == "longrope" and rng.random() < 0.5:
        rope["attention_factor"] = rng.choice([None, 0.75, 1.5])
    if kind == "proportional" and rng.random() < 0.7:
        rope["partial_rotary_factor"] = rng.choice([0.0, 0.5, 0.75, 1])
    if kind in ("llama3", "longrope"):
        rope["original_max_position_embeddings"] = rng.choice([256, 1000, 32768])
    if kind == "yarn":
        options = {
            "factor": [None],
            "original_max_position_embeddings": [256, 1000, 32768],
            "attention_factor": [None, 0.0, 0.75, 1.5],
            "beta_fast": [None, 0, 16, 48.5],
            "beta_slow": [None, 0, 0.5, 2],
            "mscale": [None, 0, 0.707, 1.0, 2],
            "mscale_all_dim": [None, 0.0, 0.5, 1, 1.3],
            "truncate": [None, True, False],
        }
        chance = {"factor": 0.2, "original_max_position_embeddings": 0.8}
        for name, values in options.items():
            if rng.random() < chance.get(name, 0.5):
                rope[name] = rng.choice(values)
    return rope


def draw(seed: int) -> dict:
    """A random config.json of either family and either layout, with some fields left out."""
    rng = random.Random(seed)
    family = rng.choice(["qwen2", "qwen3"])
    heads = rng.choice([2, 4, 6, 32])
    layers = rng.randint(1, 6)
    raw = {
        "model_type": family,
        "vocab_size": rng.choice([96, 151936]),
        "hidden_size": heads * rng.choice([4, 16]),
        "intermediate_size": 3 * rng.randint(5, 50),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": rng.choice([k for k in range(1, heads + 1) if heads % k == 0]),
    }
    head_dims = [4, 8, 48, 128]
    optional = {
        "architectures": [None, {"qwen2": "Qwen2", "qwen3": "Qwen3"}[family] + "ForCausalLM"],
        "head_dim": head_dims,
        "max_position_embeddings": [512, 4096, 40960],
        "rms_norm_eps": [1e-6, 1e-5, 0.1],
        "tie_word_embeddings": [True, False],
        "initializer_range": [0.02, 1.0],
        "use_sliding_window": [True, True, False],
        "sliding_window": [None, 1, 77],
        "max_window_layers": [0, 1, 2, 40],
        "bos_token_id": [None, 3],
        "eos_token_id": [None, 5, [5, 7], [6]],
        "pad_token_id": [None, 0],
        "attention_dropout": [0.0, 0.5],
        "use_cache": [True, False],
        "hidden_act": ["silu"],
        "is_causal": [True],
    }
    if family == "qwen3":
        optional["attention_bias"] = [True, False]
    for name, values in optional.items():
        if rng.random() < 0.6:
            raw[name] = rng.choice(values)
    if isinstance(raw.get("architectures"), str):
        raw["architectures"] = [raw["architectures"]]
    if heads == 32 and rng.random() < 0.3:
        del raw["num_key_value_heads"]
    elif rng.random() < 0.1:
        raw["num_key_value_heads"] = None
    if rng.random() < 0.4:
        raw["layer_types"] = draw_layer_types(rng, raw)

    rope, theta = (
        draw_rope(rng, ("llama3", "longrope", "proportional")),
        rng.choice([None, 1e4, 1_000_000, 5e6]),
    )
    if rope and "longrope" in rope.values():
        head_dim = raw.get("head_dim") or (
            128 if family == "qwen3" else raw["hidden_size"] // heads
        )
        for name in ("short_factor", "long_factor"):
            rope[name] = [rng.uniform(1, 9) for _ in range(head_dim // 2)]
    is_new_layout = rng.random() < 0.5
    if is_new_layout:
        raw["rope_parameters"] = {**(rope or {}), **({"rope_theta": theta} if theta else {})}
        raw["dtype"] = rng.choice(["float32", "bfloat16", "float16", None])
    else:
        raw["rope_scaling"] = rope
        raw["torch_dtype"] = rng.choice(["float32", "bfloat16", "float16", None])
        if theta:
            raw["rope_theta"] = theta
    if rng.random() < 0.2:
        raw["original_max_position_embeddings"] = 333
    return raw


def draw_layer_types(rng: random.Random, raw: dict) -> list[str]:
    slides = raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None
    kinds = ["full_attention", "sliding_attention"] if slides else ["full_attention"]
    return [rng.choice(kinds) for _ in range(raw["num_hidden_layers"])]


def transformers_config(raw: dict):
    """transformers' reading, its rope settings in the state that a model would see."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    config.standardize_rope_params()
    return config


def their_frequencies(config, length: int) -> tuple[torch.Tensor, float]:
    kind = config.rope_parameters["rope_type"]
    share = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", share)
    if kind == "default":
        powers = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** powers, 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


def assert_agree(ours: ModelConfig, theirs) -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                 "rms_norm_eps", "tie_word_embeddings", "initializer_range", "bos_token_id",
                 "pad_token_id", "sliding_window"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.family == theirs.model_type
    heads_share = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == getattr(theirs, "head_dim", heads_share)
    assert [kind.value for kind in ours.layer_types] == theirs.layer_types
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == ([] if eos is None else eos if type(eos) is list else [eos])
    assert ours.dtype == str(theirs.dtype or torch.float32).removeprefix("torch.")
    is_qwen3 = ours.family == "qwen3"
    assert ours.qk_norm == is_qwen3
    assert ours.qkv_bias == (theirs.attention_bias if is_qwen3 else True)
    assert ours.output_bias == (is_qwen3 and theirs.attention_bias)
    assert_ropes_agree(ours, theirs)


def assert_ropes_agree(ours: ModelConfig, theirs) -> None:
    rope, settings = ours.rope, theirs.rope_parameters
    length = 3 * theirs.max_position_embeddings
    frequencies, attention_factor = their_frequencies(theirs, length)
    llama3 = settings["rope_type"] == "llama3"
    assert rope.kind == ("yarn" if llama3 else settings["rope_type"])
    assert rope.by_rotations == llama3
    assert rope.theta == settings["rope_theta"]
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    computed = inverse_frequencies(rope, ours.head_dim, length)
    torch.testing.assert_close(torch.tensor(computed.tolist()), frequencies, rtol=1e-5, atol=0)
    original = theirs.max_position_embeddings
    match rope.kind:
        case RopeKind.DEFAULT | RopeKind.LINEAR | RopeKind.PROPORTIONAL:
            assert rope.original_max_position_embeddings is None
        case RopeKind.DYNAMIC:
            assert rope.original_max_position_embeddings == original
        case RopeKind.LONGROPE:
            original = settings["original_max_position_embeddings"]
            assert rope.original_max_position_embeddings == original
        case RopeKind.YARN if llama3:
            original = settings["original_max_position_embeddings"]
            assert rope.original_max_position_embeddings == original
        case RopeKind.YARN:
            original = settings["original_max_position_embeddings"]
            assert rope.original_max_position_embeddings == original
            assert rope.truncate == bool(settings.get("truncate", True))
            assert rope.beta_fast == (settings.get("beta_fast") or 32)
            assert rope.beta_slow == (settings.get("beta_slow") or 1)
    factor = settings.get("factor", 1.0)
    assert rope.factor == (theirs.max_position_embeddings / original if factor is None else factor)


@SEEDS
def test_reading_means_what_transformers_reads(seed):
    raw = draw(seed)
    before = copy.deepcopy(raw)
    assert_agree(read_hf_config(raw), transformers_config(raw))
    assert raw == before


@SEEDS
def test_reading_what_transformers_saves(seed, tmp_path):
    raw = draw(seed)
    transformers_config(raw).save_pretrained(tmp_path)
    assert load_config(tmp_path) == read_hf_config(raw)


@SEEDS
def test_reading_every_field_of_the_transformers_object(seed):
    raw = draw(seed)
    written = json.loads(transformers_config(raw).to_json_string(use_diff=False))
    assert read_hf_config(written) == read_hf_config(raw)


@SEEDS
def test_written_config_loads_in_transformers_and_means_the_same(seed, tmp_path):
    ours = read_hf_config(draw(seed))
    written = write_hf_config(ours)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert_agree(ours, transformers_config(written))
    assert_agree(ours, transformers.AutoConfig.from_pretrained(tmp_path))
    assert load_config(tmp_path) == ours


@pytest.mark.parametrize("first_sliding", range(4))
def test_written_config_means_the_same_to_readers_without_layer_types(first_sliding):
    kinds = [LayerKind.FULL_ATTENTION] * first_sliding
    kinds += [LayerKind.SLIDING_ATTENTION] * (3 - first_sliding)
    ours = dataclasses.replace(
        get_preset("qwen3-0.6b"), layer_types=tuple(kinds), sliding_window=128
    )
    written = write_hf_config(ours)
    del written["layer_types"]
    assert read_hf_config(written) == ours
    assert transformers_config(written).layer_types == kinds


def test_draws_cover_every_kind_of_rope_and_layer():
    ours = [read_hf_config(draw(seed)) for seed in range(120)]
    elsewhere = {RopeKind.STEPPED_NTK, RopeKind.NTK, RopeKind.DYNAMIC_YARN}
    elsewhere |= {LayerKind.LINEAR_ATTENTION}
    assert {config.rope.kind for config in ours} == set(RopeKind) - elsewhere
    assert {kind for config in ours for kind in config.layer_types} == set(LayerKind) - elsewhere
    yarns = [config.rope for config in ours if config.rope.kind is RopeKind.YARN]
    assert {rope.by_rotations for rope in yarns} == {True, False}
    assert len({rope.attention_factor for rope in yarns}) > 8
    assert {rope.truncate for rope in yarns} == {True, False}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_defaults_of_absent_fields_are_those_of_transformers(family):
    raw = {
        "model_type": family,
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_attention_heads": 64,
        "num_hidden_layers": 30,
    }
    for more in ({}, {"use_sliding_window": True}):
        assert_agree(read_hf_config(raw | more), transformers_config(raw | more))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("options", "attention_factor"),
    [
        ({}, 1.1386294361119891),
        ({"attention_factor": 0.5}, 0.5),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        ({"mscale": 0, "mscale_all_dim": 1.0}, 1.1386294361119891),
        ({"mscale": 2.0}, 1.1386294361119891),
        ({"factor": 1.0, "mscale": 2.0, "mscale_all_dim": 1.0}, 1.0),
        ({"factor": None}, 1.0223143551314210),
    ],
)
def test_yarn_attention_factor(options, attention_factor):
    # 0.1 ln(4) + 1 of the YaRN paper, and 0.1 ln(40960 / 32768) + 1 where the factor is a ratio.
    raw = published("Qwen3-0.6B") | {"rope_scaling": YARN | options}
    assert read_hf_config(raw).rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_trained_length_at_the_top_of_the_file_wins_as_in_transformers():
    raw = published("Qwen3-0.6B") | {"rope_scaling": YARN, "original_max_position_embeddings": 256}
    assert read_hf_config(raw).rope.original_max_position_embeddings == 256
    assert_agree(read_hf_config(raw), transformers_config(raw))


def test_yarn_without_trained_length_warns():
    raw = published("Qwen3-0.6B") | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    with pytest.warns(UserWarning, match="original_max_position_embeddings.*40960"):
        rope = read_hf_config(raw).rope
    assert rope.original_max_position_embeddings == 40960


_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_SMALL = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
_32B = {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_window_layers": 64,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
}
_72B = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "max_window_layers": 80,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
}

# Fields of the hub's files as public code, logs and issues quote them. Quotations of Qwen2.5-32B,
# Math-7B-Instruct and QwQ-32B-Preview are partial; the rest of their keys are those of _QWEN2.
PUBLISHED = {
    "Qwen1.5-0.5B": _QWEN2
    | {"eos_token_id": 151643, "hidden_size": 1024, "intermediate_size": 2816}
    | {"max_window_layers": 21, "num_attention_heads": 16, "num_hidden_layers": 24}
    | {"num_key_value_heads": 16, "sliding_window": 32768, "tie_word_embeddings": True}
    | {"vocab_size": 151936},
    "Qwen1.5-110B": _QWEN2
    | _72B
    | {"eos_token_id": 151643, "intermediate_size": 49152, "max_window_layers": 28}
    | {"sliding_window": 32768, "transformers_version": "4.37.0"},
    "Qwen2-0.5B": _QWEN2
    | _SMALL
    | {"eos_token_id": 151643, "max_position_embeddings": 131072, "sliding_window": 131072},
    "Qwen2-72B": _QWEN2
    | _72B
    | {"eos_token_id": 151643, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05},
    "Qwen2-72B-Instruct": _QWEN2 | _72B,
    "Qwen2.5-0.5B": _QWEN2 | _SMALL | {"eos_token_id": 151643, "use_mrope": False},
    "Qwen2.5-7B-Instruct": _QWEN2,
    "Qwen2.5-32B": _QWEN2
    | _32B
    | {"eos_token_id": 151643, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05}
    | {"use_mrope": False},
    "Qwen2.5-Math-7B-Instruct": _QWEN2
    | {"max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 4096},
    "QwQ-32B-Preview": _QWEN2 | _32B | {"rms_norm_eps": 1e-05, "sliding_window": 32768},
    "Qwen3-0.6B": _QWEN3,
    "Qwen3-4B-Instruct-2507": _QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 262144}
    | {"max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36}
    | {"rope_theta": 5000000},
    "Qwen3-32B": _QWEN3
    | {"hidden_size": 5120, "intermediate_size": 25600, "max_window_layers": 64}
    | {"num_attention_heads": 64, "num_hidden_layers": 64, "tie_word_embeddings": False},
}


def published(name: str) -> dict:
    return copy.deepcopy(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_accepted_and_is_the_preset(name):
    ours = read_hf_config(published(name))
    assert ours == get_preset(name)
    assert_agree(ours, transformers_config(published(name)))


def test_published_config_saved_again_by_later_transformers():
    # The key sets that 5.7 and 4.57.6 give to a checkpoint loaded and saved.
    raw = published("Qwen3-0.6B")
    expected = read_hf_config(raw)
    rope = {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}}
    layers = {"layer_types": ["full_attention"] * 28, "pad_token_id": None, "dtype": "bfloat16"}
    both = raw | rope | layers
    assert read_hf_config(both) == expected
    for name in ("rope_scaling", "rope_theta", "torch_dtype"):
        del both[name]
    assert read_hf_config(both) == expected


def test_qwen1_names_that_codeqwen_repeats_are_accepted_where_they_agree():
    raw = published("Qwen2.5-7B-Instruct") | {"rotary_emb_base": 1000000, "seq_length": 32768}
    assert read_hf_config(raw) == read_hf_config(published("Qwen2.5-7B-Instruct"))
    saved = raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    del saved["rope_theta"]
    assert read_hf_config(saved) == read_hf_config(raw)


def test_a_base_that_is_null_is_taken_from_the_other_layout():
    raw = published("Qwen3-0.6B") | {"rope_theta": None}
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert read_hf_config(raw) == read_hf_config(published("Qwen3-0.6B"))


def test_card_advice_for_long_texts_is_accepted():
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    rope = read_hf_config(published("Qwen2.5-7B-Instruct") | {"rope_scaling": yarn}).rope
    assert rope == RopeSpec(
        theta=1e6,
        kind=RopeKind.YARN,
        factor=4.0,
        original_max_position_embeddings=32768,
        attention_factor=pytest.approx(1.1386294361119891),
    )


# Base model, fields to change (ABSENT takes one out), and what the message must have.
ABSENT = object()
REFUSED = [
    ("Qwen3-0.6B", {"model_type": ABSENT}, ["model_type is missing"]),
    ("Qwen3-0.6B", {"model_type": "llama"}, ['model_type = "llama"', "qwen2", "qwen3"]),
    ("Qwen3-0.6B", {"model_type": 3}, ["model_type = 3", "string"]),
    ("Qwen3-0.6B", {"architectures": ["Qwen3ForMaskedLM"]},
     ['["Qwen3ForMaskedLM"]', "Qwen3ForCausalLM"]),
    ("Qwen3-0.6B", {"architectures": ["Qwen2ForCausalLM"]}, ["Qwen2ForCausalLM"]),
    ("Qwen3-0.6B", {"vocab_size": ABSENT}, ["vocab_size is missing"]),
    ("Qwen3-0.6B", {"num_hidden_layers": None}, ["num_hidden_layers is missing"]),
    ("Qwen3-0.6B", {"hidden_size": "64"}, ['hidden_size = "64"', "integer"]),
    ("Qwen3-0.6B", {"hidden_size": True}, ["hidden_size = true", "integer"]),
    ("Qwen3-0.6B", {"hidden_size": 64.0}, ["hidden_size = 64.0", "integer"]),
    ("Qwen3-0.6B", {"hidden_size": 0}, ["hidden_size = 0", "at least 1"]),
    ("Qwen3-0.6B", {"num_attention_heads": -2}, ["num_attention_heads = -2", "at least 1"]),
    ("Qwen3-0.6B", {"rms_norm_eps": "1e-06"}, ['rms_norm_eps = "1e-06"', "number"]),
    ("Qwen3-0.6B", {"rms_norm_eps": float("nan")}, ["rms_norm_eps = NaN", "number"]),
    ("Qwen3-0.6B", {"vocab_size": 10**400}, ["vocab_size = 1000", "integer"]),
    ("Qwen3-0.6B", {"tie_word_embeddings": "true"}, ['tie_word_embeddings = "true"', "boolean"]),
    ("Qwen3-0.6B", {"tie_word_embeddings": 1}, ["tie_word_embeddings = 1", "boolean"]),
    ("Qwen3-0.6B", {"eos_token_id": [151645, "x"]}, ['eos_token_id = [151645, "x"]']),
    ("Qwen3-0.6B", {"head_dim": 127}, ["head_dim = 127", "even"]),
    ("Qwen3-0.6B", {"num_key_value_heads": 3}, ["num_attention_heads = 16", "= 3"]),
    ("Qwen3-0.6B", {"num_key_value_heads": ABSENT}, ["num_attention_heads = 16", "= 32"]),
    ("Qwen3-0.6B", {"hidden_act": "gelu"}, ['hidden_act = "gelu"', '"silu"']),
    ("Qwen3-0.6B", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
    ("Qwen3-0.6B", {"use_mrope": True}, ["use_mrope = true"]),
    ("Qwen3-0.6B", {"mlp_bias": True}, ["mlp_bias = true"]),
    ("Qwen3-0.6B", {"is_causal": False}, ["is_causal = false"]),
    ("Qwen3-0.6B", {"is_causal": None}, ["is_causal = null"]),
    ("Qwen3-0.6B", {"is_encoder_decoder": True}, ["is_encoder_decoder = true"]),
    ("Qwen3-0.6B", {"sparkle": 7}, ["sparkle = 7", "logits"]),
    ("Qwen3-0.6B", {"num_experts": 128}, ["num_experts = 128"]),
    ("Qwen3-0.6B", {"router_score_bias": True}, ["router_score_bias = true"]),
    ("Qwen3-0.6B", {"pruned_heads": {"0": [1]}}, ['pruned_heads = {"0": [1]}']),
    ("Qwen3-0.6B", {"compression_config": {"format": "dense"}},
     ['compression_config = {"format": "dense"}', "unquantised"]),
    ("Qwen2.5-7B-Instruct", {"dual_chunk_attention_config": {"chunk_size": 2048, "ratio": 2}},
     ["dual_chunk_attention_config: ratio = 2"]),
    ("Qwen2.5-7B-Instruct", {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}},
     ["dual_chunk_attention_config", "local_size = 8", "chunk_size = 8"]),
    ("Qwen2.5-7B-Instruct", {"dual_chunk_attention_config": {"chunk_size": 2048},
                             "use_sliding_window": True, "max_window_layers": 4},
     ["dual_chunk_attention_config", "sliding"]),
    ("Qwen2.5-7B-Instruct", {"attention_bias": False}, ["attention_bias = false", "biases"]),
    ("Qwen2.5-7B-Instruct", {"qkv_bias": False}, ["qkv_bias = false", "biases"]),
    ("Qwen3-0.6B", {"qkv_bias": True}, ["qkv_bias = true"]),
    ("Qwen3-0.6B", {"torch_dtype": "float64"}, ['torch_dtype = "float64"', "bfloat16"]),
    ("Qwen3-0.6B", {"dtype": "float32"}, ['dtype = "float32"', 'torch_dtype = "bfloat16"']),
    ("Qwen3-0.6B", {"layer_types": ["full_attention"] * 27}, ["27", "num_hidden_layers = 28"]),
    ("Qwen3-0.6B", {"layer_types": ["linear_attention"] * 28}, ['"linear_attention"']),
    ("Qwen3-0.6B", {"layer_types": ["sliding_attention"] * 28}, ["use_sliding_window is false"]),
    ("Qwen3-0.6B", {"layer_types": ["sliding_attention"] * 28, "use_sliding_window": True},
     ["sliding_window = None"]),
    ("Qwen3-0.6B", {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 4},
     ["sliding_window = 0"]),
    ("Qwen3-0.6B", {"rope_theta": "1e6"}, ['rope_theta = "1e6"', "number"]),
    ("Qwen3-0.6B", {"rope_theta": -1.0}, ["rope_theta = -1.0", "positive"]),
    ("Qwen3-0.6B", {"rope_parameters": {"rope_theta": 1e4}},
     ["rope_theta = 1000000", "rope_theta in rope_parameters = 10000.0"]),
    ("Qwen3-0.6B", {"rotary_emb_base": 1e4}, ["rope_theta = 1000000", "rotary_emb_base = 10000.0"]),
    ("Qwen3-0.6B", {"rope_theta": ABSENT, "rotary_emb_base": 1e6},
     ["rope_theta = 10000.0", "rotary_emb_base = 1000000.0"]),
    ("Qwen3-0.6B", {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}},
     ["rope_scaling", "rope_parameters", "disagree"]),
    ("Qwen3-0.6B", {"rope_scaling": "yarn"}, ['rope_scaling = "yarn"', "object"]),
    *[
        ("Qwen3-0.6B", {"rope_scaling": rope}, ["rope", *words])
        for rope, words in [
            ({"rope_type": "longrope", "factor": 2.0}, ["short_factor is missing"]),
            ({"rope_type": "llama3", "factor": 2.0}, ["low_freq_factor is missing"]),
            ({"type": "mrope"}, ['"mrope"']),
            ({"type": "su", "factor": 2.0}, ['"su"', "yarn"]),
            ({"rope_type": "default", "mrope_section": [16, 24, 24]},
             ["mrope_section = [16, 24, 24]"]),
            ({"rope_type": "default", "factor": 4.0}, ["factor = 4.0", "default"]),
            ({**YARN, "beta_fast": -1}, ["beta_fast = -1", "positive"]),
            ({**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 0}, ["at least 1"]),
            ({"rope_type": "linear"}, ["factor is missing"]),
            ({"rope_type": "linear", "factor": None}, ["factor is missing"]),
            ({"rope_type": "linear", "factor": 0}, ["factor = 0.0", "positive"]),
            ({"rope_type": "linear", "factor": "4"}, ['factor = "4"', "number"]),
            ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, ["beta_fast = 32"]),
            ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000}, ["alpha = 1000"]),
            ({"rope_type": "yarn", "original_max_position_embeddings": 9}, ["factor is missing"]),
            (YARN | {"original_max_position_embeddings": 0},
             ["original_max_position_embeddings = 0"]),
            (YARN | {"original_max_position_embeddings": 1.5},
             ["original_max_position_embeddings = 1.5", "integer"]),
            (YARN | {"truncate": "no"}, ['truncate = "no"', "boolean"]),
            (YARN | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
            (YARN | {"type": "linear"}, ['rope_type = "yarn"', 'type = "linear"']),
            ({"full_attention": {"rope_type": "default"}}, ["by layer type", "full_attention"]),
        ]
    ],
]  # fmt: skip


def changed(name: str, changes: dict) -> dict:
    return {k: v for k, v in (published(name) | changes).items() if v is not ABSENT}


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refusal_names_file_field_and_value_in_one_line(name, changes, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(name, changes)))
    with pytest.raises(UserError) as error:
        load_config(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    assert "\n" not in message
    for word in words:
        assert word in message


def test_refusals_start_from_files_that_are_accepted():
    for name in {name for name, _, _ in REFUSED}:
        read_hf_config(published(name))


@pytest.mark.parametrize("value", [None, [], {}, ""])
def test_unknown_field_that_asks_for_nothing_is_accepted(value):
    raw = published("Qwen3-0.6B")
    assert read_hf_config(raw | {"sparkle": value}) == read_hf_config(raw)


@pytest.mark.parametrize("name", ["qk_norm", "use_qk_norm", "scale_embeddings"])
@pytest.mark.parametrize("value", [False, 0])
def test_unknown_field_that_may_leave_a_mechanism_out_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} = "):
        read_hf_config(published("Qwen3-0.6B") | {name: value})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model_type": "qwen3"', ["not valid JSON", "download it again"]),
        (b"", ["not valid JSON"]),
        (b"\xff\xfe{}", ["not valid JSON"]),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", ["not valid JSON"]),
        (b"[" * 200_000, ["not valid JSON"]),
        (b'[{"model_type": "qwen3"}]', ["should hold a JSON object", "list"]),
        (b'"qwen3"', ["should hold a JSON object", "str"]),
        (b"null", ["should hold a JSON object"]),
    ],
)
def test_broken_file_is_refused_in_one_line(content, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_config(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))
    for word in words:
        assert word in message


def test_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file") as error:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_directory_in_the_place_of_the_file_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, True),
        ({"sparse_attention_enabled": None, "sparse_attention_config": None}, True),
        ({"sparse_attention_enabled": True}, True),
        ({"sparse_attention_enabled": False}, False),
    ],
)
def test_a_pattern_of_sparse_attention_beside_the_file_asks_for_it(said, told, tmp_path):
    sizes = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    raw = published("Qwen2.5-7B-Instruct") | {"dual_chunk_attention_config": sizes | said}
    (tmp_path / "config.json").write_text(json.dumps(raw))

    def notices():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load_config(tmp_path).dual_chunk == DualChunkSpec(262144, 8192, 262144)
        return [str(warning.message) for warning in caught]

    assert bool(notices()) is bool(said.get("sparse_attention_enabled"))
    # A list with an object for each layer.
    (tmp_path / "sparse_attention_config.json").write_text("[]")
    assert ["attention is exact here" in notice for notice in notices()] == [True] * told


def test_a_pattern_of_sparse_attention_says_nothing_to_plain_attention(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published("Qwen2.5-7B-Instruct")))
    (tmp_path / "sparse_attention_config.json").write_text("[]")
    assert load_config(tmp_path) == read_hf_config(published("Qwen2.5-7B-Instruct"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qk_norm", False),
        ("output_bias", True),
        ("rope", RopeSpec(theta=1e6, factor=2.0)),
        ("rope", RopeSpec(kind=RopeKind.DYNAMIC, factor=2.0, original_max_position_embeddings=9)),
        ("rope", RopeSpec(kind=RopeKind.LINEAR, factor=2.0, attention_factor=1.5)),
    ],
)
def test_config_that_the_format_cannot_say_is_not_written(field, value):
    config = dataclasses.replace(get_preset("qwen3-0.6b"), **{field: value})
    with pytest.raises(UserError, match=f"qwen3 cannot say {field} = "):
        write_hf_config(config)
