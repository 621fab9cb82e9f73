"""Two processes of two devices each that run one command line together."""

import json
import socket

import pytest

from tests.tools.conftest import refusal, start_tool

PROMPTS = ("--prompt=the sky", "--prompt=Hi", "--max_new_tokens=4", "--seed=3", "--output=json")
MESH = "--mesh=fsdp:2,tensor:2"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def outputs(children):
    found = []
    for child in children:
        out, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors
        # Gloo writes on standard output as well.
        found.append(
            [json.loads(line) for line in out.decode().splitlines() if line.startswith("{")]
        )
    return found


@pytest.fixture(scope="module")
def alone(run_tool, checkpoint):
    result = run_tool("generate", f"--model={checkpoint}", *PROMPTS)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_two_processes_told_by_flags_write_what_one_does(environment, checkpoint, alone):
    told = ("--processes=2", f"--coordinator=127.0.0.1:{free_port()}")
    devices = {**environment, "JAX_NUM_CPU_DEVICES": "2"}
    arguments = (f"--model={checkpoint}", *PROMPTS, MESH, *told)
    children = [start_tool(devices, "generate", *arguments, f"--process={i}") for i in range(2)]
    assert outputs(children) == [alone, []]


def test_tasks_of_slurm_find_each_other(environment, checkpoint, alone):
    # The port that the first task takes follows from the number of the job.
    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost"}
    slurm |= {"SLURM_NTASKS": "2", "JAX_NUM_CPU_DEVICES": "2"}
    children = [
        start_tool(
            {**environment, **slurm, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            "generate",
            f"--model={checkpoint}",
            *PROMPTS,
            MESH,
        )
        for i in range(2)
    ]
    assert outputs(children) == [alone, []]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (("--processes=2",), "--processes, --process and --coordinator together"),
        (("--processes=2", "--process=2", "--coordinator=localhost:1"), "below --processes=2"),
    ],
)
def test_incomplete_flags_are_refused(run_tool, checkpoint, told, said):
    assert said in refusal(run_tool("generate", f"--model={checkpoint}", *PROMPTS, *told))


def test_processes_without_a_mesh_are_told_to_give_one(environment, checkpoint):
    told = ("--processes=2", f"--coordinator=127.0.0.1:{free_port()}")
    children = [
        start_tool(
            environment, "generate", f"--model={checkpoint}", *PROMPTS, *told, f"--process={i}"
        )
        for i in range(2)
    ]
    for child in children:
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 1
        assert "2 processes run this, with 2 devices; give a mesh" in errors.decode()


def test_a_command_for_one_process_is_refused_in_several_tasks(run_tool):
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    result = run_tool("convert", "--source=a", "--target=b", "--format=hf", **slurm)
    assert "Slurm runs this 2 times" in refusal(result)
