"""Plans of small models against closed forms, and compiled for TPUs that are not here."""

import dataclasses
import json

import jax
import pytest

from configs.models import get_preset
from qwen_jax.errors import UserError
from qwen_jax.sharding import aot
from qwen_jax.sharding.axes import read_mesh
from qwen_jax.sharding.chips import read_topology
from qwen_jax.sharding.jobs import Job
from qwen_jax.sharding.plan import compile_plan, estimate, place_of, sweep
from qwen_jax.training.objective import TrainOptions

needs_libtpu = pytest.mark.skipif(
    not aot.has_compiler(), reason="libtpu is not installed (requirements-dev.txt)"
)

DENSE = get_preset("qwen3-0.6b")
# What its checkpoint holds, counted from the published shapes.
DENSE_PARAMETERS = 596_049_920
SHORT = dataclasses.replace(DENSE.with_layers(range(2)), vocab_size=1024)
EXPERTS = dataclasses.replace(
    get_preset("qwen3-30b-a3b").with_layers(range(2)), vocab_size=1024, hidden_size=512
)


def job_of(config, topology, mesh, mode, batch, length, **options):
    sizes = tuple(read_mesh(mesh).items())
    options = TrainOptions(**options)
    return Job(config, read_topology(topology), sizes, mode, batch, length, options)


def cache_bytes(config, batch, length):
    keys = 2 * batch * length * config.num_key_value_heads * config.head_dim * 2
    # Positions and ids of slots, three numbers a row.
    return config.num_hidden_layers * keys + 4 * (2 * batch * length + 3 * batch)


def test_memory_before_the_program_starts_is_that_of_the_shapes():
    plan = estimate(job_of(DENSE, "v5e:1x1", "data:1", "decode", 8, 4096))
    assert plan.memory == {
        "parameters": 2 * DENSE_PARAMETERS,
        "cache": cache_bytes(DENSE, 8, 4096),
    }
    assert plan.fits
    assert plan.bound == "memory"
    assert plan.step_seconds == pytest.approx(sum(plan.memory.values()) / 819e9)
    assert plan.traced_flops == pytest.approx(sum(plan.flops_by_part.values()))


def test_a_mesh_divides_parameters_and_cache():
    whole = estimate(job_of(SHORT, "v5e:1x1", "data:1", "decode", 8, 4096)).memory
    cut = estimate(job_of(SHORT, "v5e:2x4", "data:2,tensor:4", "decode", 8, 4096)).memory
    assert cut["parameters"] == pytest.approx(whole["parameters"] / 4, rel=1e-3)
    assert cut["cache"] == pytest.approx(whole["cache"] / 8, rel=1e-2)


def test_a_cache_that_is_too_large_does_not_fit_and_is_named():
    plan = estimate(job_of(DENSE, "v5e:1x1", "data:1", "decode", 64, 4096))
    assert not plan.fits
    assert plan.needed - plan.available == 2 * DENSE_PARAMETERS + cache_bytes(
        DENSE, 64, 4096
    ) - int(15.75 * 2**30)
    assert plan.advice.startswith("most of it is cache: fewer rows")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": "tensor:2"}, "mesh tensor:2 has 2 devices, topology v5e:2x2 has 4 chips"),
        ({"topology": "v5e:4x8", "mesh": "tensor:32"}, "heads do not divide by tensor:32"),
        ({"batch": 0}, "batch = 0 must be at least 1"),
        ({"length": 0}, "length = 0 must be at least 1"),
    ],
)
def test_a_job_that_is_none_is_refused_in_one_line(change, message):
    fields = {"topology": "v5e:2x2", "mesh": "tensor:4", "batch": 1, "length": 16, **change}
    job = job_of(
        SHORT, fields["topology"], fields["mesh"], "decode", fields["batch"], fields["length"]
    )
    with pytest.raises(UserError) as error:
        estimate(job)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_libtpu_compiling_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(aot, "has_compiler", lambda: False)
    with pytest.raises(UserError, match="pip install libtpu"):
        compile_plan(job_of(SHORT, "v5e:1x1", "data:1", "decode", 1, 16))


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (29.50G) exceeds available HBM (15.75G).",
            (int(29.5 * 2**30), int(15.75 * 2**30)),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 512.00M of 15.75G hbm. Exceeded hbm capacity by 1K.",
            (512 * 2**20, int(15.75 * 2**30)),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", None),
        ("INTERNAL: (29.50G) exceeds available HBM (15.75G)", None),
    ],
)
def test_the_compiler_s_message_is_read(message, needed):
    assert aot.read_exhausted(message) == needed


@pytest.mark.parametrize(
    ("op_name", "place"),
    [
        (
            "jit(decode_step)/Decoder/Decoder._run_layers/layer_12/jit(core_fn)/layers_12/mlp/"
            "down_proj/jit(linear)/dot_general",
            "layers/mlp/down_proj",
        ),
        ("jit(step)/layers_0/mlp/up_proj/cond/branch_0_fun/dot_general", "layers/mlp/up_proj"),
        ("jit(step)/transpose(jvp())/while/body/layers_0/mlp/add", "backward layers/mlp"),
        ("", "elsewhere"),
    ],
)  # fmt: skip
def test_places_have_no_numbers(op_name, place):
    assert place_of(op_name) == place


