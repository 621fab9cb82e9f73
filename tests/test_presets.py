"""The presets against the sizes that the checkpoints' authors and weight files declare."""

import dataclasses
import functools
from collections.abc import Collection

import jax
import pytest
import torch
import transformers
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

from configs.models import PRESETS, get_preset
from qwen_jax.checkpoint.names import layers_of_fused_experts, leaf_at, regions
from qwen_jax.checkpoint.regions import stored_shape
from qwen_jax.config import HeadKind, ModelConfig, RopeSpec
from qwen_jax.errors import UserError
from qwen_jax.hf_config import read_hf_config, write_hf_config
from qwen_jax.models.decoder import parameter_shapes
from tests.renderings.guard import GuardModel

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

# "Number of Parameters ... in total and ... activated", in billions, of the model cards.
ACTIVATED = {
    "qwen1.5-moe-a2.7b": ("14.3", "2.7"),
    "qwen2-57b-a14b": ("57.4", "14"),
    "qwen3-30b-a3b": ("30.5", "3.3"),
    "qwen3-235b-a22b": ("235", "22"),
    "qwen3-coder-480b-a35b-instruct": ("480", "35"),
    "qwen3-next-80b-a3b-instruct": ("80", "3"),
    "qwen3.5-35b-a3b": ("35", "3"),
    "qwen3.5-122b-a10b": ("122", "10"),
    "qwen3.5-397b-a17b": ("397", "17"),
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

# Parameters of the published files, as the hub counts them.
HUB = {
    "qwen-7b": 7721324544,
    "qwen1.5-14b": 14167290880,
    "qwen1.5-moe-a2.7b": 14315784192,
    "qwen2-57b-a14b": 57408658944,
    "qwen3-30b-a3b": 30532122624,
    "qwen3-235b-a22b": 235093634560,
    "qwen3-coder-480b-a35b-instruct": 480154875392,
    "qwen3-coder-next": 79674391296,
    "qwen3-embedding-0.6b": 595776512,
    "qwen3-embedding-4b": 4021774336,
    "qwen3-reranker-0.6b": 595776512,
    "qwen3-reranker-4b": 4021784576,
    "qwen3-reranker-8b": 8188548096,
}

# The same, of files that also hold a vision tower and a head that predicts the token after the
# next. 27B and 35B-A3B as counted for Qwen3.6, which has these shapes.
HUB_WITH_TOWERS = {
    "qwen3.5-0.8b": (873438784, {"depth": 12, "hidden_size": 768, "num_heads": 12}),
    "qwen3.5-2b": (2274069824, {"depth": 24, "hidden_size": 1024}),
    "qwen3.5-4b": (4659865088, {"depth": 24, "hidden_size": 1024}),
    "qwen3.5-9b": (9653104368, {}),
    "qwen3.5-27b": (27781427952, {}),
    "qwen3.5-35b-a3b": (35951822704, {}),
    "qwen3.5-122b-a10b": (125086497008, {}),
    "qwen3.5-397b-a17b": (403397928944, {}),
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
    "qwen2.5-math-rm-72b": (72, 0.75),
    "qwen2.5-math-prm-7b": (7, 0.75),
    "qwen2.5-math-prm-72b": (72, 0.75),
    "qwen3-embedding-8b": (8, 0.25),
    "qwen2-0.5b": (0.5, 0.05),
    "qwen2-1.5b": (1.5, 0.05),
    "qwen2-7b": (7, 0.75),
    "qwen2-72b": (72, 0.75),
    "qwen3guard-stream-0.6b": (0.6, 0.05),
    "qwen3guard-stream-4b": (4, 0.1),
    "qwen3guard-stream-8b": (8, 0.75),
}

EVERY = pytest.mark.parametrize("name", sorted(PRESETS))


# transformers has no class for the first generation, whose layers are those of the second.
FIRST_GENERATION = "qwen"
IN_TRANSFORMERS = pytest.mark.parametrize(
    "name", [name for name in sorted(PRESETS) if PRESETS[name].family != FIRST_GENERATION]
)


def shape_of(config: ModelConfig) -> ModelConfig:
    """`config` without what leaves the parameters as they are, so that a shape is built once."""
    moe = config.moe
    return dataclasses.replace(
        config,
        family="qwen2" if config.family == FIRST_GENERATION else config.family,
        # No layer is dense where all have experts.
        intermediate_size=config.intermediate_size if moe is None else 1,
        moe=moe and dataclasses.replace(moe, aux_loss_coef=0.0),
        rope=RopeSpec(),
        logn_length=None,
        dual_chunk=None,
        rms_norm_eps=1e-6,
        max_position_embeddings=1,
        bos_token_id=None,
        eos_token_ids=(),
    )


@functools.cache
def our_parameters(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(shape))
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def stored_tensors(config: ModelConfig, fused_layers: Collection[str]) -> dict[str, tuple]:
    """The shapes of the tensors of a checkpoint of `config`, by the table of names."""
    tree = parameter_shapes(config)
    return {
        region.name: stored_shape(region, leaf_at(tree, region.path).shape)
        for region in regions(config, fused_layers)
    }


@functools.cache
def their_tensors(shape: ModelConfig) -> dict[str, tuple[int, ...]]:
    config = transformers.AutoConfig.for_model(**write_hf_config(shape))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        if shape.head is HeadKind.TWO_LAYER_SCORE:
            # As the code that came with the reward models has it.
            del model.lm_head
            model.score = torch.nn.Sequential(
                torch.nn.Linear(shape.hidden_size, shape.hidden_size),
                torch.nn.ReLU(),
                torch.nn.Linear(shape.hidden_size, shape.num_labels),
            )
        if shape.head is HeadKind.GUARD:
            model = GuardModel(model.model, write_hf_config(shape))
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


def active_parameters(config: ModelConfig) -> int:
    """How many parameters take part in one token: all but the experts that it does not go to."""
    counts = {k: torch.Size(v).numel() for k, v in our_parameters(shape_of(config)).items()}
    experts = sum(count for name, count in counts.items() if "['experts']" in name)
    chosen = experts * config.moe.num_experts_per_tok // config.moe.num_experts
    return sum(counts.values()) - experts + chosen


@pytest.mark.parametrize("name", ACTIVATED)
def test_total_and_active_parameters_are_those_of_the_model_card(name):
    counts = (parameters(name)[0], active_parameters(PRESETS[name]))
    for count, printed in zip(counts, ACTIVATED[name], strict=True):
        unit = 10.0 ** -len(printed.partition(".")[2])
        assert abs(count / 1e9 - float(printed)) < unit, (count, printed)


@pytest.mark.parametrize("name", HUB)
def test_parameter_counts_are_those_of_the_hub(name):
    assert parameters(name)[0] == HUB[name]


def test_embedder_without_the_head_that_its_config_asks_for():
    config = dataclasses.replace(PRESETS["qwen3-embedding-8b"], head=HeadKind.NONE)
    assert size(our_parameters(shape_of(config))) == 7567295488


def test_parameter_count_of_the_hub_with_the_head_for_the_token_after_the_next():
    config = dataclasses.replace(PRESETS["qwen3-next-80b-a3b-instruct"], mtp_layers=1)
    assert size(our_parameters(shape_of(config))) == 81324862720


@pytest.mark.parametrize("name", HUB_WITH_TOWERS)
def test_parameter_counts_are_those_of_the_hub_with_both_towers(name):
    total, vision = HUB_WITH_TOWERS[name]
    if vision:
        vision = {**vision, "intermediate_size": 4 * vision["hidden_size"]}
    config = dataclasses.replace(PRESETS[name], mtp_layers=1)
    text = size(our_parameters(shape_of(config)))
    with torch.device("meta"):
        tower = Qwen3_5VisionModel(
            Qwen3_5VisionConfig(out_hidden_size=config.hidden_size, **vision)
        )
    assert text + size({k: tuple(v.shape) for k, v in tower.state_dict().items()}) == total


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
    tables = (CARDS, ACTIVATED, WEIGHT_INDICES, HUB, HUB_WITH_TOWERS, COUNTED, NAMES)
    checked = {shape_of(PRESETS[name]) for table in tables for name in table}
    assert {shape_of(config) for config in PRESETS.values()} <= checked


@EVERY
def test_tensors_are_those_of_transformers(name):
    shape = shape_of(PRESETS[name])
    theirs = their_tensors(shape)
    assert stored_tensors(shape, layers_of_fused_experts(theirs)) == theirs
    assert size(our_parameters(shape)) == size(theirs)


@pytest.mark.parametrize("fused_layers", [(), ("model.layers.0.", "mtp.layers.0.")])
@pytest.mark.parametrize("name", sorted({*HUB, *HUB_WITH_TOWERS}))
def test_stored_tensors_hold_every_parameter_once(name, fused_layers):
    config = dataclasses.replace(PRESETS[name], mtp_layers=int(PRESETS[name].delta is not None))
    assert size(stored_tensors(config, fused_layers)) == size(our_parameters(config))


@EVERY
def test_config_json_round_trip(name):
    assert read_hf_config(write_hf_config(PRESETS[name])) == PRESETS[name]


@IN_TRANSFORMERS
def test_transformers_reads_the_same_numbers_from_the_written_config(name):
    config = PRESETS[name]
    theirs = transformers.AutoConfig.for_model(**write_hf_config(config))
    rope = {"rope_type": "default", "rope_theta": config.rope.theta}
    if config.delta is not None:
        rope["partial_rotary_factor"] = config.rope.partial_rotary_factor
    if config.rope.mrope_section is not None:
        rope["mrope_section"] = list(config.rope.mrope_section)
    assert theirs.rope_parameters == rope
    assert theirs.rms_norm_eps == config.rms_norm_eps
    assert theirs.max_position_embeddings == config.max_position_embeddings
    assert (theirs.eos_token_id,) == config.eos_token_ids
    assert theirs.bos_token_id == config.bos_token_id
    assert theirs.dtype is torch.bfloat16
    if config.moe is not None:
        assert theirs.num_experts_per_tok == config.moe.num_experts_per_tok
        assert getattr(theirs, "norm_topk_prob", True) == config.moe.renormalise
        assert theirs.router_aux_loss_coef == config.moe.aux_loss_coef


@EVERY
def test_end_of_text_belongs_to_the_vocabulary_and_to_the_kind_of_model(name):
    config = PRESETS[name]
    chats = ("-chat", "-instruct", "-2507", "qwq-", "-rm-", "-prm", "guard")
    is_chat = any(part in name for part in chats)
    is_chat |= name.startswith("qwen3-") and not name.endswith("-base")
    is_chat &= name != "qwen3-embedding-0.6b"
    base, chat = (2, 4) if name.startswith("codeqwen") else (151643, 151645)
    if name.startswith("qwen-"):
        assert (config.bos_token_id, config.eos_token_ids) == (None, ())
    elif name.startswith("qwen3.5-"):
        assert (config.bos_token_id, config.eos_token_ids) == (None, (248044,))
    else:
        coder = name.startswith("qwen3-coder-") and "-next" not in name
        assert config.bos_token_id == (None if coder else base)
        assert config.eos_token_ids == ((chat,) if is_chat else (base,))
    assert max(config.eos_token_ids, default=0) < config.vocab_size


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
