"""The parts of a decode step: by hand-made traces and programs, and by a real one."""

import json
import math

import jax
import pytest

from qwen_jax.benchmark import profile
from qwen_jax.benchmark.profile import (
    Event,
    exclusive_seconds,
    part_of,
    parts_of,
    profile_decode,
    profile_prefill,
)
from qwen_jax.benchmark.programs import compiled_anew, first_layers, lower_decode
from qwen_jax.errors import UserError
from qwen_jax.hf_config import load_config
from qwen_jax.sharding.hlo.text import read_module
from tests.reference import random_reference, save_reference
from tests.tools.conftest import refusal

STEP = "jit(_decode_step)"
UP = "params['layers_0']['mlp']['up_proj']['weight']"
LAYER = f"{STEP}/Decoder/Decoder._run_layers/layer_3/jit(core_fn)/layers_0"


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        (f"{LAYER}/self_attn/k_proj/dot_general", profile.QKV),
        (f"{LAYER}/self_attn/gate_proj/dot_general", profile.QKV),
        (f"{LAYER}/self_attn/self_attn._attend/scatter", profile.ATTENTION),
        ("state.cache.layers[3].keys", profile.ATTENTION),
        (f"{LAYER}/self_attn/q_norm/rsqrt", profile.REST),
        (f"{LAYER}/self_attn/o_proj/dot_general", profile.OUTPUT),
        (f"{LAYER}/linear_attn/q_proj/dot_general", profile.QKV),
        (f"{LAYER}/linear_attn/q_conv/mul", profile.ATTENTION),
        (f"{LAYER}/linear_attn/out_proj/dot_general", profile.OUTPUT),
        (f"{LAYER}/mlp/gate_proj/dot_general", profile.GATE_UP),
        (f"{LAYER}/mlp/shared_expert/up_proj/dot_general", profile.GATE_UP),
        ("params['layers_12']['mlp']['down_proj']['weight']", profile.DOWN),
        (f"{LAYER}/mlp/experts/dot_general", profile.EXPERTS),
        (f"{LAYER}/mlp/mul", profile.REST),
        (f"{STEP}/Decoder/Decoder._output/Decoder.read/jit(linear)/dot_general", profile.HEAD),
        (f"{STEP}/Decoder/jit(_embed)/jit(_take)/gather", profile.REST),
        (f"{STEP}/reduce_max", profile.SAMPLING),
        (f"{STEP}", profile.REST),
        ("", profile.REST),
    ],
)
def test_names_are_put_to_the_parts_of_the_model(op_name, part):
    assert part_of(op_name) == part


def test_a_program_without_names_is_told_by_what_its_products_read():
    module = read_module(
        f"""HloModule jit_step

%fused (a: f32[8], b: f32[8,8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %b = f32[8,8]{{1,0}} parameter(1)
  ROOT %dot.2 = f32[8]{{0}} dot(%a, %b), metadata={{op_name="{LAYER}/mlp/down_proj/dot_general"}}
}}

%nameless (c: f32[8]) -> f32[8] {{
  %c = f32[8]{{0}} parameter(0)
  ROOT %add.2 = f32[8]{{0}} add(%c, %c)
}}

ENTRY %main (x: f32[8], w: f32[8,8], v: f32[8,8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0), metadata={{op_name="x"}}
  %w = f32[8,8]{{1,0}} parameter(1), metadata={{op_name="{UP}"}}
  %v = f32[8,8]{{1,0}} parameter(2), metadata={{op_name="params['embed_tokens']['weight']"}}
  %norm = f32[8]{{0}} multiply(%x, %x), metadata={{op_name="{LAYER}/input_layernorm/mul"}}
  %copy.1 = f32[8,8]{{0,1}} copy(%w)
  %dot.1 = f32[8]{{0}} dot(%norm, %copy.1)
  %fusion.1 = f32[8]{{0}} fusion(%dot.1, %w), calls=%fused, metadata={{op_name="{LAYER}/add"}}
  %fusion.2 = f32[8]{{0}} fusion(%fusion.1), kind=kLoop, calls=%nameless
  ROOT %dot.3 = f32[8]{{0}} dot(%fusion.2, %v)
}}
"""
    )
    parts = parts_of(module)
    assert {name: parts[name] for name in ("norm", "dot.1", "fusion.1", "fusion.2", "dot.3")} == {
        "norm": profile.REST,
        "dot.1": profile.GATE_UP,
        "fusion.1": profile.DOWN,
        "fusion.2": profile.DOWN,
        "dot.3": profile.HEAD,
    }


