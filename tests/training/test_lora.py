"""LoRA against PyTorch with PEFT: gradients, steps, what is trained and what is left alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch

import qwen_jax
from qwen_jax.checkpoint.peft_reader import load_adapter
from qwen_jax.errors import UserError
from qwen_jax.nn.low_rank import attach, detach, low_rank_weights
from qwen_jax.nn.quantized import dequantize, quantize
from qwen_jax.sharding.axes import as_mesh
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.lora import LoraOptions, add_adapters, is_adapter
from qwen_jax.training.objective import Batch, TrainOptions, objective
from qwen_jax.training.partition import combine, partition
from qwen_jax.training.train_step import (
    abstract_train_state,
    init_train_state,
    make_train_step,
)
from tests.models.passes import random_ids
from tests.reference import random_reference, save_reference
from tests.sharding.models import CONFIGS, one_device, random_batch

EXACT = TrainOptions(dtype="float32", balance=BalanceOptions(pooling="model"), block_size=16)
CASES = {
    "dense": ("qwen3", {}, {"target_modules": ["q_proj", "o_proj", "down_proj", "lm_head"]}),
    "experts": (
        "qwen3_moe",
        {"router_aux_loss_coef": 0.7, "num_hidden_layers": 2},
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": [
                "mlp.gate.weight",
                "mlp.experts.gate_up_proj",
                "mlp.experts.down_proj",
            ],
        },
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """PEFT's model with a random adapter, and ours with the same one."""
    family, fields, targets = CASES[request.param]
    reference = random_reference(family, **fields)
    base = save_reference(reference, tmp_path_factory.mktemp("base"))
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **targets)
    reference = peft.get_peft_model(reference, config)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    directory = tmp_path_factory.mktemp("adapter")
    reference.save_pretrained(directory, save_embedding_layers=False)
    model, params = qwen_jax.load_pretrained(base)
    return reference, model, attach(params, load_adapter(directory, model.config))


def reference_loss(reference, ids):
    sparse = {"output_router_logits": True} if hasattr(reference, "router_aux_loss_coef") else {}
    ids = torch.as_tensor(ids)
    return reference(input_ids=ids, labels=ids, use_cache=False, **sparse).loss


def gradients_of(reference, model, directory):
    """Their gradients in our tree, by way of the adapter's own format."""
    with torch.no_grad():
        kept = {}
        for name, parameter in reference.named_parameters():
            if "lora_" in name:
                kept[name] = parameter.clone()
                parameter.copy_(parameter.grad)
        reference.save_pretrained(directory, save_embedding_layers=False)
        for name, parameter in reference.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
    return dict(low_rank_weights(load_adapter(directory, model.config)))


def test_loss_and_gradients_equal_peft(case, tmp_path):
    reference, model, params = case
    ids = random_ids(model, (2, 19))
    reference.zero_grad()
    expected = reference_loss(reference, ids)
    expected.backward()
    scan = model.config.moe is None
    options = dataclasses.replace(EXACT, scan=scan, remat="full" if scan else "none")
    trained, frozen = partition(params, is_adapter)

    @jax.jit
    def run(trained):
        def loss(trained):
            return objective(model, combine(trained, frozen), Batch(ids), options)[0]

        return jax.value_and_grad(loss)(trained)

    loss, gradients = run(trained)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    wanted = gradients_of(reference, model, tmp_path)
    ours = dict(low_rank_weights(gradients))
    assert ours.keys() == wanted.keys()
    assert len(ours) > 6
    fused = ("gate_proj", "up_proj")
    for path, leaf in ours.items():
        a, b = leaf.a, leaf.b
        if "experts" in path and path[-2] in fused:
            # They have one matrix `a` for both, whose gradient is the sum of ours.
            other = (*path[:-2], fused[path[-2] == fused[0]], path[-1])
            a = a + ours[other].a
        for part, grad in ((a, wanted[path].a), (b, wanted[path].b)):
            grad = np.asarray(grad)
            assert np.abs(grad).max() > 0
            atol = 1e-4 * np.abs(grad).max()
            np.testing.assert_allclose(part, grad, rtol=0, atol=atol, err_msg=str(path))


