"""Runs of two processes with two devices each, against the same run of one process."""

import signal
import time

import numpy as np
import pytest
import safetensors.numpy

from tests.reference import random_reference, save_reference
from tests.tools.conftest import start_tool, train_log
from tests.tools.test_processes import free_port
from tests.training.data.conftest import text_file, write_tokenizer

STEPS = 6
# Of nine texts by turns, one process has five and the other four: three batches and two.
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{
        "model": {model!r},
        "data": {{
            "sources": ({{"path": {texts!r}, "too_long": "truncate"}},),
            "length": 32, "batch_size": 4, "pack": False,
        }},
        "eval_data": {{
            "sources": ({{"path": {few!r}, "too_long": "truncate"}},),
            "length": 32, "batch_size": 4, "pack": False, "epochs": 1,
        }},
        "optimiser": {{"learning_rate": 1e-2, "warmup_steps": 2, "eps": 1e-2}},
        "step": {{"dtype": "float32", "scan": True, "remat": "none"}},
        "loop": {{"num_steps": {steps}, "checkpoint_every": 100, "eval_every": 3}},
        "mesh": None,
        "lora": None,
    }})
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    reference = random_reference("qwen3", num_hidden_layers=2, vocab_size=320)
    model = save_reference(reference, directory / "model")
    write_tokenizer(model)
    path = directory / "config.py"
    path.write_text(
        CONFIG.format(
            model=str(model),
            texts=text_file(directory / "texts.jsonl", 60),
            few=text_file(directory / "few.jsonl", 9),
            steps=STEPS,
        )
    )
    return path


@pytest.fixture(scope="module")
def start(environment, config):
    def run(workdir, *more, processes=1, config=config):
        arguments = [f"--config={config}", f"--workdir={workdir}", *more]
        devices = {**environment, "JAX_NUM_CPU_DEVICES": "2"}
        if processes == 1:
            return [start_tool(environment, "train", *arguments)]
        arguments += [f"--processes={processes}", f"--coordinator=127.0.0.1:{free_port()}"]
        return [
            start_tool(devices, "train", *arguments, f"--process={i}") for i in range(processes)
        ]

    return run


def finish(children, code=0):
    for child in children:
        _, errors = child.communicate(timeout=300)
        assert child.returncode == code, errors.decode()


def figures(workdir):
    names = ("step", "loss", "tokens", "eval_loss", "eval_tokens")
    return [[row[name] for name in names if name in row] for row in train_log(workdir)]


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    finish(start(workdir))
    found = figures(workdir)
    assert len(found) == STEPS + 2
    return found


@pytest.mark.parametrize("mesh", ["tensor:4", "data:2,context:2"])
def test_two_processes_learn_and_evaluate_as_one(start, alone, tmp_path, mesh):
    finish(start(tmp_path, f"--config.mesh={mesh}", processes=2))
    for ours, expected in zip(figures(tmp_path), alone, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_one_that_is_told_to_stop_stops_both_and_they_go_on(start, alone, tmp_path):
    # So long that the signal comes on the way.
    many = ("--config.mesh=fsdp:4", "--config.loop.num_steps=2000", "--config.loop.eval_every=1000")
    children = start(tmp_path, *many, processes=2)
    while children[0].poll() is None and len(train_log(tmp_path)) < 2:
        time.sleep(0.01)
    children[1].send_signal(signal.SIGTERM)
    finish(children, code=143)
    (saved,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert 2 <= saved < 2000
    finish(start(tmp_path, *many[:1], f"--config.loop.num_steps={saved + 2}", processes=2))
    assert [row["step"] for row in train_log(tmp_path) if "loss" in row] == list(
        range(1, saved + 3)
    )


def test_adapters_that_lie_on_two_processes_are_written_once(start, config, tmp_path):
    lora = tmp_path / "lora.py"
    lora.write_text(config.read_text().replace('"lora": None', '"lora": {"rank": 4}'))
    finish(start(tmp_path / "one", "--config.loop.num_steps=2", config=lora))
    more = ("--config.loop.num_steps=2", "--config.mesh=fsdp:2,tensor:2")
    finish(start(tmp_path / "two", *more, processes=2, config=lora))
    ours, expected = (
        safetensors.numpy.load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("two", "one")
    )
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(ours[name], tensor, atol=1e-6, err_msg=name)
    assert any(np.abs(t).max() > 1e-4 for name, t in ours.items() if "lora_B" in name)
