"""What a machine can do at its best: read memory, and multiply matrices of float32.

Every figure of an engine is also told as a share of one of these, measured beside it, since they
differ from machine to machine and drift on one.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.reference import import_reference

# Far more than caches hold: a matrix of 512 MB, each number of which a product with a vector needs
# once.
_ROWS, _COLUMNS = 8192, 16384
# A product that keeps all cores busy for tens of milliseconds.
_SIDE = 2048
_TRIES = 3


@dataclasses.dataclass(frozen=True)
class Limits:
    """Attributes:
    bandwidth: bytes that are read a second.
    matrix_rate: floating-point operations a second, a multiplication and an addition being two.
    """

    bandwidth: float
    matrix_rate: float


def limit_measurer() -> Callable[[], Limits]:
    """A function that measures both, the better of XLA and torch, the best of three tries each.

    It keeps what it multiplies, 0.6 GB.

    Raises:
      UserError: torch is not installed.
    """
    torch, _ = import_reference()
    matrix, vector, square = (
        np.ones(shape, np.float32) for shape in ((_ROWS, _COLUMNS), _COLUMNS, (_SIDE, _SIDE))
    )
    multiply = jax.jit(jnp.dot)
    # XLA has the square only: its product with a vector is no faster than torch's.
    on_device = jax.device_put(square)

    def ours() -> None:
        multiply(on_device, on_device).block_until_ready()

    theirs, by, whole = (torch.from_numpy(x) for x in (square, vector, matrix))

    def measure() -> Limits:
        reading = _least_seconds(lambda: torch.mv(whole, by))
        multiplying = min(map(_least_seconds, (ours, lambda: torch.mm(theirs, theirs))))
        return Limits(matrix.nbytes / reading, 2 * _SIDE**3 / multiplying)

    measure()
    return measure


def _least_seconds(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
