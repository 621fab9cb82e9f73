"""Mixtures of experts and hybrids against transformers, live; see `test_decoder` for the rest."""

import numpy as np
import pytest
import torch

import qwen_jax
from qwen_jax.nn.moe import Dispatch
from qwen_jax.nn.router import RouterOptions
from tests.models.passes import (
    TOLERANCE,
    check_cached_pieces,
    check_hidden_states,
    check_padded_logits,
    check_ragged_decode,
    draw_scaling,
    padding,
    random_ids,
)
from tests.reference import forget_lengths, random_reference, reference_logits, save_reference

FAMILIES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
HYBRIDS = FAMILIES[2:]
CHUNK = 64


def draw_experts(rng, family, num_layers):
    fields = {
        "num_experts": int(rng.choice([1, 3, 5, 6, 8, 12])),
        "moe_intermediate_size": int(rng.integers(8, 60)),
        "shared_expert_intermediate_size": int(rng.integers(8, 60)),
    }
    fields["num_experts_per_tok"] = min(int(rng.choice([1, 1, 2, 3, 4])), fields["num_experts"])
    if family == "qwen3_moe":
        del fields["shared_expert_intermediate_size"]
    if family != "qwen3_5_moe_text":
        some = rng.integers(2, size=num_layers)
        fields |= {
            "norm_topk_prob": bool(rng.integers(2)),
            "decoder_sparse_step": int(rng.choice([1, 1, 2, 3])),
            "mlp_only_layers": [int(i) for i in np.flatnonzero(some)] * int(rng.integers(2)),
        }
    return fields


def draw_hybrid(rng, num_layers):
    key_heads = int(rng.integers(1, 4))
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    kinds = [str(kind) for kind in rng.choice(kinds, num_layers)]
    # transformers needs one.
    kinds[rng.integers(num_layers)] = "full_attention"
    return {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * int(rng.integers(1, 4)),
        "linear_key_head_dim": int(rng.integers(6, 24)),
        "linear_value_head_dim": int(rng.integers(6, 24)),
        "linear_conv_kernel_dim": int(rng.integers(2, 6)),
        "layer_types": kinds,
        "head_dim": int(8 * rng.integers(2, 6)),
    }