def test_steps_train_the_adapters_alone(case):
    _, model, params = case
    optimiser = optax.adamw(1e-2, weight_decay=0.1)
    state = init_train_state(model, optimiser, params=params, trained=is_adapter)
    base, adapter = detach(params)
    before = jax.tree.map(np.array, base)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((adapter, state.opt_state)))
    scales = sum(leaf.scale.nbytes for _, leaf in low_rank_weights(adapter))
    matrices = sum(leaf.a.nbytes + leaf.b.nbytes for _, leaf in low_rank_weights(adapter))
    # Two moments for each number of the adapters, and two counters.
    assert held == 3 * matrices + scales + jnp.int32(0).nbytes
    step = make_train_step(model, optimiser, EXACT)
    for _ in range(2):
        state, _ = step(state, Batch(random_ids(model, (2, 19))))
    after, moved = detach(combine(state.params, state.frozen))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    # Not even a copy.
    assert all(a is b for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(base), strict=True))
    for path, leaf in low_rank_weights(adapter):
        now = dict(low_rank_weights(moved))[path]
        assert (now.a != leaf.a).all()
        assert (now.b != leaf.b).all()
        assert (now.scale == leaf.scale).all()


def packed(params, bits):
    """The weights of linear layers rounded, and what they are then, dense."""

    def pack(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return quantize(np.asarray(leaf), bits, 16) if "_proj/weight" in name else leaf

    few = jax.tree_util.tree_map_with_path(pack, params)
    is_packed = lambda leaf: hasattr(leaf, "group_of")  # noqa: E731
    dense = jax.tree.map(
        lambda leaf: dequantize(leaf, jnp.float32) if is_packed(leaf) else leaf,
        few,
        is_leaf=is_packed,
    )
    return jax.tree.map(jnp.asarray, few), jax.tree.map(jnp.asarray, dense)


def steps(model, params, options, batch, mesh=None, optimiser=None):
    model = model if mesh is None else model.clone(mesh=as_mesh(mesh))
    optimiser = optimiser or optax.sgd(0.1)
    state = init_train_state(model, optimiser, params=params, trained=is_adapter)
    step = make_train_step(model, optimiser, options, state)
    history = []
    for _ in range(2):
        state, metrics = step(state, batch)
        history.append(metrics)
    return state, history


def random_adapters(params, targets):
    """Adapters whose `b` is not zero, so that `a` has gradients too."""
    options = LoraOptions(rank=4, alpha=6, targets=targets)
    params = add_adapters(params, options, jax.random.key(3))
    rng = np.random.default_rng(4)
    trained, frozen = partition(params, lambda path: path.endswith("/weight/b"))
    drawn = jax.tree.map(
        lambda b: jnp.asarray(0.3 * rng.standard_normal(b.shape), jnp.float32), trained
    )
    return combine(drawn, frozen)


def close(ours, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_a_packed_base_trains_as_its_dense_values_do():
    model, params = one_device(CONFIGS["moe"])
    batch = Batch(random_ids(model, (2, 11)))
    targets = ("self_attn/*", "experts/*")
    options = dataclasses.replace(EXACT, balance=BalanceOptions(loss=0.5, pooling="model"))
    few, dense = packed(params, 4)
    ours, history = steps(model, random_adapters(few, targets), options, batch)
    theirs, wanted = steps(model, random_adapters(dense, targets), options, batch)
    jax.tree.map(close, history, wanted)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        close(a, b, 1e-4)
    before = jax.tree.leaves(few)
    after = jax.tree.leaves(detach(combine(ours.params, ours.frozen))[0])
    assert all(map(np.array_equal, before, after))


@pytest.mark.parametrize(
    ("mesh", "bits"), [("fsdp:2,expert:2,tensor:2", None), ("fsdp:2,expert:4", 8)]
)
def test_steps_on_a_mesh_are_those_of_one_device(mesh, bits):
    model, params = one_device(CONFIGS["moe"])
    if bits is not None:
        params = packed(params, bits)[0]
    params = random_adapters(params, ("*_proj", "mlp/gate", "lm_head"))
    ids, mask = random_batch(model.config)
    batch = Batch(ids, attention_mask=mask)
    options = dataclasses.replace(EXACT, balance=BalanceOptions(loss=0.5, pooling="model"))
    state, history = steps(model, params, options, batch, mesh)
    expected, wanted = steps(model, params, options, batch)
    jax.tree.map(close, history, wanted)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), state.params, expected.params)
    q = state.params["layers_1"]["self_attn"]["q_proj"]["weight"]
    assert q.a.sharding.spec[1] == "fsdp"
    experts = state.params["layers_1"]["mlp"]["experts"]["down_proj"]["weight"]
    assert experts.b.sharding.spec[0] == "expert"
    placed = model.clone(mesh=as_mesh(mesh))
    abstract = abstract_train_state(placed, optax.sgd(0.1), params, is_adapter)
    for ours, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)
        assert ours.sharding.is_equivalent_to(wanted.sharding, ours.ndim)


