"""Kernels of accelerators against `attend`, in Pallas's interpreter, and compiled for TPUs."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.nn.attend import Mask, Relation, attend, gradients_of_part
from qwen_jax.nn.cache import write_slots
from qwen_jax.nn.kernels import splash
from qwen_jax.nn.kernels.choose import Choice, Kernels
from qwen_jax.nn.kernels.cudnn import cudnn_attend, why_not_cudnn
from qwen_jax.nn.kernels.paged import (
    PAGE,
    PagedKeyValues,
    init_pages,
    kernel_heads,
    paged_attend,
    read_pages,
    why_not_paged,
    write_pages,
)
from qwen_jax.nn.kernels.splash import (
    splash_attend,
    splash_gradients_of_part,
    why_not_splash,
)
from qwen_jax.sharding.aot import has_compiler, make_mesh
from qwen_jax.sharding.axes import MESH_AXES
from qwen_jax.sharding.chips import read_topology

LOWEST = np.finfo(np.float32).min
plain_attend = functools.partial(attend, method="plain")


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in a short text, the last one not full."""
    monkeypatch.setattr(splash, "_BLOCK", 128)


def random_qkv(rng, T, S, heads=(4, 2), d=16, dtype=jnp.float32, B=2):
    H, K = heads
    shapes = (B, T, H, d), (B, S, K, d), (B, S, K, d)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


# Splash: masks of T queries and S keys in two rows, and what is promised of them.
T, S = 140, 300
IN_ORDER = np.tile(np.arange(T), (2, 1))
# The first row goes on in its cache; the second begins, behind padding whose slot is past the end.
IN_CACHE = np.stack([np.arange(T) + 100, np.r_[np.full(20, S), np.arange(T - 20)]])
GROUPS = np.stack([np.arange(S) // 60, np.arange(S) // 90])


def holes(rng):
    valid = rng.random((2, S)) < 0.7
    valid[1, :5] = False
    return valid


def masks(rng):
    """Name -> mask and promises."""
    segments = np.sort(rng.integers(0, 4, (2, S)), axis=1)
    of_queries = [np.take_along_axis(x, np.minimum(IN_CACHE, S - 1), 1) for x in (segments, GROUPS)]
    order, keys = {"in_order": True}, {"keys_in_order": True}

    def groups(relation):
        return Mask(IN_CACHE, None, of_queries[1], GROUPS, relation=relation)

    return {
        "in order, window and holes": (Mask(IN_ORDER, holes(rng), window=50), order),
        "in order, segments": (
            Mask(IN_ORDER, query_segments=segments[:, :T], key_segments=segments),
            order,
        ),
        "in a cache, window and holes": (Mask(IN_CACHE, holes(rng), window=37), {}),
        "in a cache, segments": (
            Mask(IN_CACHE, holes(rng), query_segments=of_queries[0], key_segments=segments),
            {},
        ),
        "keys of a later part": (
            Mask(IN_CACHE, key_slots=np.array([[110], [40]]) + np.arange(S), window=90),
            keys,
        ),
        "same group": (groups(Relation.SAME), {}),
        "group before": (groups(Relation.PREVIOUS), {}),
        "older groups": (groups(Relation.OLDER), keys),
    }


def results_and_gradients(function, q, k, v, attention_mask, scale, weights):
    """Out, lse, and the gradients of a random linear form of both."""

    def loss(q, k, v, scale):
        out, lse = function(q, k, v, attention_mask, scale)
        form = jnp.sum(out * weights[0]) + jnp.sum(jnp.where(lse > LOWEST, lse, 0) * weights[1])
        return form, (out, lse)

    gradients, results = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, scale)
    return dict(
        zip(("out", "lse", "d_q", "d_k", "d_v", "d_scale"), results + gradients, strict=True)
    )


def check(got, want, name=""):
    """Equal to 1e-5, and to 1e-6 of the largest number."""
    assert np.isfinite(got).all(), name
    largest = np.abs(np.where(want == LOWEST, 0, want)).max()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * largest, err_msg=name)


