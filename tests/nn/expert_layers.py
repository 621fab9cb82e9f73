"""Small layers of experts, run as asked, and what they give by a loop over tokens in float64."""

import functools

import jax
import numpy as np

from qwen_jax.config import MoeSpec
from qwen_jax.nn.moe import Dispatch, mix_experts
from qwen_jax.nn.router import limit_capacity, route

D, F = 16, 10
BLOCKS = (Dispatch.SORTED, Dispatch.GATHER)


def make_spec(E=6, k=2, renormalise=True, shared=None):
    return MoeSpec((0,), E, k, F, renormalise, shared)


def random_layer(spec, num_tokens, seed=0):
    """Tokens, router and experts, outputs of unit scale."""
    rng = np.random.default_rng(seed)
    E = spec.num_experts

    def draw(*shape):
        return (rng.standard_normal(shape) * 2 / shape[-1] ** 0.5).astype(np.float32)

    experts = {
        "gate_proj": draw(E, F, D),
        "up_proj": draw(E, F, D),
        "down_proj": draw(E, D, F),
    }
    return draw(num_tokens, D) * D**0.5 / 2, draw(E, D), experts


@functools.partial(jax.jit, static_argnames=("spec", "method", "capacity"))
def run(x, router, experts, spec, method, real=None, capacity=None):
    """Router and experts; `CAPACITY` with room for all unless told otherwise."""
    routing = route(x, router, spec, real)
    if method is Dispatch.CAPACITY:
        capacity = capacity or len(x)
        routing = limit_capacity(routing, capacity, real)
    return mix_experts(x, routing, experts, method, capacity), routing


def brute_force(x, router, experts, spec, capacity=None, real=None):
    """Output, counts and drops of a loop over tokens in float64."""
    x, router = x.astype(np.float64), router.astype(np.float64)
    experts = {name: leaf.astype(np.float64) for name, leaf in experts.items()}
    out, counts, dropped = np.zeros_like(x), np.zeros(spec.num_experts, int), 0
    for n, token in enumerate(x):
        if real is not None and not real[n]:
            continue
        p = np.exp(router @ token)
        p /= p.sum()
        chosen = np.argsort(-p)[: spec.num_experts_per_tok]
        total = p[chosen].sum() if spec.renormalise else 1
        for e in chosen:
            counts[e] += 1
            if capacity is not None and counts[e] > capacity:
                dropped += 1
                continue
            gate = experts["gate_proj"][e] @ token
            hidden = gate / (1 + np.exp(-gate)) * (experts["up_proj"][e] @ token)
            out[n] += p[e] / total * (experts["down_proj"][e] @ hidden)
    return out, counts, dropped


def close(ours, expected, tolerance=5e-6):
    expected = np.asarray(expected)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())
