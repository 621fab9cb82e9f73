"""`python -m tools.plan`: a plan printed, written and drawn; refusals in one line."""

import json

import pytest

from qwen_jax.sharding import aot
from tests.tools.conftest import refusal

needs_libtpu = pytest.mark.skipif(
    not aot.has_compiler(), reason="libtpu is not installed (requirements-dev.txt)"
)


@pytest.fixture
def without_libtpu(tmp_path):
    """An environment in which libtpu cannot be found."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['libtpu'] = None\n")
    return {"PYTHONPATH": str(tmp_path)}


@needs_libtpu
def test_a_plan_is_printed_written_and_drawn(run_tool, checkpoint, tmp_path):
    files = {name: tmp_path / f"plan.{name}" for name in ("json", "png")}
    done = run_tool(
        "plan",
        f"--model={checkpoint}",
        "--topology=v5e:1x2",
        "--mesh=tensor:2",
        "--mode=decode",
        "--batch=3",
        "--length=128",
        f"--json={files['json']}",
        f"--picture={files['png']}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith("on v5e:1x2: mesh tensor:2, batch 3, length 128")
    assert lines[1] == "fits: yes"
    for word in ("parameters", "cache", "temporaries", "formula", "traced", "XLA", "all-reduce"):
        assert any(line.startswith(f"  {word}") for line in lines), word
    plan = json.loads(files["json"].read_text())
    assert plan["model"] == str(checkpoint)
    assert (plan["fits"], plan["mesh"], plan["sweep"]) == (True, "tensor:2", [])
    assert sum(plan["memory"].values()) == plan["needed"]
    assert plan["step_seconds"] == plan["seconds"][plan["bound"]]
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_without_libtpu_the_analytic_part_is_printed(run_tool, without_libtpu):
    done = run_tool(
        "plan", "--model=qwen3-8b", "--topology=v5e:2x2", "--batch=64", **without_libtpu
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, title, fits, why, *_ = done.stdout.splitlines()
    assert first.endswith("pip install libtpu==0.0.42")
    assert title == "decode of qwen3-8b on v5e:2x2: mesh tensor:4, batch 64, length 4096"
    assert fits == "fits: yes"
    assert why.startswith("memory, GiB of 15.75: ")


def test_what_does_not_fit_says_by_how_much_and_exits_0(run_tool, without_libtpu):
    done = run_tool("plan", "--model=qwen3-32b", "--topology=v5e:1x1", **without_libtpu)
    assert (done.returncode, done.stderr) == (0, "")
    _, _, fits, why, *_ = done.stdout.splitlines()
    assert fits == "fits: no"
    # 32.76 billion parameters in bfloat16 and 64 layers' cache of 4096 slots.
    missing = (2 * 32_762_123_264 + 64 * 2 * 4096 * 8 * 128 * 2) / 2**30 - 15.75
    assert why == (
        f"  {missing:.2f} GiB a chip too much; most of it is parameters: "
        "a larger tensor axis or more chips"
    )


def test_an_int8_cache_makes_a_plan_fit(run_tool, without_libtpu):
    flags = ("--model=qwen3-8b", "--topology=v5e:2x2", "--batch=96", "--length=4096")
    wide = run_tool("plan", *flags, **without_libtpu).stdout.splitlines()
    done = run_tool("plan", *flags, "--cache_dtype=int8", **without_libtpu)
    assert (done.returncode, done.stderr) == (0, "")
    narrow = done.stdout.splitlines()
    assert (wide[2], narrow[2]) == ("fits: no", "fits: yes")
    assert narrow[1].startswith("decode of qwen3-8b on v5e:2x2 with a cache in int8: mesh tensor:4")

    def cache(lines):
        (line,) = [line for line in lines if line.startswith("  cache ")]
        return float(line.split()[1])

    # 36 layers, 2 of the 8 heads on a chip, keys and values: 128 numbers and a scale.
    heads = 96 * 4096 * 36 * 2 * 2
    assert cache(wide) == pytest.approx(heads * 256 / 2**30, abs=0.02)
    assert cache(narrow) == pytest.approx(heads * 132 / 2**30, abs=0.02)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e"], "topology v5e: give a generation"),
        (["--topology=v5e:2x2", "--mesh=tensor:2"], "mesh tensor:2 has 2 devices"),
        (["--topology=v5e:2x2", "--mesh=wide:4"], "axis wide is unknown"),
        (["--topology=v5e:2x2", "--mesh=tensor:4", "--sweep"], "--mesh is not for --sweep"),
        (["--topology=v5e:2x2", "--json=/nowhere/plan.json"], "/nowhere/plan.json: cannot be"),
        (["--topology=v5e:2x2", "--model=qwen3-0.7b"], "preset 'qwen3-0.7b' is unknown"),
        (["--topology=v5e:2x2", "--cache_dtype=int4"], "flag --cache_dtype=int4: value should be"),
        (["--topology=v5e:2x2", "--cache_dtype=int8", "--mode=train"], "training has no cache"),
        ([], "--topology is needed"),
    ],
)
def test_flags_that_make_no_plan_are_refused(run_tool, flags, message):
    if not any(flag.startswith("--model") for flag in flags):
        flags = ["--model=qwen3-0.6b", *flags]
    assert message in refusal(run_tool("plan", *flags))
