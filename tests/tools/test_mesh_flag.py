"""`--mesh`: the same output from several devices, and bad meshes in one line."""

import pytest

from tests.tools.conftest import refusal

PROMPTS = ("--prompt=the sky", "--prompt=Hi", "--prompt=three words here", "--max_new_tokens=4")


def test_text_from_four_devices_is_that_from_one(run_tool, checkpoint):
    arguments = ("generate", f"--model={checkpoint}", *PROMPTS, "--temperature=0")
    alone = run_tool(*arguments)
    assert alone.returncode == 0, alone.stderr
    shared = run_tool(*arguments, "--mesh=fsdp:2,tensor:2", JAX_NUM_CPU_DEVICES="4")
    assert (shared.returncode, shared.stderr) == (0, alone.stderr)
    assert shared.stdout == alone.stdout


def test_a_checkpoint_is_verified_on_a_mesh(run_tool, checkpoint):
    arguments = (f"--model={checkpoint}", "--tokens=11", "--mesh=context:2,tensor:2")
    result = run_tool("verify", *arguments, JAX_NUM_CPU_DEVICES="4")
    assert result.returncode == 0, result.stderr
    assert "logits" in result.stdout


@pytest.mark.parametrize(
    ("tool", "mesh", "said"),
    [
        ("generate", "tensor:2", "needs 2 devices, here are 1"),
        ("embed", "rows:2", "axis rows is unknown"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(run_tool, checkpoint, tmp_path, tool, mesh, said):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the sky"}\n')
    own = PROMPTS if tool == "generate" else (f"--input={texts}", f"--workdir={tmp_path / 'out'}")
    line = refusal(run_tool(tool, f"--model={checkpoint}", *own, f"--mesh={mesh}"))
    assert f"mesh {mesh}" in line
    assert said in line