@pytest.mark.parametrize("kind", masks(np.random.default_rng(0)))
def test_splash_equals_attend_under_every_mask(kind, small_blocks):
    rng = np.random.default_rng(1)
    attention_mask, promises = masks(rng)[kind]
    q, k, v = random_qkv(rng, T, S)
    scale = rng.uniform(0.2, 0.5, (2, T)).astype(np.float32)
    got = splash_attend(q, k, v, attention_mask, scale, **promises, interpret=True)
    want = plain_attend(q, k, v, attention_mask, scale)
    if any(word in kind for word in ("holes", "later", "before", "older")):
        assert (want[1] == LOWEST).any(), "a query that sees no key should be among these"
    for name, x, y in zip(("out", "lse"), got, want, strict=True):
        check(x, y, name)


@pytest.mark.parametrize("kind", ["in order, window and holes", "in a cache, segments"])
def test_splash_gradients_equal_those_of_attend(kind, small_blocks):
    rng = np.random.default_rng(1)
    attention_mask, promises = masks(rng)[kind]
    q, k, v = random_qkv(rng, T, S)
    scale = rng.uniform(0.2, 0.5, (2, T)).astype(np.float32)
    weights = rng.standard_normal((2, T, 4, 16)), rng.standard_normal((2, T, 4))
    kernel = functools.partial(splash_attend, **promises, interpret=True)
    got, want = (
        results_and_gradients(f, q, k, v, attention_mask, scale, weights)
        for f in (kernel, plain_attend)
    )
    assert (want["lse"] == LOWEST).any(), "a query that sees no key should be among these"
    for name in want:
        check(got[name], want[name], name)


