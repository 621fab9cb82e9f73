"""What every command line shares: flags parsed, errors in one line, help that exits with 0."""

import errno
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from qwen_jax.errors import UserError

_HELP = ("help", "h", "helpshort", "helpfull")
# What Slurm sets for each process of a step, and JAX reads.
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)


def run(main: Callable[[], None], alone: bool = True) -> None:
    """Parses the flags and runs `main`; bad input ends as one line on stderr and exit status 1.

    Args:
      main: the command.
      alone: whether it is for one process only; others call `processes.join`.
    """
    _use_compilation_cache()
    if sys.stdout is None:
        sys.exit("standard output is closed; nothing could be written")
    # A model writes all of Unicode, whatever the locale.
    sys.stdout.reconfigure(encoding="utf-8")
    quiet()
    try:
        app.run(lambda _: _quietly(main, alone), flags_parser=_parse)
    except UserError as error:
        sys.exit(_one_line(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            sys.exit(f"{error.filename}: cannot be used ({error.strerror}); give another path")
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # What is still to be written has nowhere to go; Python must not try once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A reader that has gone, as `head` does, has read what it wanted.
        sys.exit(1 if error.errno == errno.EPIPE else f"cannot write ({error.strerror})")
    except Exception as error:
        reason = _device_trouble(error)
        if reason is None:
            raise
        sys.exit(reason)


def quiet() -> None:
    """One plain line a warning, and none of the runtime's remarks about devices not there."""
    warnings.showwarning = lambda message, *_: print(
        f"warning: {_one_line(message)}", file=sys.stderr
    )
    logging.set_verbosity(logging.WARNING)


def path(flag: flags.FlagHolder) -> Path:
    """The path that a flag gives, a leading ~ resolved.

    Raises:
      UserError: it is empty, which would be the current directory.
    """
    if not flag.value:
        raise UserError(f"--{flag.name} is empty; give a path")
    try:
        return Path(flag.value).expanduser()
    except RuntimeError as error:  # No such user, or no home directory.
        raise UserError(f"--{flag.name}={flag.value}: cannot be resolved ({error})") from None


def numbers(flag: flags.FlagHolder[list[str]]) -> tuple[int, ...]:
    """The numbers that a flag lists.

    Raises:
      UserError: there is none, or something else than numbers above 0.
    """
    if not all(n.isdecimal() and int(n) for n in flag.value) or not flag.value:
        raise UserError(
            f"--{flag.name}={','.join(flag.value)} should be numbers above 0, such as 1,64"
        )
    return tuple(map(int, flag.value))


def leave_if_stopped(done: int, wanted: int) -> None:
    """Exits as after SIGTERM where a run made fewer steps than it was to."""
    if done < wanted:
        print(
            f"stopped at step {done} of {wanted}, which is saved; start it again to go on",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGTERM)


def slurm_tasks() -> int:
    """How many processes Slurm started together with this one, itself included."""
    if not all(name in os.environ for name in _SLURM):
        return 1
    return int(os.environ["SLURM_NTASKS"])


def _quietly(main: Callable[[], None], alone: bool) -> None:
    if alone and slurm_tasks() > 1:
        raise UserError(f"Slurm runs this {slurm_tasks()} times; start it in one task (srun -n1)")
    main()
    # Here, where a reader that has gone is expected, and not at exit, where Python complains.
    sys.stdout.flush()


def _parse(argv: list[str]) -> list[str]:
    # absl's own help exits with 1 and hides the flags that a module imports.
    if any(argument.lstrip("-") in _HELP and argument.startswith("-") for argument in argv[1:]):
        module = sys.modules["__main__"]
        print((module.__doc__ or "").strip(), end="\n\n")
        for name in _flag_modules(argv[0]):
            # absl calls the program by its path.
            text = flags.FLAGS.module_help(name)
            own = module.__spec__.name.removesuffix(".__main__")
            print(text.replace(f"{argv[0]}:", f"{own}:", 1))
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        # A configuration's own refusal comes as the last line of a traceback within the message.
        own = re.search(rf"{UserError.__module__}\.UserError: (.*)", str(error))
        if own:
            raise UserError(own[1].strip()) from None
        message = re.sub(r"^flag --(\w+)=None: .*", r"--\1 is needed", str(error), flags=re.DOTALL)
        raise UserError(f"{message}; see --help") from None
    except (LookupError, OSError) as error:  # Only --config raises these, of files and of fields.
        raise UserError(_config_trouble(argv, error)) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: arguments are given as flags; see --help")
    return rest


def _config_trouble(argv: list[str], error: Exception) -> str:
    """One line for a --config that cannot be read, or a --config.field that it does not have."""
    if isinstance(error, OSError):
        return f"--config: {error}"
    changes = [argument for argument in argv if re.match(r"--?config\.", argument)]
    return (
        f"{', '.join(changes)}: the configuration has no such place ({error}); give fields that "
        "the file has, or add them there"
    )


def settings() -> dict[str, Any]:
    """What the flags of this command say, by name."""
    modules = flags.FLAGS.flags_by_module_dict()
    return {flag.name: flag.value for name in _flag_modules(sys.argv[0]) for flag in modules[name]}


def _flag_modules(program: str) -> list[str]:
    modules = flags.FLAGS.flags_by_module_dict()
    return [name for name in modules if name == program or name.startswith("tools.")]


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _device_trouble(error: Exception) -> str | None:
    """One line for a device that is not there or is too small; None for anything else."""
    import jax

    try:
        jax.devices()
    except Exception as missing:  # JAX fails an assertion where CUDA is asked for and absent.
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return _one_line(f"JAX_PLATFORMS={platforms}: {str(missing) or 'no such device here'}")
    if "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory on the device; run fewer or shorter texts at once"
    return None


def _use_compilation_cache() -> None:
    """Compiled programs outlive the process, unless JAX_COMPILATION_CACHE_DIR says otherwise."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = root / "qwen_jax" / "jax"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # No home directory, or none that can be written to.
        return
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
