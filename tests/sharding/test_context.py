"""Context parallelism on 8 virtual devices against the same functions unsharded.

The devices have to be asked for before JAX starts, so that one child process runs every case and
writes down for each what failed.
"""

import functools
import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qwen_jax.nn import attend as attend_file
from qwen_jax.nn.attend import Branch, Mask, attend
from qwen_jax.nn.cache import write_slots
from qwen_jax.nn.delta_rule import causal_conv, gated_delta_rule, segment_starts
from qwen_jax.nn.delta_shards import sharded_causal_conv, sharded_delta_rule
from qwen_jax.nn.dual_chunk import BRANCHES, dual_chunk_attend
from qwen_jax.nn.kernels import choose
from qwen_jax.nn.kernels.choose import PLAIN, Kernels
from qwen_jax.nn.ring import (
    cache_attend,
    context_attend,
    unzigzag,
    write_own_slots,
    write_travelling_slots,
    zigzag,
)
from qwen_jax.sharding.axes import as_mesh

ROOT = Path(__file__).parents[2]
MESHES = ("context:2", "context:4,tensor:2", "fsdp:2,context:4", "context:8")
METHODS = ("ring", "gather")
# Name of each kind of attention, and the parts of `random_case` it has.
KINDS = {
    "causal": (),
    "padding": ("padding",),
    "window": ("window",),
    "texts in a row": ("segments",),
    "slots of each row": ("slots", "holes"),
    "dual chunk": ("dual",),
    "all at once": ("slots", "holes", "segments", "window", "scale"),
    "all of dual chunk": ("dual", "holes", "segments", "scale"),
}
CASES = {}


