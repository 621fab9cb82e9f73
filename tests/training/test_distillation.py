"""Distillation against a rendering in PyTorch: loss and gradients, in parts and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import qwen_jax
from qwen_jax.config import HeadKind
from qwen_jax.errors import UserError
from qwen_jax.models.decoder import Decoder
from qwen_jax.sharding.axes import Layout, as_mesh
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.batch import Batch
from qwen_jax.training.data import DataOptions, SourceOptions
from qwen_jax.training.distillation import DistillationOptions, distillation
from qwen_jax.training.divergence import divergence
from qwen_jax.training.goal import choose_goal
from qwen_jax.training.loop import LoopOptions
from qwen_jax.training.run_options import RunOptions
from qwen_jax.training.step_options import TrainOptions
from qwen_jax.training.train_step import init_train_state, make_train_step
from tests.models.passes import padding
from tests.reference import random_reference, save_reference
from tests.sharding.models import CONFIGS, make_config, one_device
from tests.training.published import published
from tests.training.test_loss import largest_array
from tests.training.test_objective import weighted_batch

EXACT = TrainOptions(dtype="float32", scan=False, remat="none", block_size=16)
OPTIONS = DistillationOptions("teacher", dtype="float32", temperature=1.7, mix=0.6)


def torch_loss(student, teacher, targets, options):
    """Section 2 of the paper, of logits [n, V]; the sums over tokens of both parts."""
    log, T = torch.log_softmax, options.temperature
    kl = torch.nn.functional.kl_div(
        log(student / T, -1), log(teacher / T, -1), reduction="none", log_target=True
    ).sum(-1)
    entropy = torch.nn.functional.cross_entropy(student, targets, reduction="none")
    return options.mix * T**2 * kl + (1 - options.mix) * entropy, kl, entropy


def test_loss_metrics_and_gradients_equal_the_paper_s_in_torch(tmp_path):
    taught = random_reference("qwen3", num_hidden_layers=2)
    # Of another size and kind, with the same vocabulary.
    knowing = random_reference("qwen3_moe", seed=1, hidden_size=48, num_hidden_layers=1)
    teacher, known = qwen_jax.load_pretrained(save_reference(knowing, tmp_path / "a"))
    model, params = qwen_jax.load_pretrained(save_reference(taught, tmp_path / "b"))
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, model.config.vocab_size, (2, 19)), padding([19, 12], 19, "right")
    weights = rng.uniform(0, 2, ids.shape).astype(np.float32) * mask
    tensors = (torch.as_tensor(a) for a in (ids, mask))
    call = dict(zip(("input_ids", "attention_mask"), tensors, strict=True), use_cache=False)
    with torch.no_grad():
        wanted = knowing(**call).logits[:, :-1].flatten(0, 1)
    logits = taught(**call).logits[:, :-1].flatten(0, 1)
    own = torch.as_tensor(weights[:, 1:]).flatten()
    parts = torch_loss(logits, wanted, call["input_ids"][:, 1:].flatten(), OPTIONS)
    loss, kl, entropy = ((own * part).sum() / own.sum() for part in parts)
    loss.backward()

    objective = distillation(OPTIONS, teacher)
    batch = Batch(ids, attention_mask=mask, loss_weights=weights)

    @jax.jit
    def run(params):
        def value(params):
            return objective.loss(model, params, batch, EXACT, None, {"teacher": known})

        (found, sums), gradients = jax.value_and_grad(value, has_aux=True)(params)
        return found, objective.metrics(model, sums, EXACT), gradients

    found, metrics, gradients = run(params)
    expected = {"loss": loss, "kl": kl, "cross_entropy": entropy, "tokens": own.sum()}
    np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number.item(), rtol=1e-5, err_msg=name)
    theirs = dict(taught.named_parameters())
    for name, gradient in published(model.config, gradients).items():
        grad = theirs[name].grad.numpy()
        atol = 1e-4 * np.abs(grad).max()
        np.testing.assert_allclose(gradient, grad, rtol=0, atol=atol, err_msg=name)


B, T, V = 4, 10, 48


def draw():
    rng = np.random.default_rng(0)
    shapes = (B, T, 16), (V, 16), (B, T, 8), (V, 8)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    weights = rng.uniform(0, 2, (B, T)).astype(np.float32) * (rng.uniform(size=(B, T)) < 0.7)
    return *arrays, rng.integers(0, V, (B, T)), weights


def run(x, head, y, teacher_head, targets, weights, **options):
    def loss(x, head):
        return divergence(x, head, y, teacher_head, targets, weights, **options)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, head)


@pytest.mark.parametrize("mesh", [None, "fsdp:2,context:2,tensor:2", "expert:2,tensor:4"])
@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_sums_and_gradients_equal_those_of_whole_logits(mesh, mix):
    x, head, y, teacher_head, targets, weights = draw()
    options = dataclasses.replace(OPTIONS, mix=mix)
    a, b = (torch.tensor(array, requires_grad=True) for array in (x, head))
    logits, wanted = (a @ b.T).flatten(0, 1), torch.as_tensor(y @ teacher_head.T).flatten(0, 1)
    parts = torch_loss(logits, wanted, torch.as_tensor(targets).flatten(), options)
    total, kl, entropy = ((torch.as_tensor(weights).flatten() * part).sum() for part in parts)
    total.backward()
    layout = Layout(as_mesh(mesh)) if mesh else None
    targets = np.where(weights == 0, -100, targets)
    (ours, sums), gradients = run(
        x, head, y, teacher_head, targets, weights,
        temperature=1.7, mix=mix, block_size=3, layout=layout,
    )  # fmt: skip
    np.testing.assert_allclose(ours, total.item(), rtol=1e-5)
    np.testing.assert_allclose(sums["kl"], kl.item(), rtol=1e-5)
    np.testing.assert_allclose(sums["cross_entropy"], entropy.item(), rtol=1e-5)
    for gradient, leaf in zip(gradients, (a, b), strict=True):
        grad = leaf.grad.numpy()
        np.testing.assert_allclose(gradient, grad, rtol=0, atol=1e-5 * np.abs(grad).max())


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    x, head, *other, targets, weights = draw()
    _, expected = run(x, head, *other, targets, weights, temperature=1.7)
    (total, sums), gradients = run(x, head, x, head, targets, weights, temperature=1.7)
    assert abs(total) < 1e-4
    assert sums["cross_entropy"] > 1
    for gradient, scale in zip(gradients, expected, strict=True):
        assert np.abs(gradient).max() < 1e-5 * np.abs(scale).max()


def test_no_array_of_the_program_has_the_size_of_all_logits():
    B, T, D, V, block_size = 4, 64, 8, 512, 32
    shapes = [(B, T, D), (V, D), (B, T, D), (V, D), (B, T), (B, T)]
    kinds = [jnp.float32] * 4 + [jnp.int32, jnp.float32]
    arguments = [jax.ShapeDtypeStruct(s, kind) for s, kind in zip(shapes, kinds, strict=True)]

    def loss(*arrays):
        return divergence(*arrays, mix=0.5, block_size=block_size)[0]

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    assert largest_array(compiled) == block_size * V


def test_parts_of_a_batch_on_a_mesh_give_the_update_of_the_whole_on_one_device():
    model, params = one_device(CONFIGS["moe"])
    teacher, known = one_device(make_config(hidden_size=16, vocab_size=model.config.vocab_size))
    batch = weighted_batch(model.config, 4)
    options = dataclasses.replace(EXACT, balance=BalanceOptions(loss=2.1, z_loss=0.1))

    def run(mesh, parts):
        bound, guide = (m.clone(mesh=as_mesh(mesh)) for m in (model, teacher))
        state = init_train_state(bound, optax.sgd(1.0), params=params)
        placed = init_train_state(guide, optax.sgd(1.0), params=known).params
        state = state.replace(beside={"teacher": placed})
        step = make_train_step(
            bound,
            optax.sgd(1.0),
            dataclasses.replace(options, microbatches=parts),
            objective=distillation(OPTIONS, guide),
        )
        after, metrics = step(state, batch)
        return jax.tree.map(lambda a, b: np.asarray(a) - b, params, after.params), metrics

    ours, expected = run("fsdp:2,tensor:2", 2), run(None, 1)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), ours[0], expected[0])
    jax.tree.map(lambda a, b: close(a, b, 1e-5), ours[1], expected[1])


def close(ours, expected, tolerance):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("losses", "name"),
    [({}, "mtp_loss = 0.1"), ({"z_loss": 0.5, "mtp_loss": 0.0}, "z_loss = 0.5")],
)
def test_a_run_with_losses_of_next_tokens_is_refused_before_the_teacher_is_read(losses, name):
    model, params = one_device(make_config(mtp_layers=1))
    step = dataclasses.replace(EXACT, **losses)
    options = RunOptions(
        DataOptions((SourceOptions("x.jsonl"),)),
        LoopOptions(1),
        model="m",
        step=step,
        distillation=DistillationOptions("no/such teacher"),
    )
    with pytest.raises(UserError, match=f"step.{name} is for next-token training alone; set it"):
        choose_goal(options, model, params, tokenizer=None)
    # Whoever has no run is told by the step.
    with pytest.raises(UserError, match=f"step.{name} is for next-token training alone"):
        make_train_step(model, optax.sgd(1.0), step, objective=distillation(OPTIONS, model))


def test_a_teacher_of_other_tokens_is_refused():
    model, params = one_device(make_config())
    batch = weighted_batch(model.config, 3)
    for changes, message in (
        ({"vocab_size": 97}, "the teacher's vocab_size = 97, the model's 96; take a teacher with"),
        ({"head": HeadKind.SCORE, "num_labels": 2}, "the teacher has a score head, which predicts"),
    ):
        objective = distillation(OPTIONS, Decoder(make_config(**changes)))
        with pytest.raises(UserError, match=message):
            objective.loss(model, params, batch, EXACT)
    with pytest.raises(ValueError, match="give the teacher: "):
        distillation(OPTIONS, model).loss(model, params, batch, EXACT)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("teacher", "", "teacher is empty; name a checkpoint"),
        ("dtype", "float16", "dtype = float16 is not supported; known: float32, bfloat16"),
        ("temperature", 0.0, "temperature = 0.0 must be above 0"),
        ("mix", 0.0, "mix = 0.0 must be above 0 and at most 1"),
        ("mix", 1.1, "mix = 1.1 must be above 0 and at most 1"),
    ],
)
def test_options_that_are_none_are_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        DistillationOptions(**{"teacher": "a", field: value})
