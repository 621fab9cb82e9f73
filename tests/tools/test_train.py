"""Runs in child processes: killed and started again, stopped, damaged, refused."""

import os
import re
import resource
import shutil
import signal
import time

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from tests.commands import only_line
from tests.reference import random_reference, save_reference
from tests.tools.conftest import start_tool, train_log
from tests.training.data.conftest import chat_file, text_file, write_tokenizer

# So many that a run is still under way when a test that watches its log acts on it.
STEPS = 21

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{
        "model": {model!r},
        "data": {{
            "sources": (
                {{"path": {texts!r}, "weight": 2.0}},
                {{"path": {chats!r}, "weight": 1.0, "too_long": "truncate"}},
            ),
            "length": 48, "batch_size": 4, "packing_rows": 3, "threads": 2,
        }},
        "eval_data": {{"sources": ({{"path": {texts!r}}},), "length": 48, "epochs": 1}},
        "optimiser": {{"learning_rate": 1e-2, "warmup_steps": 2}},
        "step": {{"dtype": "float32", "scan": False, "remat": "none"}},
        "loop": {{"num_steps": {steps}, "checkpoint_every": 2, "eval_every": 4}},
        "mesh": None,
        "lora": None,
    }})
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("train")
    reference = random_reference("qwen3", num_hidden_layers=2, vocab_size=320)
    model = save_reference(reference, directory / "model")
    write_tokenizer(model)
    text = CONFIG.format(
        model=str(model),
        texts=text_file(directory / "texts.jsonl", 60),
        chats=chat_file(directory / "chats.jsonl", 40),
        steps=STEPS,
    )
    path = directory / "config.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def start(environment):
    def run(config, workdir, *more, **changes):
        arguments = (f"--config={config}", f"--workdir={workdir}", *more)
        return start_tool({**environment, **changes}, "train", *arguments)

    return run


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out.decode(), err.decode()


def checkpoints(workdir):
    """The steps of those that are complete."""
    folders = (workdir / "checkpoints").glob("*")
    return sorted(int(path.name) for path in folders if path.name.isdecimal())


