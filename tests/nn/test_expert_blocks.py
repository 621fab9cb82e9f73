"""What blocks of experts read, hold and write, and the sums of their gradients."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import MoeSpec
from qwen_jax.nn import expert_blocks
from qwen_jax.nn.moe import Dispatch, mix_experts
from qwen_jax.nn.router import route
from tests.nn.expert_layers import BLOCKS, D, brute_force, close, make_spec, random_layer, run


@pytest.mark.parametrize("method", BLOCKS)
def test_gradients_are_summed_in_float32_over_the_blocks_of_an_expert(method):
    """Each token pulls the same way, so that a sum in bfloat16 would stop growing."""
    spec = make_spec(1, 1, renormalise=False)
    _, router, experts = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), random_layer(spec, 1))
    x = jnp.broadcast_to(random_layer(spec, 1)[0], (2048, D)).astype(jnp.bfloat16)

    def loss(experts):
        y = run(x, router, experts, spec, method)[0]
        return jnp.sum(y.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))(experts)

    def single(experts):
        return jnp.sum(run(x[:1], router, experts, spec, Dispatch.DENSE)[0].astype(jnp.float32))

    # One token's gradient, from the same bfloat16 products, 2048 times.
    one = jax.jit(jax.grad(single))(experts)
    expected = jax.tree.map(lambda a: 2048 * np.asarray(a, np.float32), one)
    jax.tree.map(lambda a, b: close(np.asarray(a, np.float32), b, 1e-2), gradient, expected)


def equations(jaxpr, loops=0):
    """The equations of a program and of those inside of it, and how many loops each stands in."""
    for equation in jaxpr.eqns:
        parts = jax.tree.leaves(
            equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        )
        programs = [
            part for part in (getattr(v, "jaxpr", v) for v in parts) if hasattr(part, "eqns")
        ]
        if not programs:
            yield equation, loops
        for program in programs:
            yield from equations(program, loops + (equation.primitive.name == "while"))


def arrays(method, gradient):
    """(elements, the operation's name, loops it stands in) of each array that a step makes.

    Of 128 experts and 200 tokens.
    """
    spec = MoeSpec((0,), 128, 2, 5, True)
    x, experts = jnp.ones((200, 6)), {"gate_proj": jnp.ones((128, 5, 6))}
    experts |= {"up_proj": experts["gate_proj"], "down_proj": jnp.ones((128, 6, 5))}
    routing = route(x, jnp.ones((128, 6)), spec)

    def loss(x, weights, experts):
        return jnp.sum(mix_experts(x, routing.replace(weights=weights), experts, method))

    function = jax.grad(loss, argnums=(0, 1, 2)) if gradient else loss
    jaxpr = jax.make_jaxpr(function)(x, routing.weights, experts)
    for equation, loops in equations(jaxpr.jaxpr):
        for variable in equation.outvars:
            elements = np.prod(variable.aval.shape, dtype=int)
            yield elements, equation.primitive.name, loops


@pytest.mark.parametrize("gradient", [False, True])
def test_blocks_hold_nothing_of_size_experts_times_tokens(gradient):
    for method in BLOCKS:
        # The largest array is that of the weights' gradient, or of the tokens.
        largest = max(elements for elements, _, _ in arrays(method, gradient))
        assert largest == (128 * 5 * 6 if gradient else 200 * 6)
    assert max(arrays(Dispatch.DENSE, gradient))[0] >= 128 * 200 * 6


@pytest.mark.parametrize("method", BLOCKS)
def test_a_block_writes_the_gradient_of_one_expert_only(method):
    """Not those of all experts, zero but for one, to be added up."""
    in_loops = [(n, name) for n, name, loops in arrays(method, gradient=True) if loops]
    whole = {name for n, name in in_loops if n == 128 * 5 * 6}
    assert whole == {"dynamic_update_slice"}


def temporaries(E, gradient):
    """Bytes that the compiled `SORTED` takes beside arguments and results, and of the weights."""
    spec = MoeSpec((0,), E, 2, 32, True)
    x, router = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (E, 64)))
    shapes = {"gate_proj": (E, 32, 64), "up_proj": (E, 32, 64), "down_proj": (E, 64, 32)}
    experts = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

    def loss(x, router, experts):
        return jnp.sum(run(x, router, experts, spec, Dispatch.SORTED)[0] ** 2)

    function = jax.grad(loss, argnums=(0, 1, 2)) if gradient else loss
    compiled = jax.jit(function).lower(x, router, experts).compile()
    return compiled.memory_analysis().temp_size_in_bytes, E * 3 * 32 * 64 * 4


@pytest.mark.parametrize("gradient", [False, True])
def test_sorted_takes_the_memory_of_a_few_experts(gradient):
    few, weights_of_few = temporaries(32, gradient)
    many, weights_of_many = temporaries(128, gradient)
    # Beside the router's logits and the table of blocks, E does not show.
    assert many - few < 0.05 * (weights_of_many - weights_of_few)
    assert many < 0.25 * weights_of_many


@pytest.mark.parametrize("method", BLOCKS)
def test_blocks_read_the_chosen_experts_only(method):
    spec = make_spec(60, 4)
    x, router, experts = random_layer(spec, 5)
    _, counts, _ = brute_force(x, router, experts, spec)
    unread = counts == 0
    assert 40 <= unread.sum() < 60
    poisoned = jax.tree.map(lambda a: np.where(unread[:, None, None], np.nan, a), experts)

    def loss(experts):
        y, _ = run(x, router, experts, spec, method)
        return jnp.sum(y**2), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(poisoned)
    close(y, run(x, router, experts, spec, Dispatch.DENSE)[0])
    for leaf in gradient.values():
        assert np.isfinite(leaf).all()
        assert not np.any(leaf[unread])
        assert np.all(np.any(leaf[~unread], axis=(1, 2)))


@flax.struct.dataclass
class Packed:
    """A weight as integers and a scale for each of its rows."""

    codes: jax.Array
    scale: jax.Array


@pytest.mark.parametrize("method", BLOCKS)
def test_a_leaf_may_be_a_pytree_with_integers(method, monkeypatch):
    spec = make_spec(6, 2)
    x, router, experts = random_layer(spec, 9)
    rng = np.random.default_rng(6)
    packed = {
        name: Packed(rng.integers(-9, 9, a.shape, np.int8), np.abs(a[..., :1]) / 9 + 0.01)
        for name, a in experts.items()
    }
    dense = {name: leaf.codes * leaf.scale for name, leaf in packed.items()}
    plain = expert_blocks.linear

    def linear(x, leaf):
        return plain(x, leaf.codes * leaf.scale if isinstance(leaf, Packed) else leaf)

    monkeypatch.setattr(expert_blocks, "linear", linear)

    def loss(x, router, scales, method):
        leaves = {name: Packed(packed[name].codes, scale) for name, scale in scales.items()}
        if method is Dispatch.DENSE:
            leaves = {name: leaf.codes * leaf.scale for name, leaf in leaves.items()}
        y = mix_experts(x, route(x, router, spec), leaves, method)
        return jnp.sum(y**2), y

    scales = {name: leaf.scale for name, leaf in packed.items()}
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    (_, y), ours = gradient(x, router, scales, method)
    close(y, brute_force(x, router, dense, spec)[0])
    jax.tree.map(close, ours, gradient(x, router, scales, Dispatch.DENSE)[1])
