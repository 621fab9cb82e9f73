"""`attend` against a loop over queries and keys in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.nn import attend as attend_file
from qwen_jax.nn.attend import Mask, Relation, attend, gradients_of_part, merge

LOWEST = np.finfo(np.float32).min
METHODS = ("plain", "blockwise")
# Name of each kind of mask, and the parts of `random_mask` it has.
MASKS = {
    "causal": (),
    "rows begin in the cache": ("offset",),
    "padding left": ("left",),
    "padding right": ("right",),
    "holes": ("offset", "holes"),
    "window of 1": ("offset", 1),
    "window": ("offset", 5, "holes"),
    "padding past the end": ("past",),
    "same group": ("offset", Relation.SAME),
    "group before": ("offset", "holes", Relation.PREVIOUS),
    "older groups": ("offset", Relation.OLDER),
    "segments": ("offset", "holes", "segments"),
    "slots": ("slots", "holes"),
    "slots and window": ("slots", 5),
    "slots, segments and groups": ("slots", "segments", Relation.PREVIOUS),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a short text, the last one not full, of queries that are not few."""
    monkeypatch.setattr(attend_file, "_BLOCK", 8)
    monkeypatch.setattr(attend_file, "_BLOCK_OF_FEW", 8)
    monkeypatch.setattr(attend_file, "FEW_QUERIES", 4)


