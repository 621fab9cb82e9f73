"""Segments of like layers, and the layers scanned, unrolled and recomputed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax.config import LayerKind, MoeSpec
from qwen_jax.training.layers import run_layers, scan_layers
from qwen_jax.training.stacking import Segment, segments, stack_layers
from tests.models.passes import padding, random_ids
from tests.reference import random_reference, save_reference

F, S, A = LayerKind.FULL_ATTENTION, LayerKind.SLIDING_ATTENTION, LayerKind.LINEAR_ATTENTION


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return load(tmp_path_factory, "qwen3", {})


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """Two patterns of two layers, and a dense one behind them."""
    kinds = ["linear_attention", "full_attention"] * 2 + ["full_attention"]
    fields = {"num_hidden_layers": 5, "layer_types": kinds, "mlp_only_layers": [4]}
    return load(tmp_path_factory, "qwen3_next", fields)


def load(tmp_path_factory, family, fields):
    directory = save_reference(random_reference(family, **fields), tmp_path_factory.mktemp(family))
    return qwen_jax.load_pretrained(directory)


@pytest.mark.parametrize(
    ("kinds", "dense_layers", "expected"),
    [
        ([F] * 28, range(28), [(0, 1, 28)]),
        ([A, A, A, F] * 12, (), [(0, 4, 12)]),
        ([F] * 3 + [S] * 5, range(8), [(0, 1, 3), (3, 1, 5)]),
        ([F] * 6, [0], [(0, 1, 1), (1, 1, 5)]),
        ([F] * 6, [0, 2, 4], [(0, 2, 3)]),
        ([F], [0], [(0, 1, 1)]),
    ],
)
def test_segments_of_published_stacks(dense, kinds, dense_layers, expected):
    config = arrange(dense[0].config, kinds, dense_layers)
    assert segments(config) == tuple(Segment(*fields) for fields in expected)


def arrange(config, kinds, dense_layers):
    sparse = tuple(sorted(set(range(len(kinds))) - set(dense_layers)))
    return dataclasses.replace(
        config,
        layer_types=tuple(kinds),
        sliding_window=8,
        delta=FakeDelta() if A in kinds else None,
        moe=MoeSpec(sparse, 4, 2, 8, True) if sparse else None,
    )


@dataclasses.dataclass(frozen=True)
class FakeDelta:
    """Segments read nothing of it."""


def cost(kinds):
    """The fewest layers to compile, by trying every way to cut the stack."""
    count, least = len(kinds), len(kinds)
    for number in range(count):
        for cuts in itertools.combinations(range(1, count), number):
            parts = [kinds[a:b] for a, b in itertools.pairwise((0, *cuts, count))]
            least = min(least, sum(map(shortest_period, parts)))
    return least


def shortest_period(part):
    for period in range(1, len(part) + 1):
        if len(part) % period == 0 and part == part[:period] * (len(part) // period):
            return period
    return 0


@pytest.mark.parametrize("seed", range(8))
def test_segments_cover_the_stack_with_the_fewest_layers_to_compile(dense, seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 11))
    kinds = [(F, S)[i] for i in rng.integers(0, 2, count)]
    dense_layers = [i for i in range(count) if rng.integers(0, 3) == 0]
    config = arrange(dense[0].config, kinds, dense_layers)
    labelled = [(kind, i in dense_layers) for i, kind in enumerate(kinds)]
    covered = []
    for segment in segments(config):
        for r, place in itertools.product(range(segment.repeats), range(segment.period)):
            covered.append(segment.index(r, place))
            assert labelled[covered[-1]] == labelled[segment.index(0, place)]
    assert covered == list(range(count))
    assert sum(segment.period for segment in segments(config)) == cost(labelled)


@pytest.mark.parametrize("which", ["dense", "hybrid"])
def test_scans_and_remat_change_neither_outputs_nor_gradients(which, request):
    model, params = request.getfixturevalue(which)
    config = model.config
    ids, mask = random_ids(model, (2, 18)), padding([18, 11], 18, "right")
    direction = jax.random.normal(jax.random.key(3), (2, 18, 64))

    def outputs(params, scan, remat):
        variables = {"params": params}
        x, tokens = model.apply(variables, ids, mask, method="begin")
        if scan:
            x, router = scan_layers(model, stack_layers(config, params), x, tokens, remat)
        else:
            x, router = run_layers(model, params, x, tokens, remat)
        x = model.apply(variables, x, method="finish")
        loss = (x * direction * mask[..., None]).sum()
        if router is not None:
            loss += router.groups["global"].probabilities[0, 0, 0] + router.log_z_squared.sum()
        return loss, (x, router)

    out = model.apply({"params": params}, ids, mask)
    run = jax.jit(jax.value_and_grad(outputs, has_aux=True), static_argnums=(1, 2))
    (_, (x, router)), gradients = run(params, False, "none")
    close(x, out.hidden_states[-1], 1e-5)
    counts = [routing.counts for routing in out.router if routing is not None]
    assert (router is None) == (not counts)
    if counts:
        np.testing.assert_array_equal(router.counts, jnp.stack(counts))
    for scan, remat in ((False, "full"), (True, "none"), (True, "dots"), (True, "full")):
        (_, outputs_then), gradients_then = run(params, scan, remat)
        close(outputs_then, (x, router), 1e-5)
        close(gradients_then, gradients, 1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["layers_0"]))


def close(ours, expected, tolerance):
    def check(path, a, b):
        atol = tolerance * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, ours, expected)


def temporaries(model, params, remat):
    """Bytes beside arguments and gradients in a backward pass, its attention all at once."""
    ids = jnp.zeros((4, 128), jnp.int32)

    def loss(stacked):
        x, tokens = model.apply({"params": params}, ids, method="begin")
        return scan_layers(model, stacked, x, tokens, remat)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(stack_layers(model.config, params)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_remat_keeps_what_it_says(dense, tmp_path_factory):
    """For three layers more: what the backward pass of one layer takes is there once."""
    model, params = dense
    deeper = load(tmp_path_factory, "qwen3", {"num_hidden_layers": 6})
    none, dots, full = (
        temporaries(*deeper, remat) - temporaries(model, params, remat)
        for remat in ("none", "dots", "full")
    )
    config, tokens = model.config, 4 * 128
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    # Results of q, k, v and o, gate and up, float32, of each layer; no gradient needs down's.
    results = heads - config.num_attention_heads * config.head_dim + config.hidden_size
    results += 2 * config.intermediate_size
    assert dots - full == pytest.approx(4 * 3 * tokens * results, rel=0.001)
    assert none - dots > 4 * 3 * tokens * config.intermediate_size
