"""The gated delta rule against float64 loops, and the layer against transformers, live."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import jaxprs_in_params
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

from qwen_jax.config import DeltaSpec, LayerKind, ModelConfig
from qwen_jax.nn import delta_rule
from qwen_jax.nn.delta_rule import (
    DeltaState,
    causal_conv,
    chunked_delta_rule,
    gated_delta_rule,
    gated_rms_norm,
    init_delta_state,
    recurrent_delta_rule,
    segment_starts,
    unit_lower_inverse,
)
from qwen_jax.nn.gated_delta_net import GatedDeltaNet

LENGTHS = [1, 2, 63, 64, 65, 130, 200]
KINDS = ["plain", "alike", "weak", "strong", "uneven"]
either = jax.jit(gated_delta_rule)
recurrent = jax.jit(recurrent_delta_rule)
chunked = jax.jit(chunked_delta_rule, static_argnames="chunk")


def draw(T, kind="plain", seed=0, B=2, K=2, G=2, d=16, e=24):
    """Arguments of the rule, float32. `alike`: keys nearly parallel, beta near 1, no fading."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, B, T, K, d))
    v = rng.standard_normal((B, T, K * G, e))
    state = rng.standard_normal((B, K * G, d, e))
    beta = rng.random((B, T, K * G))
    share = rng.random((B, T, K * G))
    log_decay = -0.5 * share
    if kind == "alike":
        k = rng.standard_normal((B, 1, K, d)) + 0.02 * k
        beta, log_decay = 1 - 1e-3 * beta, -1e-4 * share
    elif kind == "weak":
        log_decay = -1e-6 * share
    elif kind == "strong":
        log_decay = -50 * share
    elif kind == "uneven":
        log_decay = np.where(rng.random(share.shape) < 0.5, -50.0, -1e-3) * share
    return tuple(x.astype(np.float32) for x in (q, k, v, log_decay, beta, state))