def case(*parameters):
    """Registers a function to run in the child process, once for each tuple of parameters."""

    def register(function):
        for values in parameters or [()]:
            name = "-".join([function.__name__, *map(str, values)])
            CASES[name] = functools.partial(function, *values)
        return function

    return register


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    path = tmp_path_factory.mktemp("context") / "failures.json"
    done = subprocess.run(
        [sys.executable, __file__, path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def close(got, want, relative=1e-5):
    """Equal up to `relative` of the largest number."""
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.isfinite(got).all() and np.abs(want).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=0, atol=relative * np.abs(want).max())


def all_close(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(x, y)


def arrays_in(compiled):
    """The shapes of all arrays in a compiled program."""
    for sizes in set(re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", compiled.as_text())):
        yield tuple(map(int, sizes.split(",")))


# By logical axes: what the axes of arrays lie along in a mesh.
AXES = {"B": "fsdp", "T": "context", "H": "tensor"}


def spec(axes):
    """`spec("BTH")` of an array [B, T, H, ...]; a dot stands for an axis that is whole."""
    return PartitionSpec(*(AXES.get(axis) for axis in axes))


def on_mesh(function, mesh, in_axes, out_axes):
    def specs(axes):
        return jax.tree.map(spec, axes)

    return jax.shard_map(
        functools.partial(function, axis_name="context"),
        mesh=as_mesh(mesh),
        in_specs=specs(in_axes),
        out_specs=specs(out_axes),
        check_vma=False,
    )


def shards_of(mesh):
    return as_mesh(mesh).shape["context"]


def laid_out(tree, mesh):
    """Arrays [B, T, ...] in the order in which they lie on the shards."""
    return jax.tree.map(lambda x: x[:, zigzag(x.shape[1], shards_of(mesh))], tree)


def in_order(tree, mesh):
    return jax.tree.map(lambda x: x[:, unzigzag(x.shape[1], shards_of(mesh))], tree)


def axes_of(mask, queries, keys):
    """The axes of a mask's arrays."""
    arrays = [
        name for name, value in vars(mask).items() if isinstance(value, (np.ndarray, jax.Array))
    ]
    return mask.replace(**{name: queries if "query" in name else keys for name in arrays})


def random_case(parts, T=48, S=None):
    """Queries, keys, values, mask and scale of two rows."""
    rng = np.random.default_rng(0)
    S = T if S is None else S
    branches = 3 if "dual" in parts else 1
    queries = tuple(rng.standard_normal((branches, 2, T, 4, 8)).astype(np.float32))
    k, v = (rng.standard_normal((2, S, 2, d)).astype(np.float32) for d in (8, 6))
    slots = np.tile(np.arange(S, dtype=np.int32), (2, 1))
    if "slots" in parts:
        # Row 1 begins later, with gaps, and its last two tokens are padding with one slot.
        slots[1] = 5 + slots[1] + slots[1] // 7
        slots[1, -2:] = 1000
    valid = None
    if "padding" in parts:
        valid = slots < np.array([[S], [S - 17]])
    if "holes" in parts:
        valid = rng.random((2, S)) < 0.7
        valid[0, :3] = False
    segments = None
    if "segments" in parts:
        segments = np.sort(rng.integers(0, 4, (2, S)), axis=1).astype(np.int32)
    groups = slots // 7 if "dual" in parts else None
    mask = Mask(
        query_slots=slots[:, S - T :],
        key_valid=valid,
        query_groups=None if groups is None else groups[:, S - T :],
        key_groups=groups,
        key_slots=slots,
        query_segments=None if segments is None else segments[:, S - T :],
        key_segments=segments,
        window=11 if "window" in parts else None,
    )
    scale = np.full((2, T), 0.3, np.float32)
    if "scale" in parts:
        scale = rng.uniform(0.2, 0.5, (2, T)).astype(np.float32)
    return queries, k, v, mask, scale


def branches_of(mask):
    return (Branch(),) if mask.key_groups is None else BRANCHES


def unsharded(queries, k, v, mask, scale):
    if mask.key_groups is None:
        return attend(*queries, k, v, mask, scale, "plain")[0]
    return dual_chunk_attend(
        queries,
        k,
        v,
        mask.query_slots,
        mask.key_valid,
        mask.query_groups,
        mask.key_groups,
        scale,
        mask.key_slots,
        mask.query_segments,
        mask.key_segments,
    )


def sharded(mesh, method, kernels=PLAIN):
    """A function of what `random_case` returns."""

    def function(queries, k, v, mask, scale):
        arguments = laid_out((queries, k, v, mask, scale), mesh)
        masks = axes_of(mask, "BT", "BT")
        branches = branches_of(mask)
        call = functools.partial(context_attend, method=method, branches=branches, kernels=kernels)
        mapped = on_mesh(call, mesh, ("BTH", "BTH", "BTH", masks, "BT"), "BTH")
        return in_order(mapped(*arguments), mesh)

    return function


def out_and_gradients(function, queries, k, v, mask, scale):
    weights = np.random.default_rng(1).standard_normal((2, queries[0].shape[1], 4, 6))

    def loss(queries, k, v, scale):
        out = function(queries, k, v, mask, scale)
        return jnp.sum(out * weights.astype(np.float32)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(
        queries, k, v, scale
    )
    return out, gradients


@functools.cache
def truth(kind):
    return out_and_gradients(unsharded, *random_case(KINDS[kind]))


@case(
    *(("context:8", "ring", kind) for kind in KINDS),
    *(
        (mesh, "gather", kind)
        for mesh in ("context:2", "context:8")
        for kind in ("all at once", "all of dual chunk")
    ),
    *(
        (mesh, "ring", kind)
        for mesh in MESHES[:-1]
        for kind in ("all at once", "all of dual chunk")
    ),
)
def attention_and_gradients(mesh, method, kind):
    all_close(out_and_gradients(sharded(mesh, method), *random_case(KINDS[kind])), truth(kind))


@case(
    ("ring", "all of one softmax"),
    ("ring", "padded dual chunk"),
    ("gather", "padded dual chunk"),
)
def attention_and_gradients_by_kernels(method, kind):
    """By those of TPUs in the interpreter, which want 128 queries and slots that follow on."""
    parts = {
        "all of one softmax": ("padding", "segments", "window", "scale"),
        "padded dual chunk": ("padding", "dual", "scale"),
    }[kind]
    arguments = random_case(parts, 256)
    kernels = Kernels("tpu", interpret=True)
    ran = []
    splash_attend = choose.splash_attend
    choose.splash_attend = lambda *a, **b: ran.append(1) or splash_attend(*a, **b)
    try:
        got = out_and_gradients(sharded("context:2", method, kernels), *arguments)
    finally:
        choose.splash_attend = splash_attend
    assert ran
    all_close(got, out_and_gradients(unsharded, *arguments))


@case(*((method, kind) for method in METHODS for kind in ("causal", "dual chunk")))
def bfloat16(method, kind):
    queries, k, v, *rest = random_case(KINDS[kind])
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (queries, k, v))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    want = out_and_gradients(unsharded, *exact, *rest)
    got = out_and_gradients(sharded("context:8", method), *arrays, *rest)
    for x, y in zip(jax.tree.leaves(got)[:-1], jax.tree.leaves(want)[:-1], strict=True):
        assert x.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(x, np.float32) - y)
        # Weights, each branch's result and the whole are rounded to 8 bits.
        assert error < 2.0**-7 * np.linalg.norm(y), error / np.linalg.norm(y)


@case(
    ("context:2", 1, "causal"),
    ("context:4,tensor:2", 3, "all of dual chunk"),
    ("fsdp:2,context:4", 1, "window"),
    ("context:8", 1, "dual chunk"),
    ("context:8", 3, "padding"),
)
def few_queries_over_a_cache(mesh, T, kind):
    """The next T tokens of rows with lengths of their own."""
    queries, k, v, mask, scale = random_case(KINDS[kind], T, 48)
    slots = (np.array([[48], [29]]) - T + np.arange(T)).astype(np.int32)
    mask = mask.replace(query_slots=slots, key_slots=None)
    if mask.query_groups is not None:
        mask = mask.replace(query_groups=slots // 7)
    call = functools.partial(cache_attend, branches=branches_of(mask))
    in_axes = "B.H", "BTH", "BTH", axes_of(mask, "B", "BT"), "B"
    mapped = on_mesh(call, mesh, in_axes, "B.H")
    arguments = queries, k, v, mask, scale
    close(jax.jit(mapped)(*arguments), jax.jit(unsharded)(*arguments))


@case(("context:2", "ring"), ("context:8", "ring"), ("context:8", "gather"))
def many_queries_over_a_cache(mesh, method):
    """The call's tokens enter the cache and attend to it and to one another."""
    T, S = 32, 80
    queries, k, v, mask, scale = random_case(("dual", "scale"), T, S)
    new_k, new_v = k[:, :T], v[:, :T]
    # Row 1 has a shorter text, and padding behind it.
    slots = np.array([[S - T], [23]], np.int32) + np.arange(T, dtype=np.int32)
    slots[1, -5:] = S
    mask = mask.replace(query_slots=slots, query_groups=slots // 7)

    def whole(k, v, new_k, new_v):
        k, v = write_slots(k, slots, new_k), write_slots(v, slots, new_v)
        return k, v, unsharded(queries, k, v, mask, scale)

    def shard(k, v, new_k, new_v, queries, mask, scale, axis_name):
        k, v = (
            write_travelling_slots(buffer, mask.query_slots, new, axis_name=axis_name)
            for buffer, new in ((k, new_k), (v, new_v))
        )
        out = context_attend(
            queries,
            k,
            v,
            mask,
            scale,
            axis_name=axis_name,
            method=method,
            branches=BRANCHES,
            zigzag_keys=False,
        )
        return k, v, out

    of_keys = {name: getattr(mask, name) for name in ("key_groups", "key_slots")}
    call = laid_out((new_k, new_v, queries, mask.replace(**dict.fromkeys(of_keys)), scale), mesh)
    new_k, new_v, queries_there, mask_there, scale_there = call
    in_axes = *["BTH"] * 5, axes_of(mask, "BT", "BT"), "BT"
    mapped = on_mesh(shard, mesh, in_axes, ("BTH", "BTH", "BTH"))
    got = jax.jit(mapped)(
        k, v, new_k, new_v, queries_there, mask_there.replace(**of_keys), scale_there
    )
    want = jax.jit(whole)(k, v, *in_order((new_k, new_v), mesh))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    close(in_order(got[2], mesh), want[2])


@case(("context:2",), ("context:8",))
def slots_are_written_where_they_are(mesh):
    rng = np.random.default_rng(3)
    buffer = rng.standard_normal((2, 16, 3)).astype(np.float32)
    new = rng.standard_normal((2, 16, 3)).astype(np.float32)
    slots = np.stack([rng.permutation(40)[:16], 3 + np.arange(16)]).astype(np.int32)
    want = write_slots(jnp.asarray(buffer), slots, new)
    assert (np.asarray(want) != buffer).any() and (slots >= 16).any()
    own = on_mesh(write_own_slots, mesh, ("BT", "B", "B"), "BT")
    np.testing.assert_array_equal(jax.jit(own)(buffer, slots, new), want)
    travelling = on_mesh(write_travelling_slots, mesh, ("BT", "BT", "BT"), "BT")
    np.testing.assert_array_equal(jax.jit(travelling)(buffer, *laid_out((slots, new), mesh)), want)


@case(*((gradient, dual) for gradient in (False, True) for dual in (False, True)))
def the_ring_holds_no_whole_text(gradient, dual):
    attend_file._BLOCK = attend_file._BLOCK_OF_FEW = 16
    T, d = 2048, 16
    x = jax.ShapeDtypeStruct((1, T, 1, d), jnp.float32)
    slots = jax.ShapeDtypeStruct((1, T), jnp.int32)
    groups = slots if dual else None

    def largest(method):
        def function(queries, k, v, slots, groups):
            mask = Mask(slots, None, groups, groups, slots, slots, slots, window=1500)
            call = functools.partial(context_attend, method=method, branches=branches_of(mask))
            in_axes = "BTH", "BTH", "BTH", axes_of(mask, "BT", "BT")
            return on_mesh(call, "context:8", in_axes, "BTH")(queries, k, v, mask)

        def loss(*arguments):
            return jnp.sum(jnp.square(function(*arguments)))

        measured = jax.grad(loss, (0, 1, 2)) if gradient else function
        queries = (x,) * (3 if dual else 1)
        shapes = list(arrays_in(jax.jit(measured).lower(queries, x, x, slots, groups).compile()))
        return max(map(np.prod, shapes)), max(map(max, shapes))

    size, axis = largest("ring")
    assert size <= 2 * T * d // 8, size
    assert axis <= T // 8 + 16, axis
    # The measure sees what it should.
    size, axis = largest("gather")
    assert size >= T * d and axis == T


@case()
def zigzag_shares_the_work_out_evenly():
    tiles = np.zeros(8, int)
    tile = attend_file._tile

    def counted(*arguments):
        def count(shard):
            tiles[shard] += 1

        jax.debug.callback(count, jax.lax.axis_index("context"))
        return tile(*arguments)

    attend_file._tile = counted

    def tiles_of(layout):
        """Blocks of scores that each shard computes of a text of 128 tokens in blocks of 4."""
        tiles[:] = 0
        queries, k, v, mask, scale = random_case((), 128)
        arguments = jax.tree.map(lambda x: x[:, layout], (queries, k, v, mask, scale))
        in_axes = "BTH", "BTH", "BTH", axes_of(mask, "BT", "BT"), "BT"
        ring = functools.partial(context_attend, method="ring")
        out = jax.jit(on_mesh(ring, "context:8", in_axes, "BTH"))(*arguments)
        jax.block_until_ready(out)
        jax.effects_barrier()
        return tiles.tolist()

    try:
        even, uneven = tiles_of(zigzag(128, 8)), tiles_of(np.arange(128))
    finally:
        attend_file._tile = tile
    # All pairs of blocks up to the diagonal, and no others.
    assert sum(even) == sum(uneven) == 32 * 33 // 2
    assert max(even) - min(even) <= 1, even
    assert max(uneven) > 10 * min(uneven), uneven


def random_tokens(T, padded, B=2, K=2, G=2, d=4, e=6):
    """Arguments of the delta rule; the rows' last tokens are padding where `padded`."""
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((2, B, T, K, d))
    v = rng.standard_normal((B, T, K * G, e))
    log_decay = -0.3 * rng.random((B, T, K * G))
    beta = rng.random((B, T, K * G))
    if padded:
        real = (np.arange(T) < np.array([[T], [T - T // 3]]))[..., None]
        log_decay, beta = log_decay * real, beta * real
    state = rng.standard_normal((B, K * G, d, e))
    return tuple(x.astype(np.float32) for x in (q, k, v, log_decay, beta, state))


@case(
    ("context:2", 4, "plain"),
    ("context:4,tensor:2", 40, "texts"),
    ("fsdp:2,context:4", 40, "padding"),
    ("context:8", 80, "plain"),
    ("context:8", 80, "texts"),
    ("context:8", 16, "texts"),
)
def delta_rule_and_gradients(mesh, T, kind):
    arguments = random_tokens(T, kind == "padding")
    rng = np.random.default_rng(5)
    weights = [rng.standard_normal(arguments[i].shape).astype(np.float32) for i in (2, 5)]
    segments = None
    if kind == "texts":
        segments = np.sort(rng.integers(0, 5, (2, T)), axis=1).astype(np.int32)

    def whole(*arguments):
        starts = None if segments is None else segment_starts(segments)
        return gated_delta_rule(*arguments, starts)

    def shared(*arguments):
        tokens = laid_out((*arguments[:5], segments), mesh)
        in_axes = *["BTH"] * 5, "BH", None if segments is None else "BT"
        mapped = on_mesh(sharded_delta_rule, mesh, in_axes, ("BTH", "BH"))
        out, state = mapped(*tokens[:5], arguments[5], tokens[5])
        return in_order(out, mesh), state

    def results(function):
        def loss(*arguments):
            both = function(*arguments)
            return sum(jnp.sum(x * w) for x, w in zip(both, weights, strict=True)), both

        return jax.jit(jax.value_and_grad(loss, tuple(range(6)), has_aux=True))(*arguments)

    got, want = results(shared), results(whole)
    if kind == "texts":
        # Where every row begins another text, what was before it has no influence.
        assert (np.diff(segments) > 0).any(axis=1).all()
        np.testing.assert_array_equal(want[1][5] == 0, got[1][5] == 0)
    all_close(got, want)


@case(
    ("context:2", 24, 4, "plain"),
    ("context:4,tensor:2", 40, 4, "texts"),
    ("fsdp:2,context:4", 40, 2, "lengths"),
    ("context:8", 80, 4, "lengths"),
    ("context:8", 80, 4, "texts"),
    ("context:8", 16, 4, "texts"),
    ("context:8", 16, 4, "lengths"),
    ("context:8", 16, 1, "plain"),
)
def convolution_and_gradients(mesh, T, taps, kind):
    rng = np.random.default_rng(6)
    B = 6
    x = rng.standard_normal((B, T, 10)).astype(np.float32)
    weight = rng.standard_normal((10, taps)).astype(np.float32)
    state = rng.standard_normal((B, taps - 1, 10)).astype(np.float32)
    lengths = segments = None
    if kind == "lengths":
        # None, fewer than the convolution keeps, across the edge of a chunk, and all.
        lengths = np.array([0, 1, 2, T // 2 + 1, T - 3, T], np.int32)
    if kind == "texts":
        segments = np.sort(rng.integers(0, 9, (B, T)), axis=1).astype(np.int32)
    weights = rng.standard_normal(x.shape), rng.standard_normal(state.shape)

    def shared(x, weight, state):
        in_axes = "BTH", "H", "B.H", None if lengths is None else "B"
        in_axes = *in_axes, None if segments is None else "BT"
        mapped = on_mesh(sharded_causal_conv, mesh, in_axes, ("BTH", "B.H"))
        x, there = laid_out((x, segments), mesh)
        y, state = mapped(x, weight, state, lengths, there)
        return in_order(y, mesh), state

    def results(function):
        def loss(*arguments):
            both = function(*arguments)
            parts = zip(both, weights, strict=True)
            return sum(jnp.sum(x * w.astype(np.float32)) for x, w in parts), both

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, weight, state)

    got = results(shared)
    want = results(lambda *arguments: causal_conv(*arguments, lengths, segments))
    np.testing.assert_array_equal(got[0][1][1], want[0][1][1])
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if y.size:
            close(x, y)


@pytest.mark.parametrize("name", CASES)
def test_on_8_devices(name, failures):
    assert failures[name] is None, failures[name]


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_zigzag_pairs_an_early_chunk_with_a_late_one(shards):
    order = zigzag(48, shards)
    np.testing.assert_array_equal(np.sort(order), np.arange(48))
    np.testing.assert_array_equal(order[unzigzag(48, shards)], np.arange(48))
    # A token's causal work is its place, so that the sums of all shards are the same.
    assert len(set(order.reshape(shards, -1).sum(axis=1))) == 1


def test_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="give a multiple of 16"):
        zigzag(40, 8)
    x = jnp.zeros((1, 4, 1, 8))
    slots = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="give 'ring' or 'gather'"):
        context_attend((x,), x, x, Mask(slots), axis_name="context", method="star")
    with pytest.raises(ValueError, match="give key_slots"):
        context_attend((x,), x, x, Mask(slots), axis_name="context")


def main(path, *names):
    """Runs the cases of these names, or all, and writes what failed to `path`."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    failures = {}
    for name in names or CASES:
        # Several blocks in a short text.
        attend_file._BLOCK = attend_file._BLOCK_OF_FEW = 4
        try:
            CASES[name]()
            failures[name] = None
        except Exception:
            failures[name] = traceback.format_exc(limit=-4)
    Path(path).write_text(json.dumps(failures))


if __name__ == "__main__":
    main(*sys.argv[1:])
