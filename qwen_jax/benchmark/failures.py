"""What a process that ended is said to have failed of."""

import re

from qwen_jax.errors import UserError


def failure(what: str, stderr: str) -> UserError:
    """The error of a measurement, by what its process wrote behind all else.

    Args:
      what: was measured.
      stderr: of the process.
    """
    lines = stderr.strip().splitlines() or ["no message"]
    # An exception's own line, which JAX puts remarks behind.
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return UserError(f"measuring {what} failed: {(errors or lines)[-1]}")