def test_fresh_adapters_change_nothing_and_begin_as_peft_begins_them():
    model, params = one_device(CONFIGS["moe"])
    options = LoraOptions(rank=8, alpha=4, targets=("q_proj", "experts/up_proj"))
    adapted = add_adapters(params, options, jax.random.key(0))
    again = add_adapters(
        params, dataclasses.replace(options, targets=("experts.up_proj",)), jax.random.key(0)
    )
    names = ["/".join(path) for path, _ in low_rank_weights(adapted)]
    assert names == [
        f"layers_{i}/{layer}/weight"
        for i in range(2)
        for layer in ("mlp/experts/up_proj", "self_attn/q_proj")
    ]
    for path, leaf in low_rank_weights(adapted):
        bound = leaf.shape[-1] ** -0.5
        a = np.asarray(leaf.a)
        assert np.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.1)
        assert (leaf.b == 0).all()
        assert (leaf.scale == 0.5).all()
        if "experts" in path:
            np.testing.assert_array_equal(a, dict(low_rank_weights(again))[path].a)
    ids = random_ids(model, (1, 7))
    np.testing.assert_array_equal(
        model.apply({"params": adapted}, ids).logits, model.apply({"params": params}, ids).logits
    )
    assert LoraOptions(rank=4, alpha=6, rank_stabilised=True).scale == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("qproj",)}, "target qproj is no layer of the model; the nearest is q_proj"),
        ({"targets": ("embed_tokens",)}, "target embed_tokens is the table of embeddings"),
        ({"targets": ("q_norm",)}, "target q_norm is a norm"),
        ({"targets": ("k_conv",)}, "target k_conv is a convolution"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": "q_proj"}, "targets = 'q_proj' should be a list of names"),
        ({"rank": 0}, "rank = 0 should be an integer, at least 1"),
        ({"alpha": float("nan")}, "alpha = nan should be a number above 0"),
        ({"dropout": 0.1}, "dropout = 0.1 is not supported"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(options, message):
    _, params = one_device(CONFIGS["hybrid"])
    with pytest.raises(UserError, match=message):
        add_adapters(params, LoraOptions(**options), jax.random.key(0))


def test_layers_with_different_adapters_run_one_by_one_and_are_not_scanned():
    model, params = one_device(CONFIGS["dense"])
    params = random_adapters(params, ("layers_1/self_attn/q_proj",))
    batch = Batch(random_ids(model, (1, 9)))
    with pytest.raises(UserError, match=r"layers 0 and 1 cannot be scanned together: self_attn/"):
        objective(model, params, batch, EXACT)
    options = dataclasses.replace(EXACT, scan=False)
    state, _ = steps(model, params, options, batch)
    assert len(jax.tree.leaves(state.params)) == 2


def test_training_nothing_is_refused():
    model, params = one_device(CONFIGS["dense"])
    with pytest.raises(UserError, match="no parameter is trained; add adapters"):
        init_train_state(model, optax.sgd(0.1), params=params, trained=is_adapter)
