"""Experts shared out over devices: each way to bring tokens to them equals one device.

CPUs have no `ragged_all_to_all`: an emulation stands in for it, which is itself held against the
words of JAX's documentation, in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen_jax.config import MoeSpec
from qwen_jax.errors import UserError
from qwen_jax.nn.expert_exchange import exchange_and_mix, pays_to_exchange
from qwen_jax.nn.moe import Dispatch, mix_chosen
from qwen_jax.nn.quantized import quantize
from qwen_jax.nn.router import RouterOptions
from qwen_jax.sharding import aot
from qwen_jax.sharding.axes import as_mesh, parameter_shardings, read_mesh
from qwen_jax.sharding.chips import read_topology
from qwen_jax.sharding.jobs import Job
from qwen_jax.sharding.plan import compile_plan
from qwen_jax.training.objective import TrainOptions
from tests.sharding.models import CONFIGS, make_config, one_device, random_batch

E, D, F = 8, 16, 12


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` by gathering everything everywhere."""
    del recv_sizes
    me, gather = jax.lax.axis_index(axis_name), functools.partial(
        jax.lax.all_gather, axis_name=axis_name
    )  # fmt: skip
    operands, starts, sizes, landings = map(
        gather, (operand, input_offsets, send_sizes, output_offsets)
    )
    at = jnp.arange(len(output))
    for sender in range(len(operands)):
        inside = at - landings[sender, me]
        rows = operands[sender].at[starts[sender, me] + inside].get(mode="clip")
        comes = (inside >= 0) & (inside < sizes[sender, me])
        output = jnp.where(comes[:, None], rows, output)
    return output


