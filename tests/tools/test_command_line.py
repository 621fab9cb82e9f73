"""What every command line shares."""

import subprocess
import sys

import numpy as np
import safetensors.numpy

from tests.commands import ROOT, only_line
from tests.tools.conftest import refusal


def test_compiled_programs_are_kept_by_default(environment, checkpoint, tmp_path):
    environment = {**environment}
    for name in ("JAX_COMPILATION_CACHE_DIR", "HOME"):
        environment.pop(name, None)
    command = ["--model", str(checkpoint), "--prompt=x", "--max_new_tokens=2"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.generate", *command],
        env={**environment, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "qwen_jax" / "jax").iterdir())


def test_weights_that_are_not_numbers_are_warned_of_or_refused(run_tool, checkpoint, tmp_path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    # A token that the prompt does not hold, so that the text is not touched.
    weights["model.embed_tokens.weight"][5, 3] = np.nan
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    arguments = ["generate", f"--model={tmp_path}", "--prompt=x", "--max_new_tokens=1"]
    line = refusal(run_tool(*arguments, "--refuse_nonfinite"))
    assert "NaN" in line
    assert "model.embed_tokens.weight" in line
    done = run_tool(*arguments)
    assert done.returncode == 0, done.stderr
    line = only_line(done.stderr)
    assert line.startswith("warning: ")
    assert "model.embed_tokens.weight" in line
