"""The presets against the sizes that the checkpoints' authors and weight files declare."""

import dataclasses
import functools

import jax
import pytest
import torch
import transformers

from configs.models import PRESETS, get_preset
from qwen_jax.config import ModelConfig, RopeSpec
from qwen_jax.errors import UserError
from qwen_jax.hf_config import read_hf_config, write_hf_config
from qwen_jax.models.decoder import parameter_shapes

# "Number of Parameters" and "Number of Parameters (Non-Embedding)", in billions, of the model
# cards on the hub.
CARDS = {
    "qwen2.5-0.5b": ("0.49", "0.36"),
    "qwen2.5-1.5b": ("1.54", "1.31"),
    "qwen2.5-3b": ("3.09", "2.77"),
    "qwen2.5-7b": ("7.61", "6.53"),
    "qwen2.5-14b": ("14.7", "13.1"),
    "qwen2.5-32b": ("32.5", "31.0"),
    "qwen2.5-72b": ("72.7", "70.0"),
    "qwen2.5-coder-0.5b": ("0.49", "0.36"),
    "qwen2.5-coder-1.5b": ("1.54", "1.31"),
    "qwen2.5-coder-3b": ("3.09", "2.77"),
    "qwen2.5-coder-7b": ("7.61", "6.53"),
    "qwen2.5-coder-14b": ("14.7", "13.1"),
    "qwen2.5-coder-32b": ("32.5", "31.0"),
    "qwq-32b-preview": ("32.5", "31.0"),
    "qwq-32b": ("32.5", "31.0"),
    "qwen3-0.6b": ("0.6", "0.44"),
    "qwen3-1.7b": ("1.7", "1.4"),
    "qwen3-4b": ("4.0", "3.6"),
    "qwen3-4b-instruct-2507": ("4.0", "3.6"),
    "qwen3-4b-thinking-2507": ("4.0", "3.6"),
    "qwen3-8b": ("8.2", "6.95"),
    "qwen3-14b": ("14.8", "13.2"),
    "qwen3-32b": ("32.8", "31.2"),
}

# Cards print a figure rounded or cut off, hence one unit of the last digit. These are further off
# than that; the weight indices of the same checkpoints, below, hold to the last parameter.
LOOSE_CARDS = {"13.1": 2, "32.5": 3, "31.0": 3, "70.0": 3}

# `metadata.total_size` of model.safetensors.index.json, in bytes of bfloat16.
WEIGHT_INDICES = {
    "qwen2.5-3b": 6171877376,
    "qwen2.5-7b": 15231233024,
    "qwen2.5-14b": 29540067328,
    "qwen2.5-32b": 65527752704,
    "qwen2.5-72b": 145412407296,
    "qwen3-4b": 8044936192,
    "qwen3-8b": 16381470720,
    "qwen3-14b": 29536614400,
    "qwen3-32b": 65524246528,
}

# Millions of parameters as the ScandEval leaderboard counted them in the loaded models, for
# generations whose cards have no figure.
COUNTED = {"qwen1.5-1.8b": 1837, "qwen1.5-4b": 3950}

# Billions, from the name, which rounds generously: Qwen1.5-7B has 7.7 and 110B has 111.2. Public
# tables of models give CodeQwen1.5 two digits more.
NAMES = {
    "qwen1.5-0.5b": (0.5, 0.05),
    "qwen1.5-7b": (7, 0.75),
    "qwen1.5-14b": (14, 0.75),
    "qwen1.5-32b": (32, 0.75),
    "qwen1.5-72b": (72, 0.75),
    "qwen1.5-110b": (110, 1.5),
    "codeqwen1.5-7b": (7.25, 0.005),
    "qwen2-0.5b": (0.5, 0.05),
    "qwen2-1.5b": (1.5, 0.05),
    "qwen2-7b": (7, 0.75),
    "qwen2-72b": (72, 0.75),
}

EVERY = pytest.mark.parametrize("name", sorted(PRESETS))


def shape_of(config: ModelConfig) -> ModelConfig:
    """`config` without what leaves the parameters as they are, so that a shape is built once."""
    return dataclasses.replace(
        config,
        rope=RopeSpec(),
        rms_norm_eps=1e-6,
        max_position_embeddings=1,
        bos_token_id=None,
        eos_token_ids=(),
    )


@functools.cache
def our_parameters(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(shape))
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