def draw_case(seed):
    """A checkpoint's family and fields, drawn from everything that config.json can ask for."""
    rng = np.random.default_rng(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    kv_heads, group = rng.integers(1, 4), rng.choice([1, 2, 3, 7])
    length, num_layers = int(rng.integers(16, 64)), int(rng.integers(2, 5))
    head_dim = int(2 * rng.integers(4, 20))
    fields = {
        "num_key_value_heads": int(kv_heads),
        "num_attention_heads": int(kv_heads * group),
        "hidden_size": int(kv_heads * group * head_dim),
        "intermediate_size": int(rng.integers(20, 90)),
        "num_hidden_layers": num_layers,
        "tie_word_embeddings": bool(rng.integers(2)),
        "rms_norm_eps": float(10 ** rng.uniform(-7, -2)),
        "max_position_embeddings": length,
    }
    rope = {"rope_theta": float(10 ** rng.uniform(2, 7)), **(draw_scaling(rng, length) or {})}
    if rng.integers(2):
        # Of a size of its own; else it is the heads' share of the hidden size.
        fields |= {"head_dim": head_dim, "hidden_size": int(rng.integers(20, 90))}
    if family == "qwen2_moe":
        fields["qkv_bias"] = bool(rng.integers(2))
        fields["max_window_layers"] = int(rng.integers(0, 4))
    else:
        fields["attention_bias"] = bool(rng.integers(2))
    if family in HYBRIDS:
        fields |= draw_hybrid(rng, num_layers)
        rope["partial_rotary_factor"] = float(rng.choice([0.25, 0.5, 0.75, 1.0]))
    else:
        fields["use_sliding_window"] = bool(rng.integers(4))
        fields["sliding_window"] = int(rng.integers(1, 20))
    if family != "qwen3_5_text":
        fields |= draw_experts(rng, family, num_layers)
    return family, {**fields, "rope_parameters": {"rope_type": "default", **rope}}


SEEDS = range(105, 130)


@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_checkpoints_equal_the_reference(seed, tmp_path):
    family, fields = draw_case(seed)
    reference = random_reference(family, seed, **fields)
    model, params = qwen_jax.load_pretrained(save_reference(reference, tmp_path / "model"))
    mask = padding([CHUNK + 6, 41], CHUNK + 6, "left" if seed % 2 else "right")
    check_padded_logits(reference, model, params, mask, seed)


def test_draws_cover_what_config_json_can_ask_for():
    drawn = [draw_case(seed) for seed in SEEDS]
    for family in FAMILIES:
        own = [fields for name, fields in drawn if name == family]
        asked = {name: {str(fields.get(name)) for fields in own} for name in own[0]}
        for name in ("qkv_bias", "attention_bias", "norm_topk_prob", "tie_word_embeddings"):
            assert asked.get(name, {"True", "False"}) == {"True", "False"}, (family, name)
        for name in ("decoder_sparse_step", "mlp_only_layers", "layer_types", "num_experts"):
            assert len(asked.get(name, "any")) > 1, (family, name)
        assert "1" in asked.get("num_experts_per_tok", "1"), family
    ropes = {(name in HYBRIDS, fields["rope_parameters"]["rope_type"]) for name, fields in drawn}
    assert len(ropes) == 8


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
HALF = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
MROPE = {"mrope_section": [2, 2, 2], "mrope_interleaved": True}

CASES = {
    "qwen2_moe sliding, every other sparse": (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3_moe sliding, one of five": (
        "qwen3_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "num_experts": 5,
            "num_experts_per_tok": 1,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_next dynamic": (
        "qwen3_next",
        {
            "rope_parameters": {**HALF, "rope_type": "dynamic", "factor": 2.5},
            "max_position_embeddings": 16,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_5_text mrope, yarn": (
        "qwen3_5_text",
        {"rope_parameters": {**HALF, **YARN, **MROPE}, "tie_word_embeddings": True},
    ),
    "qwen3_5_moe_text mrope": ("qwen3_5_moe_text", {"rope_parameters": {**HALF, **MROPE}}),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request, tmp_path_factory):
    family, fields = CASES[request.param]
    reference = random_reference(family, seed=len(request.param), **fields)
    directory = save_reference(reference, tmp_path_factory.mktemp("model"))
    model, params = qwen_jax.load_pretrained(directory)
    return reference, model, params


def test_logits_and_hidden_states_equal_the_reference(case):
    check_hidden_states(*case, (2, CHUNK + 9))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_the_reference(case, side):
    check_padded_logits(*case, padding([CHUNK + 9, 1, 33], CHUNK + 9, side))


def test_cached_decode_equals_one_full_pass(case):
    """In pieces within a chunk of the delta rule, across two, and of single tokens."""
    _, model, params = case
    if model.config.rope.depends_on_length:
        # Past the trained length each new token changes the frequencies, and with them all states.
        check_cached_pieces(model, params, [9, 12, 1, 1], 21, range(4))
    else:
        check_cached_pieces(model, params, [5, 1, 1, 70, 3, 1], 77, (3, 5))


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_cached_decode_equals_each_row_alone(case, side):
    _, model, params = case
    check_ragged_decode(model, params, [20, 1], side)


def test_greedy_ids_equal_the_reference(case):
    reference, model, params = case
    lengths, new = [3, 21, 10], 12
    depends_on_length = model.config.rope.depends_on_length
    if depends_on_length:
        lengths = [10, 10, 10]
    prompts = [random_ids(model, (n,), seed=n + i).tolist() for i, n in enumerate(lengths)]
    mask = padding(lengths, max(lengths), "left")
    ids = np.zeros(mask.shape, int)
    ids[mask.astype(bool)] = np.concatenate(prompts)
    forget_lengths(reference)
    expected = reference.generate(
        torch.as_tensor(ids),
        attention_mask=torch.as_tensor(mask),
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
        # Its cache keeps keys as the frequencies of shorter texts rotated them.
        use_cache=not depends_on_length,
    )
    ours = qwen_jax.generate(model, params, prompts, max_new_tokens=new, stop_ids=[])
    np.testing.assert_array_equal(ours, expected[:, ids.shape[1] :])
    # Texts that differ from row to row and from token to token.
    assert len({tuple(row) for row in ours}) == len(ours)
    assert all(len(set(row)) > new // 2 for row in ours)


def test_routing_equals_the_reference(case):
    reference, model, params = case
    moe, num_layers = model.config.moe, model.config.num_hidden_layers
    if moe is None:
        out = model.apply({"params": params}, random_ids(model, (1, 4)))
        assert out.router == (None,) * num_layers
        return
    ids, mask = random_ids(model, (2, 30)), padding([30, 17], 30, "left")
    forget_lengths(reference)
    with torch.no_grad():
        expected = reference(
            torch.as_tensor(ids),
            attention_mask=torch.as_tensor(mask),
            use_cache=False,
            output_router_logits=True,
        ).router_logits
    out = model.apply({"params": params}, ids, mask)
    assert tuple(i for i, routing in enumerate(out.router) if routing is not None) == moe.layers
    real = mask.astype(bool)
    routings = [routing for routing in out.router if routing is not None]
    for ours, theirs in zip(routings, expected, strict=True):
        theirs = theirs.reshape(*ids.shape, moe.num_experts)[torch.as_tensor(real)]
        np.testing.assert_allclose(ours.logits[real], theirs, rtol=0, atol=TOLERANCE)
        chosen = theirs.topk(moe.num_experts_per_tok).indices
        np.testing.assert_array_equal(ours.experts[real], chosen)
        counts = np.bincount(chosen.flatten(), minlength=moe.num_experts)
        np.testing.assert_array_equal(ours.counts, counts)
        assert ours.dropped == 0


def test_a_row_of_unknown_ids_leaves_the_others_alone(case):
    _, model, params = case
    ids = random_ids(model, (2, 12))
    expected = np.asarray(model.apply({"params": params}, ids).logits)
    ids[0, 3] = model.config.vocab_size
    logits = np.asarray(model.apply({"params": params}, ids).logits)
    assert np.isnan(logits[0, 3:]).all()
    np.testing.assert_allclose(logits[1], expected[1], rtol=0, atol=TOLERANCE)


def test_a_model_runs_its_experts_in_the_way_that_it_is_given(tmp_path):
    reference = random_reference("qwen3_moe", num_hidden_layers=2)
    model, params = qwen_jax.load_pretrained(save_reference(reference, tmp_path / "model"))
    ids = random_ids(model, (2, 20))
    expected = reference_logits(reference, ids)
    for method in Dispatch:
        room = 3.0 if method is Dispatch.CAPACITY else None
        out = model.clone(dispatch=method, router=RouterOptions(capacity_factor=room)).apply(
            {"params": params}, ids
        )
        np.testing.assert_allclose(out.logits, expected, rtol=0, atol=TOLERANCE)
    tight = model.clone(dispatch="capacity", router=RouterOptions(capacity_factor=0.5)).apply(
        {"params": params}, ids
    )
    assert np.abs(tight.logits - expected).max() > 0.01
    for routing in tight.router:
        # Half the places of an even share, of which an expert that few chose leaves some.
        chosen = routing.counts.sum()
        assert chosen / 2 <= routing.dropped < chosen
        assert np.sum(routing.experts == model.config.moe.num_experts) == routing.dropped
