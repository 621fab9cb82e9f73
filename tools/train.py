"""Trains a model: from scratch, further, or adapters beside it.

    python -m tools.train --config=configs/train/sft.py --workdir=runs/sft
    python -m tools.train --config=configs/train/sft.py --workdir=runs/sft \\
        --config.loop.num_steps=2000 --config.mesh=fsdp:4

The fields of the configuration are those of qwen_jax.training.run_options.RunOptions, and `preset`
in place of `model` for the sizes of a published model with fresh parameters. WORKDIR gets the
model, or the adapter, beside checkpoints, metrics.jsonl and loss.png. A run that was interrupted
goes on from its newest checkpoint when it is started again; after SIGTERM it saves, leaves and
exits with 143.

Of several processes, on a TPU pod, under Slurm or told by flags, each runs this command.
"""

import dataclasses

from absl import flags

from configs.models import get_preset
from qwen_jax.training.host_memory import keep_freed_memory
from qwen_jax.training.run import RunOptions, run
from tools import command_line, config_flag, processes

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives.", required=True)
_PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of some steps to WORKDIR/profile.")
flags.mark_flag_as_required("config")


def main() -> None:
    """Reads the configuration and runs it."""
    keep_freed_memory()
    config = config_flag.read_config()
    workdir = command_line.path(_WORKDIR)
    preset = config.get("preset")
    fields = {name: config[name] for name in config if name != "preset"}
    options = config_flag.from_config(fields, RunOptions, "config")
    processes.join(options.mesh, "--config.mesh")
    model, more = None, None
    if preset is not None:
        model, more = get_preset(preset), {"preset": preset}
    if _PROFILE.value:
        report = dataclasses.replace(options.report, profile=True)
        options = dataclasses.replace(options, report=report)
    done = run(options, workdir, model, more=more)
    command_line.leave_if_stopped(done, options.loop.num_steps)


if __name__ == "__main__":
    command_line.run(main, alone=False)