def test_time_is_of_what_is_innermost_and_shared_by_what_runs_at_once():
    second = 1e9
    outer, inner, later = Event("a", 0, 10), Event("b", 2, 5), Event("c", 12, 16)
    other = Event("d", 14, 20)
    lines = [[later, inner, outer], [other]]
    lines = [[Event(e.name, e.start * second, e.end * second) for e in line] for line in lines]
    found = exclusive_seconds(lines)
    assert found == pytest.approx({"a": 7, "b": 3, "c": 2 + 1, "d": 1 + 4})
    assert sum(found.values()) == pytest.approx(10 + 8)
    # The same operation twice at once, and one with a twin of the same length within it.
    twice = [Event("a", 0, second), Event("b", 0, second)]
    assert exclusive_seconds([twice, [Event("b", 0, second)]]) == pytest.approx({"a": 0, "b": 1})
    assert exclusive_seconds([]) == {}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_next"])
def test_a_step_is_told_by_its_parts(tmp_path, family):
    config = load_config(save_reference(random_reference(family), tmp_path / family))
    decodes = profile_decode(config, rows=2, filled=20, steps=3, repeats=2)
    for found in (*decodes, *profile_prefill(config, rows=2, length=24, repeats=1)):
        assert math.isclose(sum(found.parts.values()), found.step, rel_tol=1e-6)
        assert 0 < found.parts[profile.HOST] < found.step
        wanted = {*profile.PARTS, profile.HOST} - {profile.EXPERTS}
        if family != "qwen3":
            wanted |= {profile.EXPERTS}
        if family == "qwen3_moe":
            wanted -= {profile.GATE_UP, profile.DOWN}
        assert {part for part, seconds in found.parts.items() if seconds > 0} == wanted


def test_without_steps_the_command_tells_the_parts_of_the_prefill(run_tool, tiny, tmp_path):
    arguments = (f"--model={tiny}", f"--workdir={tmp_path}", "--workload=profile")
    arguments += ("--prompt_tokens=20", "--decode_tokens=0", "--repeats=1")
    result = run_tool("benchmark", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"| {profile.ATTENTION} |" in result.stdout
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_every_product_has_a_part(tiny):
    config = load_config(tiny)
    with compiled_anew():
        module = read_module(lower_decode(config, 1, 64).compile().as_text())
    parts = parts_of(module)
    found = [parts[i.name] for i in module.entry.instructions if i.opcode == "dot"]
    assert profile.REST not in found
    assert found.count(profile.QKV) == 2 * 3
    assert found.count(profile.HEAD) == 1


def test_a_trace_without_operations_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(profile, "read_trace", lambda *_: [])
    with pytest.raises(UserError, match="has no operations of jit__decode_step on cpu"):
        profile_decode(load_config(tiny), 1, 8, 1, 1)


def test_the_command_prints_the_parts_and_draws_them(run_tool, tiny, tmp_path):
    arguments = (f"--model={tiny}", f"--workdir={tmp_path}", "--workload=profile", "--layers=1")
    arguments += ("--prompt_tokens=9", "--decode_tokens=2", "--repeats=2")
    result = run_tool("benchmark", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    header, _, *rows, whole, _, note = result.stdout.splitlines()
    assert header == "| part | ms a step | % of the step |"
    assert whole.startswith("| whole step |")
    assert note.startswith("without the profiler a step takes ")
    names = [row.split("|")[1].strip() for row in rows]
    assert names == [part for part in profile.PARTS if part in names]
    assert profile.HOST in names
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert [record["workload"] for record in records] == ["profile"] * 2
    assert all(record["git"] and record["layers"] == 1 for record in records)
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "profile.md").read_text() == result.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--layers=3", "--layers=3 is more than the model's 2"),
        ("--workload=growth --decode_tokens=0", "--decode_tokens=0: --workload=growth decodes"),
    ],
)
def test_sizes_that_no_step_has_are_refused(run_tool, tiny, tmp_path, flag, message):
    arguments = (
        f"--model={tiny}",
        f"--workdir={tmp_path / 'out'}",
        "--workload=profile",
        *flag.split(),
    )
    assert refusal(run_tool("benchmark", *arguments, *flag.split())).startswith(message)
    assert not (tmp_path / "out").exists()


def test_the_first_layers_keep_their_share_of_the_vocabulary(tiny):
    config = load_config(tiny)
    cut = first_layers(config, 1)
    assert (cut.num_hidden_layers, cut.vocab_size) == (1, config.vocab_size // 2)
    assert first_layers(config, 2).vocab_size == config.vocab_size


def test_compiling_anew_leaves_the_cache_as_it_was():
    before = jax.config.jax_enable_compilation_cache
    with pytest.raises(ZeroDivisionError), compiled_anew():
        assert not jax.config.jax_enable_compilation_cache
        _ = 1 / 0
    assert jax.config.jax_enable_compilation_cache == before