@pytest.mark.parametrize("promises", [{"in_order": True}, {}])
def test_splash_does_not_read_blocks_that_no_query_sees(promises, small_blocks):
    """NaN spreads through any product, so that a block with NaN shows whether it was skipped."""
    rng = np.random.default_rng(2)
    q, k, v = random_qkv(rng, 256, 512)
    start = 0 if promises else 256
    attention_mask = Mask(np.tile(np.arange(256) + start, (2, 1)), window=None if promises else 100)
    want = plain_attend(q, k, v, attention_mask)
    unseen = slice(256, None) if promises else slice(0, 128)
    k, v = (x.at[:, unseen].set(jnp.nan) for x in (k, v))
    got = splash_attend(q, k, v, attention_mask, **promises, interpret=True)
    check(got[0], want[0])
    # Texts in a row by themselves: each block of queries has its own block of keys.
    if not promises:
        q, k, v = random_qkv(rng, 256, 256)
        slots, texts = np.tile(np.arange(256), (2, 1)), np.tile(np.arange(256) // 128, (2, 1))
        attention_mask = Mask(slots, query_segments=texts, key_segments=texts)
        want = plain_attend(q, k, v, attention_mask)
        v = v.at[:, :128].set(jnp.nan)
        got = splash_attend(q, k, v, attention_mask, interpret=True)
        check(got[0][:, 128:], want[0][:, 128:])


def test_splash_gradients_of_parts_add_up_to_those_of_the_whole(small_blocks):
    rng = np.random.default_rng(3)
    q, k, v = random_qkv(rng, T, S)
    scale = rng.uniform(0.2, 0.5, (2, T)).astype(np.float32)
    whole = Mask(IN_CACHE, holes(rng), window=170)
    results = plain_attend(q, k, v, whole, scale)
    cotangents = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in results]
    want = gradients_of_part(q, k, v, whole, scale, results, cotangents)
    half = S // 2
    parts = []
    kernel = jax.jit(
        functools.partial(splash_gradients_of_part, keys_in_order=True, interpret=True)
    )
    for part in (slice(0, half), slice(half, S)):
        key_slots = np.tile(np.arange(S)[part], (2, 1))
        attention_mask = whole.replace(key_valid=whole.key_valid[:, part], key_slots=key_slots)
        given = (q, k[:, part], v[:, part], attention_mask, scale, results, cotangents)
        parts.append(kernel(*given))
    (d_q, d_scale, *first), (more_q, more_scale, *second) = parts
    d_keys = (jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    for got, expected in zip((d_q + more_q, d_scale + more_scale, *d_keys), want, strict=True):
        check(got, expected)


@pytest.mark.parametrize("d, more", [(64, 1.02), (128, 2**0.5)])
def test_splash_in_bfloat16_is_as_close_to_the_truth_as_attend(d, more, small_blocks):
    """Results as plain ones; gradients as those block by block.

    With 128 numbers a head the scale is no power of two. Then queries are rounded once more, and
    their gradients, which adds an error of the same size to the one there is.
    """
    rng = np.random.default_rng(4)
    q, k, v = random_qkv(rng, 200, 200, d=d, dtype=jnp.bfloat16)
    slots = np.tile(np.arange(200), (2, 1))
    weights = rng.standard_normal((2, 200, 4, d)), np.zeros((2, 200, 4))
    scale = np.full((2, 200), d**-0.5, np.float32)
    splash, plain, blockwise = (
        results_and_gradients(f, q, k, v, Mask(slots), scale, weights)
        for f in (
            functools.partial(splash_attend, in_order=True, interpret=True),
            plain_attend,
            functools.partial(attend, method="blockwise"),
        )
    )
    in_float32 = (x.astype(jnp.float32) for x in (q, k, v))
    truth = results_and_gradients(plain_attend, *in_float32, Mask(slots), scale, weights)

    def error(results, name):
        return np.linalg.norm(np.asarray(results[name], np.float32) - truth[name])

    assert 0 < error(splash, "out") < error(plain, "out")
    for name in ("d_q", "d_k", "d_v"):
        assert 0 < error(splash, name) < more * error(blockwise, name)


def test_splash_says_why_it_cannot():
    slots = np.zeros((1, 1), np.int32)
    groups = {"query_groups": slots, "key_groups": slots}
    texts = {"query_segments": slots, "key_segments": slots}

    def reason(T=1, S=1, dtype=jnp.bfloat16, promise=True, **parts):
        return why_not_splash(T, S, dtype, Mask(slots, **parts), promise)

    assert reason() is None
    assert reason(T=1 << 17, S=1 << 17) is None
    assert "scalar memory" in reason(T=1 << 18, S=1 << 18)
    assert "float16" in reason(dtype=jnp.float16)
    assert reason(key_slots=slots) is None
    assert "gaps" in reason(key_slots=slots, promise=False)
    assert reason(**groups, relation=Relation.SAME, promise=False) is None
    assert "first ones" in reason(**groups, relation=Relation.OLDER, promise=False)
    assert "one number" in reason(**groups, **texts, relation=Relation.SAME)
    assert "window" in reason(**groups, relation=Relation.OLDER, window=2)
    q, k, v = random_qkv(np.random.default_rng(5), 1, 1, B=1)
    with pytest.raises(ValueError, match="may have gaps"):
        splash_attend(q, k, v, Mask(slots, key_slots=slots))


# What four rows of a cache hold before a call, and the call's tokens: True for those that are real.
FILLED = np.array([0, 5, 17, 0])
CALLS = {
    "one token": np.array([[1], [1], [1], [0]], bool),
    "padding left": np.array([[0, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0]], bool),
    "padding right": np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]], bool),
}


def paged_call(rng, real, heads, d, dtype, window=None, scale=None):
    """Results of `paged_attend` and of `attend`, in the dtype and in float32."""
    (_, K), capacity, (B, T) = heads, 32, real.shape
    slots = np.where(real, FILLED[:, None] + np.cumsum(real, axis=1) - 1, capacity)
    q, k, v = random_qkv(rng, T, T, heads, d, dtype, B)
    old = random_qkv(rng, 1, capacity, heads, d, dtype, B)[1:]
    everywhere = np.tile(np.arange(capacity), (B, 1))
    # What a cache holds behind its end is left from other texts, and may be any number.
    pages = PagedKeyValues(jnp.full_like(init_pages(B, capacity, K, d, dtype).pages, 1e4))
    filled = np.where(everywhere < FILLED[:, None], everywhere, capacity)
    pages = write_pages(write_pages(pages, filled, *old), slots, k, v)
    arrays = [
        write_slots(write_slots(jnp.zeros_like(x), filled, x), slots, new)
        for x, new in zip(old, (k, v), strict=True)
    ]
    got = jax.jit(paged_attend, static_argnums=(3, 4))(q, pages, slots, K, window, scale)
    wants = [
        plain_attend(*(x.astype(kind) for x in (q, *arrays)), Mask(slots, window=window), scale)[0]
        for kind in (dtype, jnp.float32)
    ]
    return got, *(jnp.where(real[..., None, None], want, 0) for want in wants)


