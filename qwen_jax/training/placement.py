"""Which rows of a batch each process loads, and how they come to lie on all devices."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qwen_jax.errors import UserError
from qwen_jax.sharding.axes import Layout, num_shards
from qwen_jax.training.batch import Batch

Arrays = Mapping[str, np.ndarray]


def loader_share(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of each batch this process loads, from 0, and how many parts there are.

    Processes whose devices hold the same rows load the same part.

    Raises:
      UserError: some processes hold only a part of their rows in common.
    """
    if jax.process_count() == 1:
        return 0, 1
    shards = num_shards(mesh, "batch")
    held = defaultdict(set)
    for device, (rows,) in _layout(mesh).sharding("batch").devices_indices_map((shards,)).items():
        held[device.process_index].add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(part) for part in parts}) != 1 or sum(map(len, parts)) != shards:
        raise UserError(
            f"the mesh cuts a batch into {shards} parts, which {jax.process_count()} processes "
            "cannot share evenly; make data times fsdp times expert a divisor or a multiple of "
            "their number"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def to_devices(arrays: Arrays, mesh: Mesh | None = None) -> Batch:
    """This process's rows as its part of a batch that lies on all of the mesh's devices.

    Raises:
      UserError: the rows of all processes do not divide by the mesh.
    """
    if jax.process_count() == 1:
        return Batch(**arrays)
    rows = len(arrays["input_ids"]) * loader_share(mesh)[1]
    shards = num_shards(mesh, "batch")
    # Of a pair, both rows are on one device.
    together = arrays["input_ids"].ndim - 1
    if rows % shards:
        raise UserError(
            f"data.batch_size = {rows * together} does not divide by the mesh's {shards} parts of "
            f"a batch; give a multiple of {shards * together}"
        )

    def spread(array: np.ndarray) -> jax.Array:
        # Pairs have an axis of two between; what belongs to a row has no length.
        between = (None,) * (array.ndim - 2)
        along = ("length",) if array.ndim > 1 else ()
        sharding = _layout(mesh).sharding("batch", *between, *along)
        shape = (rows, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return Batch(**{name: spread(array) for name, array in arrays.items()})


def in_step(batches: Iterator[Arrays]) -> Iterator[Arrays]:
    """As many batches in every process, rows of padding in those that have none left.

    What several processes compute together they must begin together.
    """
    if jax.process_count() == 1:
        yield from batches
        return
    last = None
    while True:
        batch = next(batches, None)
        if not multihost_utils.process_allgather(np.asarray(batch is not None)).any():
            return
        # Rows of zeros are padding.
        last = batch if batch is not None else {k: np.zeros_like(v) for k, v in last.items()}
        yield last


def _layout(mesh: Mesh) -> Layout:
    return Layout(mesh, frozenset({"length"}))