def random_parts(rng, shards, n, room):
    """Sizes [sender, receiver] of parts with gaps before them, and where they lie on both sides."""
    sizes = rng.multinomial(n // 2, np.full(shards, 1 / shards), size=shards)
    gaps = rng.integers(0, 2, (2, shards, shards))
    starts = np.cumsum(sizes + gaps[0], axis=1) - sizes
    landings = np.cumsum(sizes + gaps[1], axis=0) - sizes
    assert (starts + sizes).max() <= n and (landings + sizes).max() <= room
    return starts, sizes, landings


def test_the_emulation_sends_as_documented():
    rng, shards, n, room = np.random.default_rng(0), 4, 24, 40
    starts, sizes, landings = random_parts(rng, shards, n, room)
    operand, output = (rng.standard_normal((shards, m, 3)).astype(np.float32) for m in (n, room))
    want = output.copy()
    for sender in range(shards):
        for receiver in range(shards):
            size = sizes[sender, receiver]
            start, landing = starts[sender, receiver], landings[sender, receiver]
            want[receiver, landing : landing + size] = operand[sender, start : start + size]

    def shard(*arguments):
        return emulated(*(x[0] for x in arguments), axis_name=("expert",))[None]

    mesh, spec = as_mesh(f"expert:{shards}"), P("expert")
    run = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    np.testing.assert_array_equal(run(operand, output, starts, sizes, landings, sizes.T), want)


def random_case(k, kind, n=24):
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((n, E))
    if kind == "one gets all":
        scores[:, : max(k, E // 4)] += 100
    if kind == "one gets none":
        scores[:, E // 2 :] -= 100
    chosen = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
    if kind == "dropped":
        chosen[rng.random((n, k)) < 0.3] = E
    weights = np.where(chosen < E, rng.random((n, k)), 0).astype(np.float32)
    shapes = {"gate_proj": (E, F, D), "up_proj": (E, F, D), "down_proj": (E, D, F)}
    experts = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    return rng.standard_normal((n, D)).astype(np.float32), chosen, weights, experts


def out_and_gradients(function, x, chosen, weights, experts):
    along = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)

    def loss(x, weights, experts):
        y = function(x, chosen, weights, experts)
        return jnp.sum(y * along), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, weights, experts)
    return y, gradients


def exchanged(mesh):
    """`exchange_and_mix` on a mesh, an expert's width cut along `tensor`."""

    def shard(x, chosen, weights, experts):
        y = exchange_and_mix(
            x, chosen, weights, experts, ("expert",), Dispatch.RAGGED, collective=emulated
        )
        return jax.lax.psum(y, "tensor")

    rows = P(("fsdp", "expert"))
    wide, narrow = P("expert", "tensor"), P("expert", None, "tensor")
    places = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
    return jax.shard_map(
        shard,
        mesh=as_mesh(mesh),
        in_specs=(rows, rows, rows, places),
        out_specs=rows,
        check_vma=False,
    )


@pytest.mark.parametrize(
    ("mesh", "k", "kind"),
    [
        ("expert:8", 3, "uneven"),
        ("expert:2", 5, "uneven"),
        ("expert:4,tensor:2", 2, "one gets all"),
        ("expert:4", 2, "one gets none"),
        ("fsdp:2,expert:4", 1, "uneven"),
        ("fsdp:2,expert:2,tensor:2", 3, "dropped"),
    ],
)
def test_exchanged_tokens_equal_those_of_one_device(mesh, k, kind):
    case = random_case(k, kind)

    def on_one(x, chosen, weights, experts):
        return mix_chosen(x, chosen, weights, experts, Dispatch.DENSE, None)

    want = out_and_gradients(on_one, *case)
    got = out_and_gradients(exchanged(mesh), *case)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


@pytest.mark.parametrize("mesh", ["fsdp:2,expert:4", "context:2", "fsdp:2,context:2,tensor:2"])
@pytest.mark.parametrize("length", [11, 12])
def test_full_experts_drop_the_tokens_that_they_drop_on_one_device(mesh, length):
    """What the mesh adds to rows and columns takes no place, and texts keep their order."""
    model, params = one_device(CONFIGS["moe"])
    model = model.clone(dispatch=Dispatch.CAPACITY, router=RouterOptions(capacity_factor=0.4))
    ids, mask = (x[:, :length] for x in random_batch(model.config))
    want = model.apply({"params": params}, ids, mask)
    mesh = as_mesh(mesh)
    params = jax.device_put(params, parameter_shardings(model.config, mesh, params))
    got = jax.jit(model.clone(mesh=mesh).apply)({"params": params}, ids, mask)
    for ours, theirs in zip(got.router, want.router, strict=True):
        assert 0 < theirs.dropped == ours.dropped
        np.testing.assert_array_equal(ours.experts[mask], theirs.experts[mask])
        np.testing.assert_array_equal(ours.counts, theirs.counts)
    error = np.linalg.norm((got.logits - want.logits)[mask])
    assert error <= 1e-5 * np.linalg.norm(want.logits[mask])


def packed(params, bits):
    """`params` with int8 or int4 experts, in groups of 8 inputs."""

    def pack(leaf):
        small = quantize(np.asarray(leaf), bits, group_size=8)
        return jax.tree.map(jnp.asarray, small)

    layers = {
        name: {**layer, "mlp": {**layer["mlp"], "experts": {
            projection: {"weight": pack(leaf["weight"])}
            for projection, leaf in layer["mlp"]["experts"].items()
        }}}
        for name, layer in params.items() if name.startswith("layers_")
    }  # fmt: skip
    return {**params, **layers}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mesh", ["fsdp:2,expert:4", "expert:2,tensor:2"])
def test_packed_experts_on_a_mesh_equal_those_of_one_device(mesh, bits):
    model, params = one_device(CONFIGS["moe"])
    params = packed(params, bits)
    ids, mask = random_batch(model.config)
    want = model.apply({"params": params}, ids, mask).logits[mask]
    mesh = as_mesh(mesh)
    params = jax.device_put(params, parameter_shardings(model.config, mesh, params))
    got = jax.jit(model.clone(mesh=mesh).apply)({"params": params}, ids, mask).logits[mask]
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_a_mesh_that_cuts_through_packed_groups_names_the_experts():
    model, params = one_device(CONFIGS["moe"])
    ids, mask = random_batch(model.config)
    mesh = as_mesh("tensor:4")
    with pytest.raises(UserError, match="experts/down_proj/weight: packed in 2 groups of 8"):
        model.clone(mesh=mesh).apply({"params": packed(params, 8)}, ids, mask)


def test_it_pays_where_more_devices_than_choices_share_the_experts():
    assert pays_to_exchange(16, 8)
    assert not pays_to_exchange(8, 8)


MOE = make_config(
    hidden_size=256,
    intermediate_size=256,
    head_dim=128,
    vocab_size=512,
    moe=MoeSpec((0, 1), 16, 2, 128, renormalise=True, shared_intermediate_size=None),
)


@pytest.mark.skipif(not aot.has_compiler(), reason="needs libtpu")
@pytest.mark.parametrize("mode", ["prefill", "train"])
def test_on_tpus_tokens_are_exchanged_and_nothing_is_gathered_over_experts(mode):
    topology, mesh = read_topology("v5p:2x2x1"), tuple(read_mesh("expert:4").items())
    job = Job(MOE, topology, mesh, mode, 8, 512, TrainOptions())
    plan = compile_plan(job, with_xla_flops=False)
    experts = [each for each in plan.traffic if "/mlp" in each.place]
    # Rows there and back, in each layer; of training forward, again for remat, and their gradients.
    turns = sum(each.times for each in experts if each.kind == "ragged-all-to-all")
    assert turns == {"prefill": 4, "train": 12}[mode]
    # Besides them numbers of rows only.
    assert all(each.bytes < 1e5 for each in experts if each.kind == "all-gather")
    assert not [each for each in experts if each.kind == "reduce-scatter"]