@pytest.mark.parametrize("kind", ["one token", "padding right"])
def test_paged_attention_equals_attend(kind, interpreter, small_pages):
    rng = np.random.default_rng(6)
    got, want, _ = paged_call(rng, CALLS[kind], (4, 2), 128, jnp.float32)
    check(got, want)


def test_paged_attention_with_fewer_heads_and_numbers_than_the_kernel_takes(
    interpreter, small_pages
):
    rng = np.random.default_rng(7)
    scale = jnp.asarray(rng.uniform(0.2, 0.5, (4, 1)), jnp.float32)
    real = CALLS["one token"]
    got, want, _ = paged_call(rng, real, (6, 3), 64, jnp.float32, window=7, scale=scale)
    check(got, want)


def test_paged_attention_in_bfloat16_is_as_close_to_the_truth_as_plain(interpreter, small_pages):
    real = CALLS["padding left"]
    got, plain, truth = (
        np.asarray(x, np.float32)
        for x in paged_call(np.random.default_rng(8), real, (6, 3), 64, jnp.bfloat16)
    )
    assert 0 < np.linalg.norm(got - truth) < 1.02 * np.linalg.norm(plain - truth)


def test_pages_hold_what_was_written():
    rng = np.random.default_rng(9)
    _, k, v = random_qkv(rng, 1, 3, (6, 3), 64, B=2)
    cache = init_pages(2, 2 * PAGE, 3, 64, jnp.float32)
    assert (cache.pages.shape, cache.capacity) == ((2, 2, PAGE, 8, 128), 2 * PAGE)
    slots = np.array([[0, 200, 2 * PAGE], [127, 128, 129]])
    got = read_pages(jax.jit(write_pages)(cache, slots, k, v), 3, 64)
    for x, new in zip(got, (k, v), strict=True):
        np.testing.assert_array_equal(x, write_slots(jnp.zeros((2, 256, 3, 64)), slots, new))


def test_each_shard_of_heads_fills_up_its_own():
    whole = init_pages(1, PAGE, 20, 128, jnp.bfloat16, head_shards=4).pages
    shard = init_pages(1, PAGE, 5, 128, jnp.bfloat16).pages
    assert whole.shape[3] == 4 * shard.shape[3] == 4 * 2 * 8


# Query heads, key heads and head size of the released models.
RELEASED = [
    *[(12, 2, 128), (14, 2, 64), (16, 2, 128), (16, 8, 128), (16, 16, 64), (16, 16, 128)],
    *[(20, 20, 128), (28, 4, 128), (32, 4, 128), (32, 8, 128), (32, 32, 128), (40, 8, 128)],
    *[(40, 40, 128), (64, 4, 128), (64, 8, 128), (64, 64, 128), (96, 8, 128)],
    *[(8, 2, 256), (16, 2, 256), (16, 4, 256), (24, 4, 256), (32, 2, 256)],
]


def test_pages_say_why_they_cannot():
    for H, K, d in RELEASED:
        reason = why_not_paged(H, K, d, jnp.bfloat16)
        assert ("head_dim is 256" in reason) if d == 256 else reason is None
        assert kernel_heads(K, jnp.bfloat16) == (24 if K == 20 else K)
    assert [kernel_heads(K, jnp.bfloat16) for K in (1, 3, 5, 12)] == [1, 4, 8, 16]
    assert [kernel_heads(K, jnp.float32) for K in (1, 2, 3, 5, 12)] == [1, 2, 4, 8, 12]
    assert "odd" in why_not_paged(16, 16, 128, jnp.float32)
    assert "float16" in why_not_paged(8, 8, 128, jnp.float16)
    assert "multiple" in why_not_paged(8, 8, 128, jnp.bfloat16, 1, PAGE + 1)
    assert "scalar memory" in why_not_paged(8, 8, 128, jnp.bfloat16, 1024, 1024 * PAGE)