def brute_force(q, k, v, log_decay, beta, state):
    """The definition, one token and head at a time, in float64."""
    q, k, v, log_decay, beta, state = (
        np.array(x, np.float64) for x in (q, k, v, log_decay, beta, state)
    )
    B, T, H, _ = v.shape
    group = H // q.shape[2]
    q = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6) / np.sqrt(q.shape[-1])
    k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
    out = np.zeros(v.shape)
    for b, h, t in np.ndindex(B, H, T):
        faded = np.exp(log_decay[b, t, h]) * state[b, h]
        key = k[b, t, h // group]
        correction = beta[b, t, h] * (v[b, t, h] - faded.T @ key)
        state[b, h] = faded + np.outer(key, correction)
        out[b, t, h] = state[b, h].T @ q[b, t, h // group]
    return out, state


def largest_error(ours, theirs):
    return max(np.abs(np.asarray(x) - y).max() for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_recurrence_equals_brute_force(kind):
    for T in (1, 2, 65):
        arguments = draw(T, kind)
        assert largest_error(recurrent(*arguments), brute_force(*arguments)) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_as_accurate_as_the_recurrence(kind):
    for T in LENGTHS:
        arguments = draw(T, kind)
        expected = brute_force(*arguments)
        error = largest_error(chunked(*arguments), expected)
        rounding = max(largest_error(recurrent(*arguments), expected), 3e-7)
        assert error < 5 * rounding, T


def test_keys_that_should_be_alike_are():
    _, k, _, _, beta, _ = draw(64, "alike")
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    assert np.einsum("BTKd,BSKd->BKTS", k, k).min() > 0.99
    assert beta.min() > 0.99


def test_a_weak_decay_survives_a_strong_one_before_it_in_the_chunk():
    arguments = draw(64, "weak")
    log_decay = arguments[3]
    log_decay[:, :32], log_decay[:, 32:] = -50, -0.01
    assert largest_error(chunked(*arguments), brute_force(*arguments)) < 1e-6


@pytest.mark.parametrize("chunk", [1, 2, 16, 128])
def test_chunk_size_does_not_matter(chunk):
    arguments = draw(70)
    assert largest_error(chunked(*arguments, chunk=chunk), brute_force(*arguments)) < 1e-6


def test_chunk_must_be_a_power_of_two():
    with pytest.raises(ValueError, match="chunk = 48"):
        chunked_delta_rule(*draw(70), chunk=48)


def test_inverse_by_halves_is_right_where_the_product_of_powers_is_not():
    rng = np.random.default_rng(0)
    k = rng.standard_normal(16) + 0.02 * rng.standard_normal((64, 16))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    strict = np.tril(k @ k.T, -1).astype(np.float32)
    exact = np.linalg.inv(np.eye(64) + strict.astype(np.float64))
    product, power = np.eye(64, dtype=np.float32) - strict, strict
    for _ in range(5):
        power = power @ power
        product = product @ (np.eye(64, dtype=np.float32) + power)
    assert np.abs(product - exact).max() > 1
    assert np.abs(unit_lower_inverse(jnp.asarray(strict[None]))[0] - exact).max() < 1e-6


def primitives(jaxpr):
    """Every equation, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


def test_nothing_but_the_states_between_chunks_is_sequential():
    equations = list(primitives(jax.make_jaxpr(chunked_delta_rule)(*draw(200)).jaxpr))
    names = {equation.primitive.name for equation in equations}
    assert "dot_general" in names
    assert not names & {"triangular_solve", "while", "custom_linear_solve"}
    loops = [equation.params for equation in equations if equation.primitive.name == "scan"]
    assert [loop["length"] for loop in loops] == [4]
    body = {equation.primitive.name for equation in primitives(loops[0]["jaxpr"].jaxpr)}
    assert "scan" not in body


@pytest.mark.parametrize("T", [1, 2])
def test_one_token_runs_without_chunks(T):
    equations = primitives(jax.make_jaxpr(gated_delta_rule)(*draw(T)).jaxpr)
    assert any(equation.primitive.name == "scan" for equation in equations) == (T > 1)


def test_pieces_equal_one_pass():
    q, k, v, log_decay, beta, state = draw(130)
    outs, s = [], state
    for start, end in [(0, 1), (1, 70), (70, 71), (71, 130)]:
        piece = (x[:, start:end] for x in (q, k, v, log_decay, beta))
        out, s = either(*piece, s)
        outs.append(out)
    expected = brute_force(q, k, v, log_decay, beta, state)
    assert largest_error((np.concatenate(outs, 1), s), expected) < 1e-6


def test_long_texts_run_in_blocks(monkeypatch):
    monkeypatch.setattr(delta_rule, "_TOKEN_BLOCK", 32)
    arguments = draw(70)
    # A function of its own, since `jit` would find the program of `either` with larger blocks.
    out = jax.jit(lambda *arguments: gated_delta_rule(*arguments))(*arguments)
    assert out[0].shape == arguments[2].shape
    assert largest_error(out, brute_force(*arguments)) < 1e-6


def test_tokens_without_decay_and_beta_leave_the_state():
    q, k, v, _, beta, state = draw(70)
    nothing = np.zeros_like(beta)
    for rule in (recurrent, chunked):
        np.testing.assert_array_equal(rule(q, k, v, nothing, nothing, state)[1], state)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_in_a_row_are_as_if_alone(kind):
    """Texts that begin in the middle of a chunk, at its edge, and one of a single token."""
    *tokens, state = draw(150, kind)
    edges = (0, 5, 6, 64, 150)
    segments = np.repeat([[3, 1, 2, 1]] * 2, np.diff(edges), axis=1)
    outs, after = [], state
    for i, j in itertools.pairwise(edges):
        out, after = brute_force(*(x[:, i:j] for x in tokens), after if i == 0 else 0 * state)
        outs.append(out)
    packed = jax.jit(lambda *x: gated_delta_rule(*x, segment_starts(segments)))(*tokens, state)
    rounding = max(largest_error(recurrent(*tokens, state), brute_force(*tokens, state)), 3e-7)
    assert largest_error(packed, (np.concatenate(outs, axis=1), after)) < 5 * rounding


def test_gradients_of_texts_in_a_row_are_those_of_each():
    *tokens, state = draw(100, "uneven", B=1)
    edges = (0, 30, 31, 100)
    segments = np.repeat([[0, 1, 2]], np.diff(edges), axis=1)
    weights = np.random.default_rng(2).standard_normal(tokens[2].shape).astype(np.float32)

    def gradients(function):
        def loss(*arguments):
            return (function(*arguments) * weights).sum()

        return jax.jit(jax.grad(loss, tuple(range(6))))(*tokens, state)

    def alone(*arguments):
        *tokens, state = arguments
        pieces = [
            gated_delta_rule(*(x[:, i:j] for x in tokens), state if i == 0 else 0 * state)[0]
            for i, j in itertools.pairwise(edges)
        ]
        return jnp.concatenate(pieces, axis=1)

    packed = gradients(lambda *x: gated_delta_rule(*x, segment_starts(segments))[0])
    for i, (got, want) in enumerate(zip(packed, gradients(alone), strict=True)):
        want = np.array(want)
        if i == 3:
            # A token that forgets everything does so however fast it would let it fade.
            np.testing.assert_array_equal(got[:, [30, 31]], 0)
            want[:, [30, 31]] = 0
        assert np.isfinite(got).all() and np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolution_does_not_look_across_texts(taps):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 12, 5)).astype(np.float32)
    weight = rng.standard_normal((5, taps)).astype(np.float32)
    before = rng.standard_normal((2, taps - 1, 5)).astype(np.float32)
    edges = (0, 2, 3, 12)
    segments = np.repeat([[7, 2, 5]] * 2, np.diff(edges), axis=1)
    expected = np.concatenate(
        [
            causal_conv(x[:, i:j], weight, before if i == 0 else 0 * before)[0]
            for i, j in itertools.pairwise(edges)
        ],
        axis=1,
    )
    y, state = causal_conv(x, weight, before, segments=segments)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_array_equal(state, causal_conv(x, weight, before)[1])
    # Inputs before the row may be another text's.
    others = np.zeros((2, taps - 1), np.int32)
    y, _ = causal_conv(x, weight, before, segments=segments, segments_before=others)
    expected[:, :2] = causal_conv(x[:, :2], weight, 0 * before)[0]
    np.testing.assert_allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_torch(kind):
    arguments = draw(70, kind, B=1)
    rng = np.random.default_rng(1)
    to_out = rng.standard_normal(arguments[2].shape).astype(np.float32)
    to_state = rng.standard_normal(arguments[5].shape).astype(np.float32)

    tensors = [torch.tensor(x, requires_grad=True) for x in arguments]
    *tokens, state = tensors
    out, state = modeling_qwen3_next.torch_recurrent_gated_delta_rule(
        *tokens, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    ((out * torch.tensor(to_out)).sum() + (state * torch.tensor(to_state)).sum()).backward()

    @jax.jit
    def gradients(*arguments):
        def loss(rule, *arguments):
            out, state = rule(*arguments)
            return (out * to_out).sum() + (state * to_state).sum()

        every = tuple(range(1, 7))
        return [
            jax.grad(loss, every)(rule, *arguments)
            for rule in (recurrent_delta_rule, chunked_delta_rule)
        ]

    for ours in gradients(*arguments):
        for mine, tensor in zip(ours, tensors, strict=True):
            scale = max(1.0, tensor.grad.abs().max().item())
            np.testing.assert_allclose(mine, tensor.grad, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolution_equals_torch(taps):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 9, 5)).astype(np.float32)
    before = rng.standard_normal((3, taps - 1, 5)).astype(np.float32)
    weight = rng.standard_normal((5, taps)).astype(np.float32)
    inputs = np.concatenate([before, x], 1)
    expected = torch.nn.functional.silu(
        torch.nn.functional.conv1d(
            torch.tensor(inputs).mT, torch.tensor(weight)[:, None], groups=5
        ).mT
    )
    y, state = causal_conv(x, weight, before)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_array_equal(state, inputs[:, 9:])
    # Rows of which fewer tokens are real: none, fewer than the convolution keeps, and all.
    lengths = np.array([0, 1, 9])
    y, state = causal_conv(x, weight, before, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(y[row, :length], expected[row, :length], atol=1e-6)
        np.testing.assert_array_equal(state[row], inputs[row, length : length + taps - 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_norm_equals_the_reference(dtype):
    torch.manual_seed(0)
    reference = modeling_qwen3_next.Qwen3NextRMSNormGated(24, eps=1e-3)
    torch.nn.init.normal_(reference.weight)
    reference.to(getattr(torch, dtype))
    x, gate = torch.randn(2, 3, 4, 24).to(getattr(torch, dtype)).unbind()
    expected = reference(x, gate).detach().float()
    arrays = [jnp.asarray(t.detach().float().numpy(), dtype) for t in (x, gate, reference.weight)]
    out = gated_rms_norm(*arrays, 1e-3)
    assert out.dtype == dtype
    # In bfloat16 the casts stand where the reference has them, up to a last place here and there.
    equal = np.asarray(out, np.float32) == expected.numpy()
    assert dtype == "float32" or equal.mean() > 0.98
    np.testing.assert_allclose(
        np.asarray(out, np.float32), expected, rtol=1e-5 if dtype == "float32" else 2**-7, atol=1e-6
    )


SPECS = {
    "groups of 2": DeltaSpec(2, 4, 16, 24, 4),
    "groups of 3": DeltaSpec(2, 6, 24, 8, 4),
    "no groups": DeltaSpec(3, 3, 8, 8, 2),
}
HIDDEN = 40


def make_config(spec):
    return ModelConfig(
        family="",
        vocab_size=8,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=(LayerKind.LINEAR_ATTENTION,),
        max_position_embeddings=512,
        rms_norm_eps=1e-4,
        delta=spec,
    )


def make_reference(layout, spec, seed=0):
    """The transformers layer with every tensor random, and our parameters for it."""
    fields = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "layer_types": ["linear_attention"],
        "rms_norm_eps": 1e-4,
        "linear_num_key_heads": spec.num_key_heads,
        "linear_num_value_heads": spec.num_value_heads,
        "linear_key_head_dim": spec.key_head_dim,
        "linear_value_head_dim": spec.value_head_dim,
        "linear_conv_kernel_dim": spec.conv_kernel_dim,
    }
    if layout == "grouped":
        layer = modeling_qwen3_next.Qwen3NextGatedDeltaNet(Qwen3NextConfig(**fields), 0)
    else:
        layer = modeling_qwen3_5.Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(**fields), 0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn_like(parameter)
            if name in ("A_log", "dt_bias"):
                parameter.copy_(noise)
            elif name == "norm.weight":
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    tensors = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    return layer.eval(), parameters_of(tensors, spec)


def parameters_of(tensors, spec):
    """Our tree of the reference's tensors, in either of its layouts."""
    K, d = spec.num_key_heads, spec.key_head_dim
    values = spec.num_value_heads * spec.value_head_dim

    def ungroup(weight, sizes):
        # Rows of each key head: its own, then those of its value heads.
        parts = np.split(weight.reshape(K, -1, HIDDEN), np.cumsum(sizes)[:-1], axis=1)
        return [part.reshape(-1, HIDDEN) for part in parts]

    if "in_proj_qkvz.weight" in tensors:
        q, k, v, z = ungroup(tensors["in_proj_qkvz.weight"], [d, d, values // K, values // K])
        b, a = ungroup(tensors["in_proj_ba.weight"], [spec.num_value_heads // K] * 2)
    else:
        q, k, v = np.split(tensors["in_proj_qkv.weight"], [K * d, 2 * K * d])
        z, b, a = (tensors[f"in_proj_{name}.weight"] for name in "zba")
    convs = np.split(tensors["conv1d.weight"][:, 0], [K * d, 2 * K * d])
    projections = dict(zip("qkvzba", (q, k, v, z, b, a), strict=True))
    return {
        **{f"{name}_proj": {"weight": weight} for name, weight in projections.items()},
        **{f"{name}_conv": {"weight": w} for name, w in zip("qkv", convs, strict=True)},
        "A_log": tensors["A_log"],
        "dt_bias": tensors["dt_bias"],
        "norm": {"weight": tensors["norm.weight"]},
        "out_proj": {"weight": tensors["out_proj.weight"]},
    }


def run_reference(layer, x):
    with torch.no_grad():
        return layer(torch.tensor(x)).float().numpy()


def random_input(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((*shape, HIDDEN)).astype(np.float32)


@pytest.mark.parametrize("layout", ["grouped", "separate"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=[name.replace(" ", "-") for name in SPECS])
def test_layer_equals_the_reference(spec, layout):
    layer, params = make_reference(layout, spec)
    x = random_input(2, 75)
    y, cache = nn.jit(GatedDeltaNet)(make_config(spec)).apply({"params": params}, x)
    expected = run_reference(layer, x)
    assert cache is None
    assert expected.std() > 0.1
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_layer_in_bfloat16_is_as_close_to_float32_as_the_reference_is():
    spec = SPECS["groups of 2"]
    layer, params = make_reference("grouped", spec)
    x = random_input(2, 75)
    exact = run_reference(layer, x)
    layer.to(torch.bfloat16)
    with torch.no_grad():
        theirs = layer(torch.tensor(x).bfloat16()).float().numpy()
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (params, x))
    ours, _ = GatedDeltaNet(make_config(spec)).apply({"params": params}, x)
    assert ours.dtype == jnp.bfloat16
    ours = np.asarray(ours, np.float32)
    noise = np.sqrt(np.mean((theirs - exact) ** 2))
    assert noise < 0.02 * exact.std()
    assert np.sqrt(np.mean((ours - exact) ** 2)) < 1.1 * noise
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.6 * noise


def test_fresh_parameters_have_the_shapes_of_a_checkpoint():
    for spec in SPECS.values():
        module = GatedDeltaNet(make_config(spec))
        fresh = jax.jit(module.init)(jax.random.key(0), random_input(1, 1))["params"]
        _, params = make_reference("grouped", spec)
        assert jax.tree.map(jnp.shape, dict(fresh)) == jax.tree.map(np.shape, params)
        assert np.isfinite(fresh["A_log"]).all()
        assert len(set(np.asarray(fresh["A_log"]).tolist())) == spec.num_value_heads
        np.testing.assert_array_equal(fresh["dt_bias"], 1)
        np.testing.assert_array_equal(fresh["norm"]["weight"], 1)


@pytest.fixture(scope="module")
def model():
    spec = SPECS["groups of 2"]
    layer, params = make_reference("separate", spec)
    module = GatedDeltaNet(make_config(spec))

    @jax.jit
    def run(x, real=None, cache=None):
        return module.apply({"params": params}, x, real, cache)

    return run, lambda batch: init_delta_state(module.config, batch, jnp.float32), layer


def as_mask(rows):
    return np.array([[letter == "x" for letter in row] for row in rows])


def test_padding_anywhere_equals_each_row_alone(model):
    run, empty, layer = model
    real = as_mask(["xxxxxxxxxx", "xxxxx.....", "...xxxxxxx", ".x.xx..x.x", ".........."])
    x = random_input(*real.shape)
    # What stands at padding must not matter, not even a NaN.
    x[~real] = np.nan
    for cache in (None, empty(5)):
        y, after = run(x, real, cache)
        for row, mask in enumerate(real):
            if mask.any():
                alone = run_reference(layer, x[row, mask][None])[0]
                np.testing.assert_allclose(y[row, mask], alone, atol=1e-5)
        np.testing.assert_array_equal(y[~real], 0)
    for row, mask in enumerate(real[:4]):
        alone = run(x[row, mask][None], None, empty(1))[1]
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_allclose(a[row], b[0], atol=1e-5), after, alone
        )


def test_a_row_without_tokens_keeps_its_cache(model):
    run, empty, _ = model
    before = run(random_input(2, 6), None, empty(2))[1]
    for T in (1, 4):
        real = np.zeros((2, T), bool)
        real[1] = True
        after = run(random_input(2, T), real, before)[1]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), after, before)
        assert not np.allclose(after.state[1], before.state[1])


def test_tokens_one_by_one_equal_a_full_pass(model):
    run, empty, layer = model
    x = random_input(2, 12)
    expected = run_reference(layer, x)
    cache, outs = empty(2), []
    for t in range(12):
        y, cache = run(x[:, t : t + 1], None, cache)
        outs.append(y)
    np.testing.assert_allclose(np.concatenate(outs, 1), expected, atol=1e-5)
    whole = run(x, None, empty(2))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cache, whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_then_single_tokens_equal_each_row_alone(model, side):
    run, empty, layer = model
    lengths, total, more = [9, 2, 5], 9, 4
    x = random_input(3, total + more)
    prompt = np.full((3, total, HIDDEN), 7.0, np.float32)
    real = np.zeros((3, total), bool)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(total - length, total)
        prompt[row, at], real[row, at] = x[row, :length], True
    y, cache = run(prompt, real, empty(3))
    outs = [[y[row, real[row]]] for row in range(3)]
    for step in range(more):
        tokens = np.stack([x[row, length + step] for row, length in enumerate(lengths)])
        y, cache = run(tokens[:, None], None, cache)
        for row in range(3):
            outs[row].append(y[row])
    for row, length in enumerate(lengths):
        alone = run_reference(layer, x[row : row + 1, : length + more])[0]
        np.testing.assert_allclose(np.concatenate(outs[row]), alone, atol=1e-5)


def test_cache_keeps_its_types():
    spec = SPECS["groups of 2"]
    _, params = make_reference("separate", spec)
    module, x = GatedDeltaNet(make_config(spec)), jnp.asarray(random_input(2, 3), jnp.bfloat16)
    before = init_delta_state(module.config, 2, jnp.bfloat16)
    after = jax.eval_shape(lambda x, c: module.apply({"params": params}, x, None, c)[1], x, before)
    assert isinstance(after, DeltaState)
    assert after.state.dtype == jnp.float32
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), before)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == shapes


def test_no_mask_costs_nothing(model):
    run, empty, _ = model
    equations = primitives(jax.make_jaxpr(run)(random_input(2, 3), None, empty(2)).jaxpr)
    names = {equation.primitive.name for equation in equations}
    assert not names & {"gather", "scatter", "sort"}
