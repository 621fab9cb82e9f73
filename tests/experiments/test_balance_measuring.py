"""What routers do with texts, measured without training: against loops over tokens."""

import jax
import numpy as np
import pytest

from experiments.initial import draw_params
from experiments.moe_balance.arms import Experts
from experiments.moe_balance.measuring import Reader, in_batches, saturation
from experiments.moe_balance.training import Sizes
from qwen_jax.models.decoder import Decoder

ROWS, T, DOMAINS = 10, 150, 3


@pytest.fixture(scope="module")
def case():
    config = Sizes(hidden_size=16, layers=2, length=T).config(Experts(6, 2, 8))
    params = draw_params(config, jax.random.key(0))
    # Routers with an opinion.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 20 * leaf if "gate" in str(path) else leaf, params
    )
    rng = np.random.default_rng(1)
    rows = {
        "input_ids": rng.integers(0, 128, (ROWS, T)).astype(np.int32),
        "domains": np.array([0, 0, 1, 1, 2, 2, 0, 1, 2, 2], np.int32),
        "attention_mask": np.arange(T) < rng.integers(20, T + 1, (ROWS, 1)),
    }
    return Decoder(config), params, rows


def loops(model, params, rows):
    """Losses, counts by domain, pairs and choices, a token at a time."""
    losses = []
    by_domain, together = np.zeros((2, DOMAINS, 6), int), np.zeros((2, 6, 6), int)
    choices = [[], []]
    for ids, mask, domain in zip(
        rows["input_ids"], rows["attention_mask"], rows["domains"], strict=True
    ):
        ids = ids[mask]
        out = model.apply({"params": params}, ids[None])
        log = np.asarray(jax.nn.log_softmax(out.logits[0].astype(np.float32)), np.float64)
        losses.append(-np.mean([log[t, ids[t + 1]] for t in range(len(ids) - 1)]))
        for layer, routing in enumerate(out.router):
            for one in np.asarray(routing.experts[0]):
                choices[layer].append(sorted(one))
                for e in one:
                    by_domain[layer, domain, e] += 1
                    together[layer, e, one] += 1
    return np.array(losses), by_domain, together, np.array(choices)


@pytest.mark.parametrize("size", [4, ROWS])
def test_measured_is_what_loops_over_tokens_find(case, size):
    model, params, rows = case
    found = Reader(model, DOMAINS, 2).read(params, in_batches(rows, size))
    losses, by_domain, together, choices = loops(*case)
    # More columns than a block of logits has, and padding behind the texts.
    np.testing.assert_allclose(found.losses, losses, rtol=2e-5)
    np.testing.assert_array_equal(found.by_domain, by_domain)
    np.testing.assert_array_equal(found.together, together)
    np.testing.assert_array_equal(found.choices, choices)
    np.testing.assert_array_equal(found.domains, rows["domains"])
    loads = by_domain.sum(1)
    np.testing.assert_allclose(
        found.figures["max_vio"], loads.max(1) / loads.mean(1) - 1, rtol=1e-6
    )
    joint = by_domain / by_domain.sum((1, 2), keepdims=True)
    apart = joint.sum(1, keepdims=True) * joint.sum(2, keepdims=True)
    bits = np.sum(joint * np.log2(np.where(joint > 0, joint, 1) / apart), axis=(1, 2))
    np.testing.assert_allclose(found.figures["domain_information"], bits, rtol=1e-4, atol=1e-6)


def test_balance_of_parts_is_the_mean_over_them(case):
    model, params, rows = case
    reader = Reader(model, DOMAINS, 2)
    parts = list(in_batches(rows, 2))
    alone = [reader.read(params, [part]).figures["max_vio"] for part in parts]
    found = reader.read(params, [rows])
    np.testing.assert_allclose(found.figures["max_vio_micro"], np.mean(alone, axis=0), rtol=1e-6)
    in_parts = reader.read(params, parts)
    np.testing.assert_allclose(in_parts.figures["max_vio_batch"], np.mean(alone, axis=0), rtol=1e-6)
    np.testing.assert_allclose(in_parts.figures["max_vio"], found.figures["max_vio"], rtol=1e-6)


def test_saturation_is_the_share_of_experts_that_stay():
    rng = np.random.default_rng(2)
    one, other = (
        np.sort(np.argsort(rng.random((2, 40, 6)), axis=-1)[..., :3], axis=-1) for _ in range(2)
    )
    expected = [
        np.mean([len(set(a) & set(b)) / 3 for a, b in zip(*pair, strict=True)])
        for pair in zip(one, other, strict=True)
    ]
    np.testing.assert_allclose(saturation(one, other), expected)
    np.testing.assert_array_equal(saturation(one, one), 1)