CUDNN = {
    "in order": (Mask(np.tile(np.arange(9), (3, 1))), True),
    "in order, window": (Mask(np.tile(np.arange(9), (3, 1)), window=4), True),
    "in order, padding last": (
        Mask(np.tile(np.arange(9), (3, 1)), np.arange(13) < [[13], [5], [0]]),
        True,
    ),
    "one query": (Mask(np.array([[3], [12], [13]])), False),
    "one query, padding last": (
        Mask(np.array([[3], [12], [7]]), np.arange(13) < [[13], [5], [0]]),
        False,
    ),
}


@pytest.mark.parametrize("kind", CUDNN)
def test_what_cudnn_is_told_means_the_mask(kind):
    rng = np.random.default_rng(10)
    attention_mask, in_order = CUDNN[kind]
    n = attention_mask.query_slots.shape[1]
    assert (
        why_not_cudnn(n, 16, jnp.bfloat16, attention_mask.replace(key_valid=None), in_order, 8.0)
        is None
    )
    q, k, v = random_qkv(rng, n, 13, B=3)
    for scale in (None, 0.3, jnp.asarray(rng.uniform(0.2, 0.5, (3, n)), jnp.float32)):
        got = cudnn_attend(q, k, v, attention_mask, scale, in_order, implementation="xla")
        want, _ = plain_attend(q, k, v, attention_mask, scale)
        check(got, want)


def test_cudnn_says_why_it_cannot():
    slots = np.zeros((1, 1), np.int32)

    def reason(T=8, d=128, dtype=jnp.bfloat16, in_order=True, capability=8.0, **parts):
        return why_not_cudnn(T, d, dtype, Mask(slots, **parts), in_order, capability)

    assert reason() is None
    assert reason(dtype=jnp.float16, window=4) is None
    assert reason(d=256, capability=9.0) is None
    assert reason(T=1, in_order=False) is None
    assert "head_dim 256" in reason(d=256)
    assert "head_dim 100" in reason(d=100)
    assert "7.5" in reason(capability=7.5)
    assert "float32" in reason(dtype=jnp.float32)
    assert "places" in reason(in_order=False)
    assert "window" in reason(T=1, in_order=False, window=4)
    assert "padding" in reason(window=4, key_valid=slots)
    assert "segments" in reason(query_segments=slots, key_segments=slots)
    assert "groups" in reason(query_groups=slots, key_groups=slots, relation=Relation.SAME)
    assert "own" in reason(T=1, in_order=False, key_slots=slots)