@functools.cache
def their_parameters(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    config = transformers.AutoConfig.for_model(**write_hf_config(shape))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if shape.tie_word_embeddings else set()
    return {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in tied}


def size(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def parameters(name: str) -> tuple[int, int]:
    """Total, and without the input table and the output head."""
    config = PRESETS[name]
    total = size(our_parameters(shape_of(config)))
    tables = 1 if config.tie_word_embeddings else 2
    return total, total - tables * config.vocab_size * config.hidden_size


@pytest.mark.parametrize("name", CARDS)
def test_parameter_counts_are_those_of_the_model_card(name):
    for count, printed in zip(parameters(name), CARDS[name], strict=True):
        unit = 10.0 ** -len(printed.partition(".")[2])
        units = LOOSE_CARDS.get(printed, 1)
        assert abs(count / 1e9 - float(printed)) < units * unit, (count, printed)


@pytest.mark.parametrize("name", WEIGHT_INDICES)
def test_parameter_bytes_are_those_of_the_weight_index(name):
    assert 2 * parameters(name)[0] == WEIGHT_INDICES[name]


def test_tied_checkpoint_that_stores_its_head_twice():
    # Hub metadata of Qwen3-0.6B: 751,632,384 bfloat16 parameters, lm_head.weight among them.
    config = PRESETS["qwen3-0.6b"]
    assert parameters("qwen3-0.6b")[0] + config.vocab_size * config.hidden_size == 751632384


@pytest.mark.parametrize("name", COUNTED)
def test_parameter_counts_are_those_that_others_counted(name):
    assert round(parameters(name)[0] / 1e6) == COUNTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_near_the_size_in_the_name(name):
    billions, tolerance = NAMES[name]
    assert abs(parameters(name)[0] / 1e9 - billions) < tolerance


def test_every_preset_has_a_checked_size():
    # A variant has the parameters of the model it was trained from, which is in a table.
    checked = {shape_of(PRESETS[name]) for name in (*CARDS, *WEIGHT_INDICES, *COUNTED, *NAMES)}
    assert {shape_of(config) for config in PRESETS.values()} <= checked


@EVERY
def test_parameters_are_those_of_transformers(name):
    shape = shape_of(PRESETS[name])
    ours, theirs = our_parameters(shape), their_parameters(shape)
    assert size(ours) == size(theirs)
    # Names differ, and the axes of a matrix may be swapped.
    assert sorted(map(sorted, ours.values())) == sorted(map(sorted, theirs.values()))


@EVERY
def test_config_json_round_trip(name):
    assert read_hf_config(write_hf_config(PRESETS[name])) == PRESETS[name]


@EVERY
def test_transformers_reads_the_same_numbers_from_the_written_config(name):
    config = PRESETS[name]
    theirs = transformers.AutoConfig.for_model(**write_hf_config(config))
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": config.rope.theta}
    assert theirs.rms_norm_eps == config.rms_norm_eps
    assert theirs.max_position_embeddings == config.max_position_embeddings
    assert (theirs.eos_token_id,) == config.eos_token_ids
    assert theirs.bos_token_id == config.bos_token_id
    assert theirs.dtype is torch.bfloat16


@EVERY
def test_end_of_text_belongs_to_the_vocabulary_and_to_the_kind_of_model(name):
    config = PRESETS[name]
    chats = ("-chat", "-instruct", "-2507", "qwq-")
    is_chat = any(part in name for part in chats)
    is_chat |= name.startswith("qwen3-") and not name.endswith("-base")
    base, chat = (2, 4) if name.startswith("codeqwen") else (151643, 151645)
    assert config.bos_token_id == base
    assert config.eos_token_ids == ((chat,) if is_chat else (base,))
    assert max(config.eos_token_ids) < config.vocab_size


def test_get_preset_ignores_case_and_organisation():
    assert get_preset("Qwen/Qwen3-0.6B") is PRESETS["qwen3-0.6b"]
    assert get_preset("QwQ-32B") is PRESETS["qwq-32b"]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("qwen3-0.6", "qwen3-0.6b"), ("qwen2.5-coder-7b-instuct", "qwen2.5-coder-7b-instruct")],
)
def test_unknown_preset_names_the_nearest(wrong, nearest):
    with pytest.raises(UserError) as error:
        get_preset(wrong)
    assert repr(wrong) in str(error.value)
    assert str(error.value).endswith(nearest)


def test_unknown_preset_far_from_every_name_is_still_one_line():
    for wrong in ("", "llama", "\n"):
        with pytest.raises(UserError) as error:
            get_preset(wrong)
        assert "\n" not in str(error.value)


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["qwen3-0.6b"] = None
