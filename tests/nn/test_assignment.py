"""Joint assignments of tokens to experts, against SciPy's solvers and float64 loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from qwen_jax.nn.assignment import balanced_assignment, expert_choice, sinkhorn

# N, E, k: an even share, an uneven one, all experts, one expert, fewer tokens than experts, and
# what assignments one after the other can get stuck in.
SHAPES = [(24, 8, 3), (13, 5, 1), (7, 4, 4), (6, 1, 1), (3, 7, 2), (9, 4, 3)]
EVERYWHERE = settings(max_examples=60, deadline=None, derandomize=True)

choose = jax.jit(expert_choice, static_argnames="capacity")
normalise = jax.jit(sinkhorn, static_argnames="iterations")
assign = jax.jit(balanced_assignment, static_argnames="k")


def draw_scores(kind, N, E, seed):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((N, E))
    match kind:
        case "collapsed":
            scores = 0.1 * scores + 3 * rng.standard_normal(E)
        case "alike":
            scores = scores[rng.integers(0, 3, N)]
        case "tied":
            scores = rng.integers(0, 2, (N, E))
        case "all the same":
            scores = np.full((N, E), 0.3)
        case "wide":
            scores = np.exp(4 * scores)
    return scores.astype(np.float32)


KINDS = ["random", "collapsed", "alike", "tied", "all the same", "wide"]


def draw_real(N, seed):
    return np.random.default_rng((seed, 1)).random(N) < 0.7


def groups():
    return st.tuples(
        st.sampled_from(SHAPES),
        st.sampled_from(KINDS),
        st.integers(0, 2**32),
        st.sampled_from(["all", "some", "none"]),
    )


def draw_group(group):
    (N, E, k), kind, seed, padding = group
    real = {"all": np.ones(N, bool), "some": draw_real(N, seed), "none": np.zeros(N, bool)}
    return draw_scores(kind, N, E, seed), k, real[padding]


def total_of(scores, experts):
    return np.take_along_axis(scores.astype(np.float64), experts, axis=1).sum()


def bound_of(scores, k):
    """How far from the best total the docstring allows."""
    spread = np.ptp(scores.astype(np.float64), axis=1).max(initial=0)
    return 2 * k * len(scores) * spread * 2.0**-22 + 1e-12


def best_by_hungarian(scores):
    """The best total of one expert a token, each expert used equally up to one token.

    Every expert has as many seats as the largest share. Where that is too many, dummies take the
    last seats, one of an expert at most.
    """
    M, E = scores.shape
    share = -(-M // E)
    seats = np.repeat(scores.astype(np.float64), share, axis=1)
    dummies = np.full((share * E - M, share * E), -1e6)
    dummies[:, share - 1 :: share] = 0
    value = np.concatenate([seats, dummies])
    rows, columns = linear_sum_assignment(value, maximize=True)
    return value[rows, columns].sum()


def best_by_linear_programme(scores, k):
    """The best total in fractions: as much as any choice in whole numbers can have."""
    M, E = scores.shape
    per_token = np.kron(np.eye(M), np.ones(E))
    per_expert = np.kron(np.ones(M), np.eye(E))
    low, high = k * M // E, -(-k * M // E)
    done = linprog(
        -scores.astype(np.float64).ravel(),
        A_ub=np.concatenate([per_expert, -per_expert]),
        b_ub=np.concatenate([np.full(E, high), np.full(E, -low)]),
        A_eq=per_token,
        b_eq=np.full(M, k),
        bounds=(0, 1),
    )
    assert done.success
    return -done.fun


@EVERYWHERE
@given(groups())
def test_each_token_has_k_different_experts_and_experts_are_used_equally(group):
    scores, k, real = draw_group(group)
    N, E = scores.shape
    experts = np.asarray(assign(scores, k=k, real=real))
    assert experts.shape == (N, k) and experts.dtype == np.int32
    assert (experts[~real] == E).all()
    assert all(len(set(row)) == k for row in experts[real])
    loads = np.bincount(experts[real].ravel(), minlength=E)
    assert len(loads) == E
    choices = k * real.sum()
    assert loads.min() >= choices // E and loads.max() <= -(-choices // E)


@EVERYWHERE
@given(groups())
def test_no_other_choice_has_a_higher_total(group):
    scores, k, real = draw_group(group)
    if not real.any():
        return
    experts = np.asarray(assign(scores, k=k, real=real))[real]
    scores = scores[real]
    best = best_by_linear_programme(scores, k)
    np.testing.assert_allclose(total_of(scores, experts), best, rtol=1e-9, atol=bound_of(scores, k))


@pytest.mark.parametrize("kind", ["random", "collapsed", "wide"])
@pytest.mark.parametrize("N", [128, 125])
def test_one_expert_a_token_has_the_total_of_the_hungarian_algorithm(kind, N):
    scores = draw_scores(kind, N, 16, seed=N)
    total = total_of(scores, np.asarray(assign(scores, k=1)))
    best = best_by_hungarian(scores)
    np.testing.assert_allclose(total, best, rtol=1e-12, atol=bound_of(scores, 1))


@pytest.mark.parametrize("kind", ["random", "collapsed", "alike"])
def test_many_tokens_have_the_best_total(kind):
    scores = draw_scores(kind, 128, 16, seed=5)
    total = total_of(scores, np.asarray(assign(scores, k=2)))
    best = best_by_linear_programme(scores, 2)
    np.testing.assert_allclose(total, best, rtol=1e-9, atol=bound_of(scores, 2))


def test_the_best_total_does_not_lose_small_differences_to_a_large_offset():
    scores = draw_scores("random", 128, 16, seed=6)
    offset = np.round(1000 * draw_scores("random", 128, 1, seed=7))
    shifted = scores + offset
    total = total_of(shifted - offset, np.asarray(assign(shifted, k=1)))
    best = best_by_hungarian(shifted - offset)
    np.testing.assert_allclose(total, best, rtol=1e-12, atol=bound_of(scores, 1))


def test_a_tokens_experts_begin_with_the_one_of_the_highest_score():
    scores = draw_scores("random", 24, 8, seed=8)
    values = np.take_along_axis(scores, np.asarray(assign(scores, k=3)), axis=1)
    assert (np.diff(values, axis=1) <= 0).all()


def test_balanced_scores_leave_each_token_its_best_experts():
    N, E, k = 24, 8, 3
    rng = np.random.default_rng(9)
    order = (np.arange(N)[:, None] + np.arange(E)) % E
    scores = np.empty((N, E), np.float32)
    np.put_along_axis(scores, order, -np.sort(-rng.standard_normal((N, E))), axis=1)
    np.testing.assert_array_equal(assign(scores, k=k), order[:, :k])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_leave_experts_equally_used(bad):
    scores = draw_scores("random", 24, 8, seed=10)
    scores[np.random.default_rng(11).random(scores.shape) < 0.2] = bad
    scores[3] = bad
    experts = np.asarray(assign(scores, k=3))
    assert all(len(set(row)) == 3 for row in experts)
    np.testing.assert_array_equal(np.bincount(experts.ravel()), 9)


def test_an_expert_ruled_out_by_minus_infinity_is_not_chosen_where_there_are_others():
    scores = draw_scores("random", 24, 8, seed=12)
    ruled_out = np.zeros(scores.shape, bool)
    ruled_out[np.arange(24), np.random.default_rng(13).integers(0, 8, 24)] = True
    scores[ruled_out] = -np.inf
    experts = np.asarray(assign(scores, k=3))
    assert not np.take_along_axis(ruled_out, experts, axis=1).any()


@pytest.mark.parametrize("k", [0, 6])
def test_more_experts_than_there_are_is_an_error(k):
    with pytest.raises(ValueError, match=f"k = {k} of 5 experts"):
        balanced_assignment(jnp.zeros((4, 5)), k)


@EVERYWHERE
@given(groups(), st.sampled_from([1, 3, 10**6]))
def test_each_expert_takes_the_tokens_that_score_highest_with_it(group, capacity):
    scores, _, real = draw_group(group)
    N, E = scores.shape
    expected = np.zeros((N, E), bool)
    for e in range(E):
        wanted = [n for n in np.argsort(-scores[:, e], kind="stable") if real[n]]
        expected[wanted[:capacity], e] = True
    taken = choose(scores, capacity=capacity, real=real)
    assert taken.dtype == bool
    np.testing.assert_array_equal(taken, expected)


def sinkhorn_in_float64(logits, iterations):
    plan = np.exp(logits.astype(np.float64))
    for _ in range(iterations):
        plan *= 1 / plan.sum(axis=1, keepdims=True)
        plan *= len(plan) / plan.shape[1] / plan.sum(axis=0)
    return plan / plan.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_sinkhorn_equals_scaling_in_turns(iterations):
    logits = 2 * draw_scores("random", 40, 6, seed=20)
    ours = normalise(logits, iterations=iterations)
    assert ours.dtype == jnp.float32
    expected = sinkhorn_in_float64(logits, iterations)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-8)
    np.testing.assert_allclose(ours.sum(axis=1), 1, rtol=1e-6)


def test_sinkhorn_converges_to_equal_shares_of_tokens_and_experts():
    logits = 2 * draw_scores("collapsed", 40, 6, seed=21)
    ours = normalise(logits, iterations=200)
    limit = sinkhorn_in_float64(logits, 5000)
    np.testing.assert_allclose(limit.sum(axis=0), 40 / 6, rtol=1e-12)
    np.testing.assert_allclose(ours, limit, rtol=2e-5)
    np.testing.assert_allclose(ours.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(ours.sum(axis=0), 40 / 6, rtol=1e-5)


def test_the_limit_of_sinkhorn_does_not_see_what_is_added_to_a_row_or_a_column():
    logits = draw_scores("random", 40, 6, seed=22)
    added = 20 * draw_scores("random", 40, 1, seed=23) + 20 * draw_scores("random", 1, 6, seed=24)
    ours = normalise(logits + added, iterations=200)
    np.testing.assert_allclose(ours, normalise(logits, iterations=200), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("width", [0.3, 1])
def test_column_sums_converge_as_fast_as_the_docstring_says(width):
    x = width * draw_scores("random", 12, 4, seed=25)
    pairs = x[:, :, None] - x[:, None, :]
    widest = np.ptp(pairs, axis=0).max()
    factor = np.tanh(widest / 4) ** 2
    sums = [normalise(x, iterations=n).sum(axis=0) for n in range(8)]
    spreads = [np.ptp(np.log(np.asarray(s, np.float64))) for s in sums]
    assert spreads[0] > 0.05
    for before, after in itertools.pairwise(spreads):
        assert after <= factor * before + 1e-6


def test_sinkhorn_of_wide_logits_is_finite():
    ours = normalise(1e4 * draw_scores("random", 40, 6, seed=26), iterations=20)
    np.testing.assert_allclose(ours.sum(axis=1), 1, rtol=1e-6)


CALLS = {
    "expert choice": functools.partial(expert_choice, capacity=5),
    "sinkhorn": functools.partial(sinkhorn, iterations=3),
    "balanced": functools.partial(balanced_assignment, k=3),
}


@pytest.mark.parametrize("call", CALLS)
def test_padding_changes_nothing_for_the_other_tokens(call):
    f = jax.jit(CALLS[call])
    scores = draw_scores("random", 24, 8, seed=30)
    real = draw_real(24, seed=31)
    scores[~real] *= 1e30
    scores[np.argmin(real)] = np.nan
    with_padding = np.asarray(f(scores, real=real))
    alone = np.asarray(f(scores[real]))
    np.testing.assert_allclose(with_padding[real], alone, rtol=2e-6)
    assert (with_padding[~real] == (8 if call == "balanced" else 0)).all()


@pytest.mark.parametrize("call", CALLS)
def test_without_any_real_token_nothing_is_chosen(call):
    out = np.asarray(CALLS[call](draw_scores("random", 24, 8, seed=33), real=np.zeros(24, bool)))
    assert (out == (8 if call == "balanced" else 0)).all()


@pytest.mark.parametrize("call", CALLS)
def test_groups_side_by_side_are_those_alone(call):
    f = CALLS[call]
    scores = np.stack([draw_scores(kind, 24, 8, seed=34) for kind in KINDS])
    real = np.stack([draw_real(24, seed) for seed in range(len(KINDS))])
    together = jax.jit(jax.vmap(lambda s, r: f(s, real=r)))(scores, real)
    alone = jax.jit(lambda s, r: f(s, real=r))
    for ours, *group in zip(together, scores, real, strict=True):
        np.testing.assert_allclose(ours, alone(*group), rtol=2e-6)


@pytest.mark.parametrize("call", CALLS)
def test_a_rematerialised_layer_in_a_scan_has_no_gradient_through_a_choice(call):
    f = CALLS[call]
    scores = np.stack([draw_scores("random", 24, 8, seed) for seed in (35, 36)])

    @jax.checkpoint
    def layer(total, scores):
        chosen = f(scores).astype(jnp.float32)
        return total + jnp.sum(chosen * scores[:, : chosen.shape[1]]), None

    @jax.jit
    @jax.grad
    def slope(scores):
        return jax.lax.scan(layer, jnp.float32(0), scores)[0]

    expected = np.zeros_like(scores)
    chosen = np.stack([f(group) for group in scores])
    expected[:, :, : chosen.shape[2]] = chosen
    np.testing.assert_allclose(slope(scores), expected, rtol=2e-6)