@pytest.mark.parametrize(
    "kind, mask_type, window",
    [
        ("in order", "CAUSAL", 0),
        ("in order, window", "CAUSAL", 4),
        ("in order, padding last", "PADDING_CAUSAL", 0),
        ("one query", "PADDING", 0),
    ],
)
def test_cudnn_is_called_with_the_mask(kind, mask_type, window):
    """Lowered for a GPU that is not there."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    attention_mask, in_order = CUDNN[kind]
    n = attention_mask.query_slots.shape[1]
    q, k, v = random_qkv(np.random.default_rng(11), n, 13, d=64, dtype=jnp.bfloat16, B=3)
    function = functools.partial(cudnn_attend, in_order=in_order)
    with mock.patch.object(fused, "check_cudnn_version", lambda: 90100):
        traced = jax.jit(function).trace(q, k, v, attention_mask)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert f"mask_type\\22: \\22{mask_type}\\22" in text
    assert f"sliding_window_length\\22: {window}" in text


def test_the_platforms_kernel_is_chosen_where_it_can():
    q, k = (jax.ShapeDtypeStruct((2, 512, h, 128), jnp.bfloat16) for h in (16, 8))
    few = jax.ShapeDtypeStruct((2, 1, 16, 128), jnp.bfloat16)
    slots = np.zeros((2, 1), np.int32)
    simple, padded = Mask(slots), Mask(slots, slots)
    tpu, gpu = Kernels("tpu"), Kernels("gpu", 9.0, in_order=True)
    only_out = {"needs_lse": False}
    assert tpu.choose(q, k, simple) == Choice("splash")
    assert tpu.choose(q, k, padded) == Choice("splash")
    assert gpu.choose(q, k, simple, **only_out) == Choice("cudnn")
    last = dataclasses.replace(gpu, padding_last=True)
    assert last.choose(q, k, padded, **only_out) == Choice("cudnn")
    reasons = {
        "no kernel for cpu": Kernels().choose(q, k, simple),
        "do not fill": tpu.choose(few, k, simple),
        "gaps": tpu.choose(q, k, simple.replace(key_slots=slots)),
        "before tokens": gpu.choose(q, k, padded, **only_out),
        "rounded": gpu.choose(q, k, simple),
        "places": Kernels("gpu", 9.0).choose(q, k, simple, **only_out),
        "below 8.0": Kernels("gpu", in_order=True).choose(q, k, simple, **only_out),
    }
    for words, choice in reasons.items():
        assert choice.method == "auto" and words in choice.reason


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs libtpu")
# Programs for TPUs go into JAX's cache, and cannot be read back without one.
not_from_cache = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


def compile_for(topology, function, *shapes, donate=()):
    """`function` on one chip's shards, compiled; shapes are (shape, dtype)."""
    topology = read_topology(topology)
    sizes = dict.fromkeys(MESH_AXES, 1) | {"data": topology.num_chips}
    everywhere = jax.sharding.PartitionSpec()
    mesh = make_mesh(topology, sizes)
    sharding = jax.sharding.NamedSharding(mesh, everywhere)
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    function = jax.shard_map(
        function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
    )
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()


@needs_compiler
@not_from_cache
@pytest.mark.parametrize(
    "topology, d, dtype, in_order",
    [
        ("v5e:1x1", 128, jnp.bfloat16, True),
        ("v5p:2x2x1", 64, jnp.bfloat16, True),
        ("v6e:1x1", 256, jnp.bfloat16, False),
    ],
)
def test_splash_and_its_gradients_compile_for_tpus(topology, d, dtype, in_order):
    B, T, S = 2, 1024, 2048

    def loss(q, k, v, slots, valid):
        attention_mask = Mask(slots, valid, window=700)
        out, lse = splash_attend(q, k, v, attention_mask, in_order=in_order)
        return out.astype(jnp.float32).sum() + lse.sum()

    compiled = compile_for(
        topology,
        jax.value_and_grad(loss, argnums=(0, 1, 2)),
        ((B, T, 4, d), dtype),
        ((B, S, 2, d), dtype),
        ((B, S, 2, d), dtype),
        ((B, T), jnp.int32),
        ((B, S), jnp.bool_),
    )
    text = compiled.as_text()
    for phase in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{phase}" in text


@needs_compiler
@not_from_cache
@pytest.mark.parametrize(
    "topology, heads",
    [
        ("v5e:1x1", (14, 2, 64)),
        ("v5e:1x1", (20, 20, 128)),
        ("v5p:2x2x1", (16, 8, 128)),
        ("v6e:1x1", (28, 4, 128)),
    ],
)
def test_a_step_of_paged_decoding_compiles_without_a_copy_of_the_cache(topology, heads):
    B, S, (H, K, d), dtype = 8, 4096, heads, jnp.bfloat16

    def step(q, k, v, slots, pages):
        cache = write_pages(PagedKeyValues(pages), slots, k, v)
        return paged_attend(q, cache, slots, K), cache.pages

    pages = jax.eval_shape(functools.partial(init_pages, B, S, K, d, dtype)).pages
    compiled = compile_for(
        topology,
        step,
        ((B, 1, H, d), dtype),
        ((B, 1, K, d), dtype),
        ((B, 1, K, d), dtype),
        ((B, 1), jnp.int32),
        (pages.shape, dtype),
        donate=(4,),
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pages.size * pages.dtype.itemsize
    assert memory.temp_size_in_bytes < 1 << 20