@needs_libtpu
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_decode_step_copies_neither_cache_nor_weights(batch):
    """The widths are those published, so that each layer's temporaries are."""
    config = dataclasses.replace(SHORT, vocab_size=DENSE.vocab_size)
    job = job_of(config, "v5e:1x1", "data:1", "decode", batch, 4096)
    plan = compile_plan(job)
    assert plan.fits
    # One row by a matrix is spelled out, and widening each number counted as an operation too.
    if batch > 1:
        assert plan.xla_flops == pytest.approx(plan.traced_flops, rel=0.05)
    assert plan.memory["cache"] == cache_bytes(config, batch, 4096)
    assert plan.memory["temporaries"] <= 0.05 * plan.memory["cache"] + 64e6
    assert plan.weight_reads == pytest.approx(1, abs=0.01)
    assert plan.weight_copies < 1e4
    assert plan.cache_copies == 0
    assert plan.memory["outputs"] < 1e5
    assert sum(plan.memory.values()) == plan.needed
    assert plan.traffic == ()
    json.dumps(dataclasses.asdict(plan))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize(
    ("model", "topology", "mesh"),
    [
        ("qwen3-0.6b", "v6e:1x1", "data:1"),
        ("qwen3-32b", "v6e:2x2", "tensor:4"),
        ("qwen3-coder-30b-a3b-instruct", "v6e:2x2", "tensor:4"),
        ("qwen3.5-27b", "v6e:2x2", "tensor:4"),
        ("qwen3-next-80b-a3b-instruct", "v6e:2x4", "tensor:8"),
    ],
)
def test_whole_models_decode_within_the_bound(model, topology, mesh, batch):
    job = job_of(get_preset(model), topology, mesh, "decode", batch, 2048)
    with jax.default_matmul_precision("default"):  # As users have it, and other tests do not.
        plan = compile_plan(job, with_xla_flops=False)
    cache = plan.memory["cache"]
    print(f"{model} at {batch}: {plan.memory['temporaries'] / 1e6:.0f} MB, cache {cache / 1e6:.0f}")
    assert plan.fits
    assert plan.memory["temporaries"] <= 0.05 * cache + 64e6
    assert plan.weight_reads == pytest.approx(1, abs=0.01)
    assert plan.weight_copies == 0
    assert plan.cache_copies <= 0.01 * cache


@needs_libtpu
@pytest.mark.parametrize("batch", [8, 64])
def test_a_decode_step_copies_no_experts(batch):
    """Of the widths published: what XLA copies for a product over groups depends on them."""
    layer = get_preset("qwen3-30b-a3b").with_layers(range(1))
    config = dataclasses.replace(layer, vocab_size=1024)
    job = job_of(config, "v5e:1x1", "data:1", "decode", batch, 1024)
    plan = compile_plan(job, with_xla_flops=False)
    assert plan.memory["temporaries"] <= 0.05 * plan.memory["cache"] + 64e6
    assert plan.weight_copies < 1e4


@needs_libtpu
def test_a_decode_step_over_tensor_sums_twice_a_layer():
    job = job_of(SHORT, "v5e:2x2", "tensor:4", "decode", 8, 1024)
    plan = compile_plan(job, with_xla_flops=False)
    layers = {t.place: t for t in plan.traffic if t.place.startswith("layers/")}
    assert set(layers) == {"layers/self_attn/o_proj", "layers/mlp/down_proj"}
    for each in layers.values():
        assert (each.kind, each.times) == ("all-reduce", 2)
        # Of [8, D], in bfloat16 or in float32.
        assert each.bytes in (2 * 8 * SHORT.hidden_size * size for size in (2, 4))
    assert plan.seconds["interconnect"] > 0


@needs_libtpu
def test_what_the_compiler_refuses_says_by_how_much():
    plan = compile_plan(job_of(SHORT, "v5e:1x1", "data:1", "decode", 64, 65536))
    taken = plan.memory["parameters"] + plan.memory["cache"]
    assert not plan.fits
    assert plan.available == int(15.75 * 2**30)
    # The compiler rounds to hundredths of a GiB.
    assert taken - 2**30 / 100 < plan.needed < 1.1 * taken
    assert "most of it is cache" in plan.advice


@needs_libtpu
def test_a_train_step_without_remat_computes_what_the_formula_says():
    job = job_of(SHORT, "v5e:2x2", "fsdp:2,tensor:2", "train", 16, 128, remat="none", scan=False)
    plan = compile_plan(job)
    analytic = sum(plan.flops_by_part.values())
    assert plan.xla_flops == pytest.approx(analytic, rel=0.1)
    assert plan.traced_flops == pytest.approx(analytic, rel=0.1)
    # Adam keeps two numbers a parameter, and a count.
    assert plan.memory["optimiser"] == pytest.approx(2 * plan.memory["parameters"], rel=1e-3)
    kinds = {each.kind for each in plan.traffic}
    assert "all-gather" in kinds
    assert kinds & {"reduce-scatter", "all-reduce"}
    assert plan.counts_all


@needs_libtpu
def test_a_sweep_puts_the_fastest_mesh_that_fits_first():
    job = job_of(EXPERTS, "v5e:1x2", "data:1", "decode", 2, 512)
    done = []
    plans = sweep(job, lambda jobs: done.extend(jobs) or jobs)
    assert {plan.mesh for plan in plans} == {"data:2", "expert:2", "tensor:2"} & {
        plan.mesh for plan in plans
    }
    assert len(done) == len(plans) >= 2
    times = [plan.step_seconds for plan in plans if plan.fits]
    assert times == sorted(times)
    # Copies of the model read all of it; shares of it are read by each its own.
    assert plans[-1].mesh == "data:2"
