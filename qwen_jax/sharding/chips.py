"""TPU generations as numbers, and topologies such as "v5p:8x8x8" as users write them.

The figures are those of the system architecture pages of Google Cloud's TPU documentation
(cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e). A link has the documented bandwidth of a chip in
both directions, 400, 1,200 and 800 GB/s for v5e, v5p and v6e, divided by its links and directions;
v4's is that of arXiv 2304.01433. But of the memory a program may use a little less than a chip has,
and it is here as libtpu 0.0.42 reports it when a program is too large.
"""

import dataclasses
import math
import re

from qwen_jax.errors import UserError

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, which is one device to JAX (v4's two cores work as one).

    Attributes:
      name: of the generation.
      hbm_bytes: memory that a program may use.
      hbm_bandwidth: bytes per second between memory and core.
      flops: multiplications and additions of bfloat16 per second, at most.
      link_bandwidth: bytes per second over one link to a neighbour, in each direction.
      dimensions: of the grid of chips; a chip has two links in each.
      compiler_options: of libtpu, for a topology of these chips.
    """

    name: str
    hbm_bytes: int
    hbm_bandwidth: float
    flops: float
    link_bandwidth: float
    dimensions: int
    compiler_options: tuple[tuple[str, str], ...] = ()

    @property
    def links(self) -> int:
        """How many neighbours a chip inside the grid has."""
        return 2 * self.dimensions


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            int(31.25 * _GIB),
            1.2e12,
            275e12,
            50e9,
            3,
            (("chip_config_name", "megacore"),),
        ),
        Chip("v5e", int(15.75 * _GIB), 0.819e12, 197e12, 50e9, 2),
        Chip("v5p", int(95.74 * _GIB), 2.765e12, 459e12, 100e9, 3),
        Chip("v6e", int(31.25 * _GIB), 1.638e12, 918e12, 100e9, 2),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A grid of chips.

    Attributes:
      chip: of which there are `num_chips`.
      shape: chips along each dimension.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips, and devices."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """As `read_topology` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips_per_host(self) -> tuple[int, int, int]:
        """The part of the grid that one machine holds: 2 x 2 where both dimensions are even."""
        return 2 - self.shape[0] % 2, 2 - self.shape[1] % 2, 1


def read_topology(text: str) -> Topology:
    """The topology that `text` names: a generation, and chips along each dimension.

    Raises:
      UserError: it is not of the form "v5e:4x4", or names a generation that is not in the table,
        or has another number of dimensions than its chips do.
    """
    name, colon, sizes = text.strip().lower().partition(":")
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(
            f"topology {text}: give a generation and its chips along each side, such as v5e:4x4"
        )
    if name not in CHIPS:
        raise UserError(f"topology {text}: {name} is unknown; known: {', '.join(CHIPS)}")
    chip, shape = CHIPS[name], tuple(map(int, sizes.split("x")))
    if len(shape) != chip.dimensions:
        example = "x".join(["4"] * chip.dimensions)
        raise UserError(
            f"topology {text}: {name} has {chip.dimensions} dimensions, not {len(shape)}; give "
            f"one such as {name}:{example}"
        )
    return Topology(chip, shape)