def incomplete(workdir):
    # Orbax's name for what is not complete.
    return list((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def losses(workdir):
    return [
        (row["step"], row["loss"], row["tokens"]) for row in train_log(workdir) if "loss" in row
    ]


def weights(workdir):
    return safetensors.numpy.load_file(workdir / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(start, config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    code, out, err = finish(start(config, workdir))
    assert code == 0, err
    (workdir / "told.txt").write_text(out)
    return workdir


def told(out):
    """Of each line of the summary with its sizes: numbers, and megabytes a device."""
    lines = re.findall(r"^(.+): ([\d,]+) numbers, ([\d,.]+) MB a device$", out, re.MULTILINE)
    return {name: (int(n.replace(",", "")), float(m.replace(",", ""))) for name, n, m in lines}


def count(tensors):
    return sum(tensor.size for tensor in tensors.values())


def test_the_summary_counts_what_is_trained(unbroken):
    out = (unbroken / "told.txt").read_text()
    numbers = count(weights(unbroken))
    sizes = told(out)
    # Float32, and AdamW's two moments and its counters.
    assert sizes.keys() == {"parameters trained", "optimiser"}
    assert sizes["parameters trained"] == (numbers, pytest.approx(4e-6 * numbers, abs=0.051))
    moments, megabytes = sizes["optimiser"]
    assert 2 * numbers <= moments < 2 * numbers + 10
    assert megabytes == pytest.approx(8e-6 * numbers, abs=0.051)
    assert f"gradients: {4e-6 * numbers:.1f} MB in all; mesh: one device" in out
    assert "step: 4 rows of 48, 192 tokens, " in out
    assert f" TFLOP; {STEPS} steps, {192 * STEPS:,} tokens" in out


def test_a_run_leaves_a_model_that_transformers_loads_and_its_curve(unbroken):
    assert [step for step, *_ in losses(unbroken)] == list(range(1, STEPS + 1))
    assert (unbroken / "loss.png").stat().st_size > 5000
    evaluations = [row for row in train_log(unbroken) if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [4, 8, 12, 16, 20, 21]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    model = transformers.AutoModelForCausalLM.from_pretrained(unbroken / "model")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert (unbroken / "model" / "tokenizer_config.json").exists()
    assert not list(unbroken.glob("*.tmp"))


@pytest.mark.parametrize("moment", ["step 1", "step 5", "step 14", "a save"])
def test_a_killed_run_ends_as_an_unbroken_one(start, config, unbroken, tmp_path, moment):
    """With -s it prints a row of a table: what was there at the kill, and what came of it."""
    process = start(config, tmp_path)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if moment == "a save":
            if incomplete(tmp_path):
                # It may have ended since: what stands still cannot.
                process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                if incomplete(tmp_path):
                    break
                process.send_signal(signal.SIGCONT)
        elif any(row["step"] >= int(moment.split()[1]) for row in train_log(tmp_path)):
            break
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    if moment == "a save":
        assert incomplete(tmp_path)
    made = len(losses(tmp_path))
    saved = checkpoints(tmp_path)
    code, _, err = finish(start(config, tmp_path))
    assert code == 0, err
    assert losses(tmp_path) == losses(unbroken)
    assert not incomplete(tmp_path)
    print(
        f"\n| {moment} | {made} of {STEPS} | {max(saved, default='none')} "
        f"| {losses(tmp_path)[-1][1]:.9f} | {losses(unbroken)[-1][1]:.9f} |"
    )
    ours, expected = weights(tmp_path), weights(unbroken)
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def test_a_checkpoint_that_finds_no_room_ends_the_run_and_leaves_it_whole(
    start, config, unbroken, tmp_path
):
    # Nor would compiled programs find room, of which JAX warns.
    process = start(config, tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    # The system refuses what a file would hold beyond this, as a full disk does.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
    code, _, err = finish(process)
    assert code == 1, err
    line = only_line(err)
    assert f"{tmp_path / 'checkpoints'}: a checkpoint cannot be written" in line
    assert "make room there and start the run again" in line
    assert not (tmp_path / "model").exists()
    code, _, err = finish(start(config, tmp_path))
    assert code == 0, err
    assert losses(tmp_path) == losses(unbroken)
    for name, tensor in weights(tmp_path).items():
        np.testing.assert_array_equal(tensor, weights(unbroken)[name], err_msg=name)


def test_sigterm_saves_and_leaves_and_the_run_goes_on(start, config, unbroken, tmp_path):
    # No other checkpoint that it could go on from.
    process = start(config, tmp_path, "--config.loop.checkpoint_every=1000")
    while process.poll() is None and not any(row["step"] >= 2 for row in train_log(tmp_path)):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143, err
    line = rf"stopped at step (\d+) of {STEPS}, which is saved; start it again to go on\n"
    stopped = int(re.fullmatch(line, err)[1])
    assert checkpoints(tmp_path) == [stopped]
    assert losses(tmp_path)[-1][0] == stopped
    assert not (tmp_path / "model").exists()
    code, _, err = finish(start(config, tmp_path))
    assert code == 0, err
    assert losses(tmp_path) == losses(unbroken)
    for name, tensor in weights(tmp_path).items():
        np.testing.assert_array_equal(tensor, weights(unbroken)[name], err_msg=name)


def test_a_run_on_a_mesh_learns_what_one_device_does(start, config, unbroken, tmp_path):
    process = start(
        config,
        tmp_path,
        "--config.mesh=fsdp:2,tensor:2",
        "--config.loop.keep=100",
        JAX_NUM_CPU_DEVICES="4",
    )
    code, out, err = finish(process)
    assert code == 0, err
    assert "mesh: fsdp:2,tensor:2" in out
    numbers, megabytes = told(out)["parameters trained"]
    assert numbers == count(weights(unbroken))
    # Norms are on every device.
    assert 1e-6 * numbers - 0.051 <= megabytes < 1.2e-6 * numbers + 0.051
    on_the_mesh = losses(tmp_path)
    np.testing.assert_allclose(on_the_mesh, losses(unbroken), rtol=1e-4)
    # As if it had been stopped behind step 14, it goes on without the mesh.
    for step in checkpoints(tmp_path):
        if step > 14:
            shutil.rmtree(tmp_path / "checkpoints" / str(step))
    code, out, err = finish(start(config, tmp_path))
    assert code == 0, err
    assert "mesh: one device" in out
    assert losses(tmp_path)[:14] == on_the_mesh[:14]
    np.testing.assert_allclose(losses(tmp_path), losses(unbroken), rtol=1e-4)


def test_data_that_ends_too_soon_is_named(start, config, tmp_path):
    chats = config.parent / "chats.jsonl"
    code, _, err = finish(
        start(
            f"configs/train/lora.py:{chats}",
            tmp_path,
            f"--config.model={config.parent / 'model'}",
            "--config.data.epochs=1",
            "--config.data.length=256",
            "--config.step.dtype=float32",
        )
    )
    assert code == 1
    assert "of 500; give more epochs (None for ever) or fewer steps" in err


def test_a_recipe_trains_adapters_that_peft_reads(start, config, tmp_path):
    """The recipe of adapters, on a small model and few chats."""
    base, chats = config.parent / "model", config.parent / "chats.jsonl"
    code, out, err = finish(
        start(
            f"configs/train/lora.py:{chats}",
            tmp_path,
            f"--config.model={base}",
            "--config.loop.num_steps=3",
            "--config.optimiser.warmup_steps=1",
            "--config.data.length=256",
            "--config.data.batch_size=2",
            "--config.step.dtype=float32",
            "--profile",
        )
    )
    assert code == 0, err
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    sizes, adapter = told(out), tmp_path / "adapter" / "adapter_model.safetensors"
    matrices = safetensors.numpy.load_file(adapter)
    assert sizes["parameters trained"][0] == count(matrices)
    # The scale of a pair of matrices is not trained.
    frozen = count(safetensors.numpy.load_file(base / "model.safetensors")) + len(matrices) // 2
    assert sizes["parameters frozen"][0] == frozen
    assert sorted(step for step, *_ in losses(tmp_path)) == [1, 2, 3]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    with_adapter = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert (with_adapter(ids).logits - before).abs().max() > 1e-6


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    start, config, unbroken, tmp_path
):
    code, _, err = finish(start(config, tmp_path, f"--config.loop.num_steps={STEPS - 1}"))
    assert code == 0, err
    directory, shorter = tmp_path / "checkpoints", weights(tmp_path)
    before, newest = checkpoints(tmp_path)[-2:]
    assert newest == STEPS - 1
    for file in (directory / str(newest) / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, _, err = finish(start(config, tmp_path))
    assert code == 0, err
    assert f"{newest}: cannot be read" in err
    assert f"the run goes on from step {before}" in err
    assert (directory / "damaged" / str(newest)).is_dir()
    # The model is that of the last step, not the one that the shorter run had left.
    assert losses(tmp_path)[-1][0] == STEPS
    assert any((shorter[name] != tensor).any() for name, tensor in weights(tmp_path).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimiser.lerning_rate=1"], "did you mean learning_rate?"),
        (["--config.loop.num_steps=0"], "config.loop: num_steps = 0 must be at least 1"),
        (["--config.optimiser.name=lion"], "'lion' is not known; known: adamw, muon, adafactor"),
        (["--config.mesh=fsdp:3000"], "mesh fsdp:3000 needs 3000 devices"),
        (["--config.preset=qwen3-0.6b"], "from_scratch is not set: sizes alone have no parameters"),
    ],
)
def test_bad_settings_end_in_one_line(start, config, tmp_path, arguments, message):
    code, _, err = finish(start(config, tmp_path, *arguments))
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1


def test_what_a_recipe_refuses_ends_in_its_own_line(start, tmp_path):
    code, out, err = finish(start("configs/train/pretrain.py:nonsense", tmp_path))
    assert (code, out) == (1, "")
    stages = "general, reasoning, long, 64k, 128k, 256k"
    assert err == f"'nonsense': give one of {stages}, such as general\n"


def test_a_run_that_goes_on_is_the_same_run(start, config, unbroken):
    code, _, err = finish(start(config, unbroken, "--config.optimiser.learning_rate=0.5"))
    assert code == 1
    assert "the run was begun with optimiser.learning_rate = 0.01, not 0.5" in err


@pytest.mark.parametrize(("what", "code"), [("stop", 1), ("skip", 0)])
def test_a_loss_that_is_not_finite_stops_the_run_or_is_skipped(start, config, tmp_path, what, code):
    arguments = ["--config.optimiser.learning_rate=1e30", "--config.optimiser.warmup_steps=0"]
    got, _, err = finish(start(config, tmp_path, *arguments, f"--config.loop.on_nonfinite={what}"))
    assert got == code, err
    rows = [row for row in train_log(tmp_path) if "finite" in row]
    assert rows[0]["finite"] == 1.0
    assert rows[1]["finite"] == 0.0
    if what == "stop":
        assert "step 2: the loss is" in err
    else:
        assert len(rows) == STEPS