def random_mask(parts, T, S, rng):
    """A mask for two rows of T queries and S keys."""
    slots = np.tile(np.arange(T), (2, 1))
    if "offset" in parts:
        slots = np.stack([slots[0], slots[0] + S - T])
    if "past" in parts:
        slots = np.stack([np.where(slots[0] < 4, S, slots[0]), np.where(slots[0] > 9, S + 7, 3)])
    valid = None
    if "holes" in parts:
        valid = rng.random((2, S)) < 0.6
        valid[0, :3] = False
    if "left" in parts:
        valid = np.arange(S) >= np.array([[0], [6]])
    if "right" in parts:
        valid = np.arange(S) < np.array([[S], [S - 9]])
    key_slots = query_segments = key_segments = None
    if "slots" in parts:
        # Two runs that are not neighbours, and in the other row no order at all.
        key_slots = np.stack([np.r_[: S // 2, S : 2 * S - S // 2], rng.permutation(S)])
        slots = np.stack([key_slots[0, -T:], rng.integers(0, S, T)])
    if "segments" in parts:
        key_segments = np.sort(rng.integers(0, 4, (2, S)), axis=1)
        query_segments = np.take_along_axis(key_segments, np.minimum(slots, S - 1), axis=1)
    relation = next((part for part in parts if isinstance(part, Relation)), None)
    query_groups = key_groups = None
    if relation is not None:
        key_groups = np.stack([np.arange(S) // 7, np.sort(rng.integers(0, 5, S))])
        query_groups = np.take_along_axis(key_groups, np.minimum(slots, S - 1), axis=1)
    return Mask(
        query_slots=slots,
        key_valid=valid,
        query_groups=query_groups,
        key_groups=key_groups,
        key_slots=key_slots,
        query_segments=query_segments,
        key_segments=key_segments,
        window=next((part for part in parts if isinstance(part, int)), None),
        relation=relation,
    )


def sees(mask, b, t, s):
    slot = mask.query_slots[b, t]
    key_slot = s if mask.key_slots is None else mask.key_slots[b, s]
    if key_slot > slot or (mask.window is not None and slot - key_slot >= mask.window):
        return False
    if mask.key_segments is not None and mask.key_segments[b, s] != mask.query_segments[b, t]:
        return False
    if mask.key_valid is not None and not mask.key_valid[b, s]:
        return False
    if mask.relation is None:
        return True
    query, key = mask.query_groups[b, t], mask.key_groups[b, s]
    match mask.relation:
        case Relation.SAME:
            return key == query
        case Relation.PREVIOUS:
            return key == query - 1
        case Relation.OLDER:
            return key <= query - 2


def brute_force(q, k, v, mask, scale=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, d = q.shape
    scale = np.broadcast_to(d**-0.5 if scale is None else scale, (B, T))
    group = H // k.shape[2]
    out = np.zeros((B, T, H, v.shape[-1]))
    lse = np.full((B, T, H), float(LOWEST))
    for b, t in np.ndindex(B, T):
        seen = [s for s in range(k.shape[1]) if sees(mask, b, t, s)]
        for h in range(H) if seen else ():
            scores = k[b, seen, h // group] @ q[b, t, h] * scale[b, t]
            weights = np.exp(scores - scores.max())
            lse[b, t, h] = scores.max() + np.log(weights.sum())
            out[b, t, h] = (weights / weights.sum()) @ v[b, seen, h // group]
    return out, lse


def run(q, k, v, mask, scale=None, method="auto"):
    return jax.jit(functools.partial(attend, method=method))(q, k, v, mask, scale)


def random_qkv(rng, T=19, S=27, heads=(4, 2), d=8, dv=6):
    H, K = heads
    shapes = (2, T, H, d), (2, S, K, d), (2, S, K, dv)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def check(result, expected):
    for name, got, want in zip(("out", "lse"), result, expected, strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("few", [4, 100])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MASKS)
def test_equals_brute_force_under_every_mask(kind, method, few, monkeypatch):
    monkeypatch.setattr(attend_file, "FEW_QUERIES", few)
    rng = np.random.default_rng(0)
    q, k, v = random_qkv(rng)
    mask = random_mask(MASKS[kind], 19, 27, rng)
    expected = brute_force(q, k, v, mask)
    if kind in ("padding left", "holes", "group before", "older groups"):
        assert (expected[1] == LOWEST).any(), "a query that sees no key should be among these"
    check(run(q, k, v, mask, method=method), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (7, 1), (16, 2)])
def test_query_heads_share_key_heads_in_order(heads, method):
    rng = np.random.default_rng(1)
    q, k, v = random_qkv(rng, heads=heads)
    mask = random_mask(("offset",), 19, 27, rng)
    check(run(q, k, v, mask, method=method), brute_force(q, k, v, mask))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("T, S", [(1, 30), (3, 5), (8, 8), (17, 16), (40, 9)])
def test_any_length(T, S, method):
    rng = np.random.default_rng(2)
    q, k, v = random_qkv(rng, T, S)
    slots = rng.integers(0, S, (2, T))
    mask = Mask(slots, window=11)
    check(run(q, k, v, mask, method=method), brute_force(q, k, v, mask))


@pytest.mark.parametrize("method", METHODS)
def test_scale_by_number_and_by_query(method):
    rng = np.random.default_rng(3)
    q, k, v = random_qkv(rng)
    mask = random_mask((), 19, 27, rng)
    for scale in (0.7, rng.uniform(0.1, 1, (2, 1)), rng.uniform(0.1, 1, (2, 19))):
        expected = brute_force(q, k, v, mask, scale)
        check(run(q, k, v, mask, scale, method=method), expected)


@pytest.mark.parametrize("method", METHODS)
def test_equals_torch(method):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    q, k, v = random_qkv(rng, 23, 23, (8, 2))
    mask = Mask(np.tile(np.arange(23), (2, 1)))
    heads_first = (torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, enable_gqa=True
    )
    out, _ = run(q, k, v, mask, method=method)
    np.testing.assert_allclose(out, expected.transpose(1, 2), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_large_scores_do_not_overflow(method):
    rng = np.random.default_rng(5)
    q, k, v = random_qkv(rng)
    mask = random_mask(("offset", "holes"), 19, 27, rng)
    out, lse = run(100 * q, k, v, mask, method=method)
    expected_out, expected_lse = brute_force(100 * q, k, v, mask)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)
    # Scores near 1000 are rounded to 1e-4, which is then the weights' relative error.
    np.testing.assert_allclose(out, expected_out, atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays_close_to_float64(method):
    rng = np.random.default_rng(6)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(rng))
    mask = random_mask(("offset", "holes"), 19, 27, rng)
    out, lse = run(q, k, v, mask, method=method)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    expected_out, expected_lse = brute_force(*(np.asarray(x, np.float64) for x in (q, k, v)), mask)
    # Weights, values' sum and result are each rounded to 8 bits, the scores not at all.
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=2e-6)
    error = np.abs(np.asarray(out, np.float64) - expected_out)
    assert (error <= 2.0**-7 * np.abs(v.astype(np.float32)).max()).all()


def loss_gradients(method, q, k, v, mask, scale, weights):
    """Gradients of a random linear form of out and lse."""

    def loss(q, k, v, scale):
        out, lse = attend(q, k, v, mask, scale, method=method)
        return jnp.sum(out * weights[0]) + jnp.sum(jnp.where(lse > LOWEST, lse, 0) * weights[1])

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, scale)


@pytest.mark.parametrize("rows", [4, 8, 128])
@pytest.mark.parametrize("more", [(), ("holes", "segments")], ids=["causal", "holes, segments"])
def test_a_promised_order_leaves_out_keys_behind_and_changes_nothing(monkeypatch, rows, more):
    monkeypatch.setattr(attend_file, "_ROWS", rows)
    monkeypatch.setattr(attend_file, "FEW_QUERIES", 1)
    rng = np.random.default_rng(16)
    q, k, v = random_qkv(rng, 19, 19)
    mask = random_mask(more, 19, 19, rng)
    mask = mask.replace(query_slots=np.tile(np.arange(19), (2, 1)), key_slots=None)
    scale = rng.uniform(0.2, 0.5, (2, 19)).astype(np.float32)

    def results(in_order):
        run = jax.jit(functools.partial(attend, method="plain", in_order=in_order))
        weights = (np.sin(np.arange(2 * 19 * 4 * 6)).reshape(2, 19, 4, 6), 0.1)
        seen = run(q, k, v, mask, scale)[1] > LOWEST

        def loss(*x):
            out, lse = run(*x[:3], mask, x[3])
            return jnp.sum(out * weights[0]) + weights[1] * jnp.sum(jnp.where(seen, lse, 0))

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, scale)
        return *run(q, k, v, mask, scale), *gradients

    ours = results(True)
    check(ours[:2], brute_force(q, k, v, mask, scale))
    for got, want in zip(ours, results(False), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)

    # What is left out is not computed.
    flops = [
        jax.jit(functools.partial(attend, method="plain", in_order=o))
        .lower(q, k, v, mask)
        .compile()
        .cost_analysis()["flops"]
        for o in (True, False)
    ]
    assert flops[0] < 0.75 * flops[1] if rows < 8 else flops[0] <= 1.05 * flops[1]


@pytest.mark.parametrize("kind", MASKS)
def test_blockwise_gradients_equal_plain_ones(kind):
    rng = np.random.default_rng(7)
    q, k, v = random_qkv(rng)
    mask = random_mask(MASKS[kind], 19, 27, rng)
    scale = rng.uniform(0.2, 0.5, (2, 19)).astype(np.float32)
    weights = rng.standard_normal((2, 19, 4, 6)), rng.standard_normal((2, 19, 4))
    plain, blockwise = (loss_gradients(m, q, k, v, mask, scale, weights) for m in METHODS)
    for name, got, want in zip(("q", "k", "v", "scale"), blockwise, plain, strict=True):
        assert np.isfinite(got).all() and np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_finite_differences(method):
    rng = np.random.default_rng(8)
    q, k, v = random_qkv(rng, 10, 12, (2, 1))
    mask = random_mask(("offset", "holes"), 10, 12, rng)
    weights = rng.standard_normal((2, 10, 2, 6)), rng.standard_normal((2, 10, 2))
    scale = np.full((2, 10), 0.4, np.float32)
    gradients = loss_gradients(method, q, k, v, mask, scale, weights)

    def loss(arguments):
        out, lse = brute_force(*arguments[:3], mask, arguments[3])
        return np.sum(out * weights[0]) + np.sum(np.where(lse > LOWEST, lse, 0) * weights[1])

    for i, gradient in enumerate(gradients):
        step = 1e-5 * rng.standard_normal(gradient.shape)
        up, down = (
            loss([x + sign * step if i == j else x for j, x in enumerate((q, k, v, scale))])
            for sign in (1, -1)
        )
        expected = (up - down) / 2
        np.testing.assert_allclose(np.sum(gradient * step), expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_gradients_stay_close_to_those_in_float32(method):
    rng = np.random.default_rng(13)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(rng))
    mask = random_mask(("offset", "holes"), 19, 27, rng)
    scale = np.full((2, 19), 0.4, np.float32)
    weights = rng.standard_normal((2, 19, 4, 6)), rng.standard_normal((2, 19, 4))
    in_float32 = (x.astype(jnp.float32) for x in (q, k, v))
    expected = loss_gradients("plain", *in_float32, mask, scale, weights)
    gradients = loss_gradients(method, q, k, v, mask, scale, weights)
    for x, got, want in zip((q, k, v), gradients, expected, strict=False):
        assert got.dtype == x.dtype
        error = np.linalg.norm(np.asarray(got, np.float32) - want)
        assert error < 2.0**-7 * np.linalg.norm(want)


@pytest.mark.parametrize("method", METHODS)
def test_a_query_that_sees_nothing_gives_and_takes_no_gradient(method):
    rng = np.random.default_rng(9)
    q, k, v = random_qkv(rng, 12, 12)
    mask = Mask(np.tile(np.arange(12), (2, 1)), key_valid=np.zeros((2, 12), bool))
    weights = np.ones((2, 12, 4, 6)), np.ones((2, 12, 4))
    out, lse = run(q, k, v, mask, method=method)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, LOWEST)
    scale = np.ones((2, 12), np.float32)
    for gradient in loss_gradients(method, q, k, v, mask, scale, weights):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("method", METHODS)
def test_merging_disjoint_keys_is_attention_over_their_union(method):
    rng = np.random.default_rng(10)
    q, k, v = random_qkv(rng)
    whole = random_mask(("offset", "holes"), 19, 27, rng)
    part = rng.integers(0, 3, (2, 27))

    def merged(q, k, v):
        masks = [whole.replace(key_valid=whole.key_valid & (part == i)) for i in range(3)]
        return merge(*zip(*(attend(q, k, v, m, method=method) for m in masks), strict=True))

    expected = brute_force(q, k, v, whole)
    assert (expected[1] == LOWEST).any()
    check(jax.jit(merged)(q, k, v), expected)

    def total(function):
        def loss(*arrays):
            return jnp.sum(jnp.sin(3 * function(*arrays)[0]))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    gradients = total(merged)(q, k, v)
    of_union = total(lambda *x: attend(*x, whole, method="plain"))(q, k, v)
    for got, want in zip(gradients, of_union, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_keys_that_no_query_sees_are_not_read():
    """NaN spreads through any product, so that a block with NaN shows whether it was passed over.

    Queries at slots 32 to 44 with a window of 8 need keys 25 to 44.
    """
    rng = np.random.default_rng(11)
    q, k, v = random_qkv(rng, 13, 64)
    slots = np.tile(np.arange(32, 45), (2, 1))
    mask = Mask(slots, window=8)
    expected = brute_force(q, k, v, mask)
    for x in (k, v):
        x[:, :24], x[:, 48:] = np.nan, np.nan
    check(run(q, k, v, mask, method="blockwise"), expected)
    groups = np.tile(np.arange(64) // 16, (2, 1))
    mask = Mask(slots, None, groups[:, 32:45], groups, relation=Relation.PREVIOUS)
    q, k, v = random_qkv(rng, 13, 64)
    expected = brute_force(q, k, v, mask)
    for x in (k, v):
        x[:, :16], x[:, 32:] = np.nan, np.nan
    check(run(q, k, v, mask, method="blockwise"), expected)
    # The keys of slots 32 to 47 stand last, and those of other slots and segments are not read.
    key_slots = np.tile(np.r_[48:64, :48], (2, 1))
    for more in ({"window": 8}, {"query_segments": slots // 16, "key_segments": key_slots // 16}):
        mask = Mask(slots, key_slots=key_slots, **more)
        q, k, v = random_qkv(rng, 13, 64)
        expected = brute_force(q, k, v, mask)
        for x in (k, v):
            x[:, :40] = np.nan
        check(run(q, k, v, mask, method="blockwise"), expected)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_parts_add_up_to_those_of_the_whole(method):
    rng = np.random.default_rng(14)
    q, k, v = random_qkv(rng)
    mask = random_mask(("slots", "holes", "segments"), 19, 27, rng)
    scale = rng.uniform(0.2, 0.5, (2, 19)).astype(np.float32)
    cotangents = tuple(
        rng.standard_normal(n).astype(np.float32) for n in [(2, 19, 4, 6), (2, 19, 4)]
    )
    results, pull = jax.vjp(lambda *x: attend(*x[:3], mask, x[3], method), q, k, v, scale)
    cotangents = cotangents[0], jnp.where(results[1] > LOWEST, cotangents[1], 0)
    parts = []
    for keys in (slice(0, 11), slice(11, 27)):
        fields = ("key_valid", "key_slots", "key_segments")
        part = mask.replace(**{name: getattr(mask, name)[:, keys] for name in fields})
        arguments = (q, k[:, keys], v[:, keys], part, scale, results, cotangents)
        parts.append(gradients_of_part(*arguments))
    (d_q, d_scale, *first), (d_q_too, d_scale_too, *second) = parts
    d_keys = (np.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    whole = pull(cotangents)
    for got, want in zip((d_q + d_q_too, *d_keys, d_scale + d_scale_too), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_can_be_float32_where_the_inputs_are_not(method):
    rng = np.random.default_rng(15)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(rng))
    mask = random_mask(("offset",), 19, 27, rng)
    out, _ = attend(q, k, v, mask, method=method, dtype=jnp.float32)
    assert out.dtype == jnp.float32
    rounded, _ = attend(q, k, v, mask, method=method)
    np.testing.assert_array_equal(out.astype(jnp.bfloat16), rounded)
    assert np.abs(out - rounded).max() > 1e-4


def temporary_bytes(function, n):
    x = jax.ShapeDtypeStruct((1, n, 1, 16), jnp.float32)
    slots = jax.ShapeDtypeStruct((1, n), jnp.int32)
    return jax.jit(function).lower(x, x, x, slots).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("window", [None, 1000])
def test_blockwise_memory_is_linear_in_length(window, gradient, monkeypatch):
    monkeypatch.setattr(attend_file, "_BLOCK", 128)

    def function(method, q, k, v, slots):
        return attend(q, k, v, Mask(slots, window=window), method=method)

    def loss(method, q, k, v, slots):
        return sum(jnp.sum(jnp.square(x)) for x in function(method, q, k, v, slots))

    measured = jax.grad(loss, argnums=(1, 2, 3)) if gradient else function

    def growth(method):
        small, large = (
            temporary_bytes(functools.partial(measured, method), n) for n in (2048, 8192)
        )
        return large / small

    assert growth("auto") < 4.5
    # The measure sees what it should.
    assert growth("plain") > 12


def test_short_calls_are_plain_and_long_ones_blockwise(monkeypatch):
    monkeypatch.setattr(attend_file, "_BLOCK", 256)
    monkeypatch.setattr(attend_file, "FEW_QUERIES", 16)

    def is_plain(T, S):
        q, k = (jax.ShapeDtypeStruct((1, n, 1, 16), jnp.float32) for n in (T, S))
        slots = jax.ShapeDtypeStruct((1, T), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda q, k, slots: attend(q, k, k, Mask(slots)))(q, k, slots)
        return "custom_vjp" not in str(jaxpr)

    assert is_plain(1, 100_000)
    assert is_plain(512, 512)
    assert is_plain(512, 4096)
    assert not is_plain(512, 100_000)
    assert not is_plain(513, 513)


def test_refuses_what_it_does_not_know():
    q, k, v = random_qkv(np.random.default_rng(12))
    slots = np.zeros((2, 19), np.int32)
    with pytest.raises(ValueError, match="give 'auto', 'plain' or 'blockwise'"):
        attend(q, k, v, Mask(slots), method="flash")
    for mask in (Mask(slots, relation=Relation.SAME), Mask(slots, query_groups=slots)):
        with pytest.raises(ValueError, match="key_groups together or not at all"):
            attend(q, k, v, mask)
    with pytest.raises(ValueError, match="segments together or not at all"):
        attend(q, k, v, Mask(slots, key_segments=slots))
