"""config.json of the mixtures of experts and the hybrids, against transformers' own reading."""

import copy
import dataclasses
import json
import random

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen_jax.config import DeltaSpec, HeadKind, LayerKind, MoeSpec, RopeKind
from qwen_jax.errors import UserError
from qwen_jax.hf_config import load_config, read_hf_config, write_hf_config
from qwen_jax.nn.rope import inverse_frequencies
from tests.test_hf_config import ABSENT, draw_rope

# transformers warns about each odd rope setting that it nevertheless computes with.
transformers.logging.set_verbosity_error()

_QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2_moe",
    "norm_topk_prob": False,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_TOWER = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "use_cache": True,
    "vocab_size": 248320,
}
_VISION = {
    "deepstack_visual_indexes": [],
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _seeing(family: str, stem: str, tower: dict) -> dict:
    """A vision-language model's file around the fields of its text tower."""
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    tower = _TOWER | {"layer_types": kinds * (tower["num_hidden_layers"] // 4)} | tower
    return {
        "architectures": [f"{stem}ForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": family,
        "text_config": tower | {"model_type": f"{family}_text"},
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 248057,
        "vision_config": _VISION | {"model_type": family, "out_hidden_size": tower["hidden_size"]},
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    }


_35B = {
    "hidden_size": 2048,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 32,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
}

# As the hub's files are quoted, or from the tables of the model cards and the classes' defaults.
PUBLISHED = {
    "Qwen1.5-MoE-A2.7B": _QWEN2_MOE
    | {"hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192}
    | {"max_window_layers": 21, "moe_intermediate_size": 1408, "num_attention_heads": 16}
    | {"num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24}
    | {"num_key_value_heads": 16, "shared_expert_intermediate_size": 5632}
    | {"sliding_window": 32768, "qkv_bias": True, "mlp_only_layers": []},
    "Qwen2-57B-A14B": _QWEN2_MOE
    | {"hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072}
    | {"max_window_layers": 28, "moe_intermediate_size": 2560, "num_attention_heads": 28}
    | {"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28}
    | {"num_key_value_heads": 4, "shared_expert_intermediate_size": 20480}
    | {"sliding_window": 131072},
    "Qwen3-30B-A3B": _QWEN3_MOE,
    "Qwen3-235B-A22B-Instruct-2507": _QWEN3_MOE
    | {"hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 262144}
    | {"max_window_layers": 94, "moe_intermediate_size": 1536, "num_attention_heads": 64}
    | {"num_hidden_layers": 94, "rope_theta": 5000000},
    "Qwen3-Next-80B-A3B-Instruct": _QWEN3_NEXT,
    "Qwen3.5-9B": _seeing(
        "qwen3_5",
        "Qwen3_5",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 16}
        | {"num_hidden_layers": 32, "num_key_value_heads": 4, "linear_num_value_heads": 32},
    ),
    "Qwen3.5-27B": _seeing(
        "qwen3_5",
        "Qwen3_5",
        {"hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": 24}
        | {"num_hidden_layers": 64, "num_key_value_heads": 4, "linear_num_value_heads": 48}
        | {"output_gate_type": "swish", "partial_rotary_factor": 0.25},
    )
    | {"language_model_only": False},
    "Qwen3.5-35B-A3B": _seeing("qwen3_5_moe", "Qwen3_5Moe", _35B),
    "Qwen3.5-397B-A17B": _seeing(
        "qwen3_5_moe",
        "Qwen3_5Moe",
        _35B
        | {"hidden_size": 4096, "moe_intermediate_size": 1024, "num_attention_heads": 32}
        | {"num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 60}
        | {"linear_num_value_heads": 64, "shared_expert_intermediate_size": 1024},
    ),
}

# Layers, experts, experts a token, their width, renormalised, width of the shared expert.
EXPERTS = {
    "Qwen1.5-MoE-A2.7B": (24, 60, 4, 1408, False, 5632),
    "Qwen2-57B-A14B": (28, 64, 8, 2560, False, 20480),
    "Qwen3-30B-A3B": (48, 128, 8, 768, True, None),
    "Qwen3-235B-A22B-Instruct-2507": (94, 128, 8, 1536, True, None),
    "Qwen3-Next-80B-A3B-Instruct": (48, 512, 10, 512, True, 512),
    "Qwen3.5-35B-A3B": (40, 256, 8, 512, True, 512),
    "Qwen3.5-397B-A17B": (60, 512, 10, 1024, True, 1024),
}
VALUE_HEADS = {
    "Qwen3-Next-80B-A3B-Instruct": 32,
    "Qwen3.5-9B": 32,
    "Qwen3.5-27B": 48,
    "Qwen3.5-35B-A3B": 32,
    "Qwen3.5-397B-A17B": 64,
}


def published(name: str) -> dict:
    return copy.deepcopy(PUBLISHED[name])


def text_config(raw: dict):
    """transformers' reading, its rope settings in the state that a model would see."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    tied = config.tie_word_embeddings
    config = config.get_text_config()
    config.tie_word_embeddings = tied
    config.standardize_rope_params()
    return config


def assert_agree(ours, theirs) -> None:
    """Every field of ours against a `transformers` object of any of the families."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
                 "tie_word_embeddings", "initializer_range", "bos_token_id",
                 "pad_token_id"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.family == theirs.model_type
    share = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == getattr(theirs, "head_dim", share)
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == ([] if eos is None else eos if type(eos) is list else [eos])
    assert ours.dtype == str(theirs.dtype or torch.float32).removeprefix("torch.")
    gives_biases = theirs.model_type == "qwen2_moe"
    assert ours.qkv_bias == (theirs.qkv_bias if gives_biases else theirs.attention_bias)
    assert ours.output_bias == (False if gives_biases else theirs.attention_bias)
    assert ours.qk_norm == (not gives_biases)
    hybrid = hasattr(theirs, "linear_num_key_heads")
    assert ours.output_gate == ours.zero_centered_norm == hybrid
    assert ours.dual_chunk is None
    assert_layers_agree(ours, theirs)
    assert_experts_agree(ours, theirs)
    assert_ropes_agree(ours, theirs)


def assert_layers_agree(ours, theirs) -> None:
    kinds = [kind.value for kind in ours.layer_types]
    if hasattr(theirs, "layer_types"):
        assert kinds == theirs.layer_types
    else:
        kind = "full_attention" if theirs.sliding_window is None else "sliding_attention"
        assert kinds == [kind] * theirs.num_hidden_layers
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or None)
    linear = LayerKind.LINEAR_ATTENTION in ours.layer_types
    assert (ours.delta is not None) == linear
    if linear:
        for field in dataclasses.fields(DeltaSpec):
            assert getattr(ours.delta, field.name) == getattr(theirs, f"linear_{field.name}")


def assert_experts_agree(ours, theirs) -> None:
    dense = getattr(theirs, "mlp_only_layers", [])
    step = getattr(theirs, "decoder_sparse_step", 1)
    num_experts = getattr(theirs, "num_experts", 0)
    sparse = [
        i
        for i in range(theirs.num_hidden_layers)
        if num_experts and i not in dense and (i + 1) % step == 0
    ]
    if len(sparse) < theirs.num_hidden_layers:
        assert ours.intermediate_size == theirs.intermediate_size
    if not sparse:
        assert ours.moe is None
        return
    assert ours.moe == MoeSpec(
        layers=tuple(sparse),
        num_experts=num_experts,
        num_experts_per_tok=theirs.num_experts_per_tok,
        intermediate_size=theirs.moe_intermediate_size,
        renormalise=getattr(theirs, "norm_topk_prob", True),
        shared_intermediate_size=getattr(theirs, "shared_expert_intermediate_size", None),
        aux_loss_coef=theirs.router_aux_loss_coef,
    )


def assert_ropes_agree(ours, theirs) -> None:
    rope, settings = ours.rope, theirs.rope_parameters
    length = 3 * theirs.max_position_embeddings
    hybrid = hasattr(theirs, "linear_num_key_heads")
    share = settings["partial_rotary_factor"] if hybrid else 1.0
    assert rope.kind == settings["rope_type"]
    assert rope.theta == settings["rope_theta"]
    assert rope.partial_rotary_factor == share
    assert rope.mrope_section == (tuple(settings.get("mrope_section") or ()) or None)
    rotated = int(ours.head_dim * share)
    if rope.kind is RopeKind.DEFAULT:
        powers = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
        frequencies, factor = 1.0 / settings["rope_theta"] ** powers, 1.0
    else:
        init = ROPE_INIT_FUNCTIONS[rope.kind.value]
        frequencies, factor = init(theirs, torch.device("cpu"), seq_len=length)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    computed = inverse_frequencies(rope, ours.rotary_dim, length)
    torch.testing.assert_close(torch.tensor(computed.tolist()), frequencies, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_means_what_transformers_reads(name):
    raw = published(name)
    ours = read_hf_config(raw)
    assert raw == PUBLISHED[name]
    assert_agree(ours, text_config(raw))
    assert ours.head is HeadKind.VOCABULARY
    if name in EXPERTS:
        layers, *sizes = EXPERTS[name]
        assert ours.moe == MoeSpec(tuple(range(layers)), *sizes)
    else:
        assert ours.moe is None
    if name in VALUE_HEADS:
        assert ours.delta == DeltaSpec(16, VALUE_HEADS[name], 128, 128, 4)
        assert ours.rotary_dim == 64
        full = [i for i, kind in enumerate(ours.layer_types) if kind is LayerKind.FULL_ATTENTION]
        assert full == list(range(3, ours.num_hidden_layers, 4))
    else:
        assert set(ours.layer_types) == {LayerKind.FULL_ATTENTION}
        assert ours.rotary_dim == ours.head_dim


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_written_so_that_all_read_it_alike(name, tmp_path):
    ours = read_hf_config(published(name))
    written = write_hf_config(ours)
    assert read_hf_config(written) == ours
    assert_agree(ours, text_config(written))
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    assert load_config(tmp_path / "again") == ours


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_saved_again_by_transformers(name, tmp_path):
    raw = published(name)
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    theirs.save_pretrained(tmp_path)
    assert load_config(tmp_path) == read_hf_config(raw)
    everything = json.loads(theirs.to_json_string(use_diff=False))
    assert read_hf_config(everything) == read_hf_config(raw)


SEEDS = pytest.mark.parametrize("seed", range(60))
FAMILIES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def draw(seed: int) -> dict:
    """A random config.json of any family in either layout, with some fields left out."""
    rng = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    hybrid = family in FAMILIES[2:]
    heads, layers = rng.choice([4, 8, 32]), rng.randint(1, 6)
    raw = {
        "model_type": family,
        "vocab_size": 96,
        "hidden_size": heads * 16,
        "intermediate_size": 3 * rng.randint(5, 50),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": rng.choice([1, 2, 4]),
    }
    optional = {
        "head_dim": [8, 48, 128],
        "max_position_embeddings": [512, 40960],
        "rms_norm_eps": [1e-6, 0.1],
        "tie_word_embeddings": [True, False],
        "eos_token_id": [None, 5, [5, 7]],
        "pad_token_id": [None, 0],
        "use_cache": [False],
    }
    if family != "qwen3_5_text":
        raw |= {
            "num_experts": rng.choice([1, 4, 60]),
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 24,
        }
        optional |= {"router_aux_loss_coef": [0.0, 0.01], "output_router_logits": [True]}
        if family != "qwen3_moe":
            raw["shared_expert_intermediate_size"] = 40
        if family != "qwen3_5_moe_text":
            optional |= {
                "decoder_sparse_step": [1, 2, 7],
                "mlp_only_layers": [None, [], [0], [1, 3, 99]],
                "norm_topk_prob": [True, False],
            }
    if family == "qwen2_moe":
        optional |= {"qkv_bias": [True, False], "max_window_layers": [0, 1, 3]}
    else:
        optional["attention_bias"] = [True, False]
    if hybrid:
        optional |= {
            "full_attention_interval": [1, 2, 3],
            "linear_num_key_heads": [1, 4],
            "linear_num_value_heads": [16, 32],
            "linear_key_head_dim": [12],
            "linear_value_head_dim": [20],
            "linear_conv_kernel_dim": [3],
        }
        if rng.random() < 0.3:
            kinds = ["linear_attention", "full_attention"]
            raw["layer_types"] = [rng.choice(kinds) for _ in range(layers)]
    else:
        optional |= {"use_sliding_window": [True, False], "sliding_window": [1, 77]}
    for name, values in optional.items():
        if rng.random() < 0.6:
            raw[name] = rng.choice(values)
    if heads < 8 and not hybrid:
        raw.pop("head_dim", None)
    if heads % 16 == 0 and rng.random() < 0.2:
        del raw["num_key_value_heads"]
    rope, theta = draw_rope(rng), rng.choice([None, 1e4, 5e6])
    share = rng.choice([None, 0.25, 0.5, 1.0]) if hybrid else None
    if rng.random() < 0.5:
        given = {"rope_theta": theta, "partial_rotary_factor": share}
        raw["rope_parameters"] = {
            **(rope or {}), **{name: value for name, value in given.items() if value}
        }  # fmt: skip
        if family.startswith("qwen3_5") and rng.random() < 0.5:
            raw["rope_parameters"] |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
        raw["dtype"] = rng.choice(["float32", "bfloat16"])
    else:
        raw |= {"rope_scaling": rope, "torch_dtype": rng.choice(["float16", "bfloat16"])}
        if theta:
            raw["rope_theta"] = theta
        if share:
            raw["partial_rotary_factor"] = share
    return raw


@SEEDS
@pytest.mark.filterwarnings("ignore:.*original_max_position_embeddings.*")
def test_reading_and_writing_mean_what_transformers_means(seed, tmp_path):
    raw = draw(seed)
    before = copy.deepcopy(raw)
    ours = read_hf_config(raw)
    assert raw == before
    assert_agree(ours, text_config(raw))
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    theirs.save_pretrained(tmp_path)
    assert load_config(tmp_path) == ours
    assert read_hf_config(json.loads(theirs.to_json_string(use_diff=False))) == ours
    if raw["model_type"] != "qwen3_5_text" and ours.moe is None:
        with pytest.raises(UserError, match="cannot say moe = None"):
            write_hf_config(ours)
        return
    written = write_hf_config(ours)
    assert read_hf_config(written) == ours
    assert_agree(ours, text_config(written))


NEXT, DENSE, SPARSE = "Qwen3-Next-80B-A3B-Instruct", "Qwen3.5-9B", "Qwen3.5-35B-A3B"
QWEN2, QWEN3 = "Qwen2-57B-A14B", "Qwen3-30B-A3B"
LINEAR = ["linear_attention"]

# Base model, fields of its text tower to change (ABSENT takes one out), and what the message has.
REFUSED = [
    (QWEN2, {"num_experts": ABSENT}, ["num_experts is missing"]),
    (QWEN2, {"num_experts_per_tok": ABSENT}, ["num_experts_per_tok is missing"]),
    (QWEN2, {"shared_expert_intermediate_size": ABSENT},
     ["shared_expert_intermediate_size is missing"]),
    (QWEN2, {"shared_expert_intermediate_size": 0}, ["shared_expert_intermediate_size = 0"]),
    (QWEN2, {"num_experts_per_tok": 65}, ["num_experts_per_tok = 65", "num_experts = 64"]),
    (QWEN2, {"num_experts_per_tok": 0}, ["num_experts_per_tok = 0"]),
    (QWEN2, {"num_experts": "64"}, ['num_experts = "64"', "integer"]),
    (QWEN2, {"norm_topk_prob": 1}, ["norm_topk_prob = 1", "boolean"]),
    (QWEN2, {"router_score_bias": 1}, ["router_score_bias = 1", "boolean"]),
    (QWEN2, {"decoder_sparse_step": 0}, ["decoder_sparse_step = 0"]),
    (QWEN2, {"mlp_only_layers": 3}, ["mlp_only_layers = 3", "list of integers"]),
    (QWEN2, {"mlp_only_layers": [0], "intermediate_size": ABSENT},
     ["intermediate_size is missing"]),
    (QWEN2, {"head_dim": 0}, ["head_dim = 0"]),
    (QWEN2, {"layer_types": LINEAR * 28}, ['"linear_attention"', "sliding_attention"]),
    (QWEN2, {"architectures": ["Qwen2ForCausalLM"]}, ["Qwen2ForCausalLM", "Qwen2MoeForCausalLM"]),
    (QWEN2, {"attn_output_gate": True}, ["attn_output_gate = true"]),
    (QWEN2, {"linear_num_key_heads": 16}, ["linear_num_key_heads = 16"]),
    (QWEN3, {"num_local_experts": 64}, ["num_experts = 128", "num_local_experts = 64", "disagree"]),
    (QWEN3, {"shared_expert_intermediate_size": 64}, ["shared_expert_intermediate_size = 64"]),
    (QWEN3, {"moe_intermediate_size": 0}, ["intermediate_size = 0"]),
    (QWEN3, {"layer_types": ["sliding_attention"] * 48}, ["layer_types", "alike"]),
    (QWEN3, {"layer_types": ["full_attention"] * 47}, ["layer_types"]),
    (QWEN3, {"use_sliding_window": True, "sliding_window": 0}, ["sliding_window = 0"]),
    (QWEN3, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
    (QWEN3, {"n_shared_experts": 1}, ["n_shared_experts = 1"]),
    (QWEN3, {"scoring_func": "sigmoid"}, ['scoring_func = "sigmoid"']),
    (NEXT, {"use_sliding_window": True}, ["use_sliding_window = true", "slides"]),
    (NEXT, {"layer_types": ["sliding_attention"] * 48}, ['"sliding_attention"']),
    (NEXT, {"layer_types": LINEAR * 47}, ["layer_types has 47 entries", "48"]),
    (NEXT, {"full_attention_interval": 0}, ["full_attention_interval = 0"]),
    (NEXT, {"linear_num_value_heads": 24}, ["linear_num_value_heads = 24", "= 16"]),
    (NEXT, {"linear_conv_kernel_dim": 0}, ["linear_conv_kernel_dim = 0"]),
    (NEXT, {"partial_rotary_factor": 0.0}, ["partial_rotary_factor = 0.0"]),
    (NEXT, {"partial_rotary_factor": 1.5}, ["partial_rotary_factor = 1.5"]),
    (NEXT, {"partial_rotary_factor": 0.013}, ["partial_rotary_factor = 0.013", "3 rotated"]),
    (NEXT, {"rope_parameters": {"partial_rotary_factor": 0.5}},
     ["partial_rotary_factor = 0.25", "partial_rotary_factor in rope_parameters = 0.5"]),
    (NEXT, {"attn_output_gate": False}, ["attn_output_gate = false"]),
    (NEXT, {"mamba_ssm_dtype": "bfloat16"}, ['mamba_ssm_dtype = "bfloat16"']),
    (NEXT, {"hidden_act": "gelu"}, ['hidden_act = "gelu"']),
    (DENSE, {"attn_output_gate": False}, ["attn_output_gate = false"]),
    (DENSE, {"use_sliding_window": True}, ["use_sliding_window = true"]),
    (DENSE, {"output_gate_type": "sigmoid"}, ['output_gate_type = "sigmoid"', '"swish"']),
    (DENSE, {"mtp_use_dedicated_embeddings": True}, ["mtp_use_dedicated_embeddings = true"]),
    (DENSE, {"num_experts": 8}, ["num_experts = 8"]),
    (DENSE, {"router_score_bias": True}, ["router_score_bias = true"]),
    (DENSE, {"intermediate_size": ABSENT}, ["intermediate_size is missing"]),
    (DENSE, {"rope_parameters": {"rope_type": "default", "mrope_section": "11"}},
     ["mrope_section"]),
    (DENSE, {"rope_parameters": {"rope_type": "mrope"}}, ['"mrope"']),
    (SPARSE, {"norm_topk_prob": False}, ["norm_topk_prob = false", "renormalises"]),
    (SPARSE, {"mlp_only_layers": [3]}, ["mlp_only_layers = [3]"]),
    (SPARSE, {"decoder_sparse_step": 2}, ["decoder_sparse_step = 2"]),
    (SPARSE, {"use_sliding_window": True}, ["use_sliding_window = true"]),
    (SPARSE, {"attn_output_gate": False}, ["attn_output_gate = false"]),
]  # fmt: skip


def changed(name: str, changes: dict) -> dict:
    raw = published(name)
    text = raw.get("text_config", raw)
    text |= changes
    for field in [field for field, value in text.items() if value is ABSENT]:
        del text[field]
    return raw


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": None}, ["text_config is missing"]),
        ({"text_config": []}, ["text_config = []", "object"]),
        ({"sparkle": 7}, ["sparkle = 7"]),
        ({"is_causal": False}, ["is_causal = false"]),
        ({"architectures": ["Qwen3_5ForConditionalGeneration"]}, ["Qwen3_5ForConditionalGene"]),
        ({"tie_word_embeddings": "no"}, ['tie_word_embeddings = "no"']),
    ],
)
def test_refusal_of_what_surrounds_a_tower(changes, words):
    with pytest.raises(UserError) as error:
        read_hf_config(published(SPARSE) | changes)
    for word in words:
        assert word in str(error.value)


def test_the_class_of_the_whole_model_says_what_reads_the_tower():
    raw = published(DENSE)
    raw["text_config"]["architectures"] = ["Qwen3_5TextModel"]
    assert read_hf_config(raw) == read_hf_config(published(DENSE))


def test_the_whole_model_s_ids_and_dtype_stand_in_for_a_tower_s():
    raw = published(DENSE)
    del raw["text_config"]["eos_token_id"], raw["text_config"]["dtype"]
    raw |= {"eos_token_id": [7, 9], "dtype": "float16"}
    ours = read_hf_config(raw)
    assert ours.eos_token_ids == (7, 9)
    assert ours.dtype == "float16"


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("of_the_whole", [3, None])
def test_the_whole_model_s_labels_are_those_of_its_head(head, of_the_whole):
    raw = published(DENSE) | {"architectures": [f"Qwen3_5{head}"]}
    raw["text_config"]["id2label"] = {str(i): f"inner {i}" for i in range(5)}
    if of_the_whole is not None:
        raw["id2label"] = {str(i): f"outer {i}" for i in range(of_the_whole)}
        raw["label2id"] = {label: int(i) for i, label in raw["id2label"].items()}
    theirs = transformers.Qwen3_5Config.from_dict(raw)
    assert read_hf_config(raw).num_labels == theirs.num_labels == (of_the_whole or 2)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_bias_of_routers_scores_is_read_and_written(name):
    plain = read_hf_config(published(name))
    assert not plain.moe.score_bias
    assert read_hf_config(changed(name, {"router_score_bias": False})) == plain
    # Readers that do not know the field see it only where there is a bias.
    assert "router_score_bias" not in json.dumps(write_hf_config(plain))
    ours = read_hf_config(changed(name, {"router_score_bias": True}))
    assert ours == dataclasses.replace(plain, moe=dataclasses.replace(plain.moe, score_bias=True))
    written = write_hf_config(ours)
    assert '"router_score_bias": true' in json.dumps(written)
    assert read_hf_config(written) == ours


def test_a_second_name_for_the_number_of_experts():
    raw = published(QWEN3)
    raw["num_local_experts"] = raw.pop("num_experts")
    assert read_hf_config(raw) == read_hf_config(published(QWEN3))
    assert_agree(read_hf_config(raw), text_config(raw))


@pytest.mark.parametrize(
    ("name", "moe"),
    [
        (SPARSE, {"layers": (0, 1)}),
        (SPARSE, {"renormalise": False}),
        (SPARSE, {"shared_intermediate_size": None}),
        (QWEN3, {"shared_intermediate_size": 8}),
    ],
)
def test_experts_that_the_format_cannot_say_are_not_written(name, moe):
    ours = read_hf_config(published(name))
    ours = dataclasses.replace(ours, moe=dataclasses.replace(ours.moe, **moe))
    with pytest.raises(UserError):
        write_hf_config(ours)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output_gate", False),
        ("zero_centered_norm", False),
        ("qk_norm", False),
        ("sliding_window", 8),
    ],
)
def test_a_hybrid_that_the_format_cannot_say_is_not_written(field, value):
    with pytest.raises(UserError, match=f"cannot say {field}"):
        write_hf_config(dataclasses.replace(read_hf_config(published(DENSE)), **{field: value}))
