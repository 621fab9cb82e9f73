"""Stored tensors <-> parameters, by the regions that the tables of names say are equal.

Nothing is read here: each side is made of the other as tensors that read when asked.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from qwen_jax.checkpoint.names import Path, Region, Rows, printable
from qwen_jax.checkpoint.reader import Index, StoredTensor, bounds
from qwen_jax.errors import UserError
from qwen_jax.nn.quantized import QuantizedWeight


def stored_shape(region: Region, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the whole stored tensor, for a parameter of `shape`."""
    if region.expert is not None:
        shape = shape[1:]
    if region.rows is not None:
        rows = region.rows
        shape = (*shape[: rows.axis], rows.groups * rows.total, *shape[rows.axis + 1 :])
    return (shape[0], 1, *shape[1:]) if region.unit_axis else shape


def to_parameters(
    regions: Iterable[Region], stored: Mapping[str, StoredTensor]
) -> dict[Path, StoredTensor]:
    """Each parameter, by its path, in the order of its first region."""
    by_path: dict[Path, list[Region]] = {}
    for region in regions:
        by_path.setdefault(region.path, []).append(region)
    return {
        path: stack([_cut(stored[region.name], region) for region in found])
        if found[0].expert is not None
        else _cut(stored[found[0].name], found[0])
        for path, found in by_path.items()
    }


def to_stored(
    regions: Iterable[Region], parameters: Mapping[Path, StoredTensor]
) -> dict[str, StoredTensor]:
    """Each stored tensor, by its name, in the order of its first region.

    Read in that order, they read each parameter once.
    """
    by_name: dict[str, list[tuple[Region, StoredTensor]]] = {}
    held: dict[Path, np.ndarray] = {}
    for region in regions:
        tensor = parameters[region.path]
        if region.expert is not None:
            tensor = _expert(_hold(tensor, region.path, held), region.expert)
        by_name.setdefault(region.name, []).append((region, tensor))
    return {name: _paste(name, pieces) for name, pieces in by_name.items()}


def _cut(tensor: StoredTensor, region: Region) -> StoredTensor:
    """The region of a stored tensor, in the shape of the parameter."""
    if region.unit_axis:
        tensor = _without_unit_axis(tensor)
    rows = region.rows
    if rows is None:
        return tensor
    before = (slice(None),) * rows.axis
    if rows.groups == 1:
        return tensor[(*before, slice(rows.start, rows.stop))]
    width = rows.stop - rows.start
    shape = (*tensor.shape[: rows.axis], rows.groups * width, *tensor.shape[rows.axis + 1 :])

    def read(index: Index = ()) -> np.ndarray | QuantizedWeight:
        wanted = bounds(index, shape)
        cut = wanted[rows.axis]
        first, last = cut.start // width, -(-cut.stop // width)
        groups = slice(first * rows.total, last * rows.total)
        values = tensor[(*wanted[: rows.axis], groups, *wanted[rows.axis + 1 :])].read()
        numbers = np.arange(cut.start, cut.stop)
        numbers = (numbers // width - first) * rows.total + rows.start + numbers % width
        return values[(*before, numbers)]

    return dataclasses.replace(tensor, shape=shape, read=read)


def _without_unit_axis(tensor: StoredTensor) -> StoredTensor:
    shape = (tensor.shape[0], *tensor.shape[2:])

    def read(index: Index = ()) -> np.ndarray:
        rows, *rest = bounds(index, shape)
        return tensor.read((rows, slice(None), *rest))[:, 0]

    return dataclasses.replace(tensor, shape=shape, read=read)


def _grouped(values: np.ndarray, rows: Rows) -> np.ndarray:
    """The rows of each group, [..., groups, stop - start, ...]; a view of `values`."""
    before, after = values.shape[: rows.axis], values.shape[rows.axis + 1 :]
    grouped = values.reshape(*before, rows.groups, rows.total, *after)
    within = (slice(None),) * (rows.axis + 1)
    return grouped[(*within, slice(rows.start, rows.stop))]


def stack(parts: list[StoredTensor]) -> StoredTensor:
    """Tensors of one shape as one, [len(parts), ...]."""
    dtype = np.result_type(*{part.dtype for part in parts})
    shape = (len(parts), *parts[0].shape)

    quantised = {part.quantised for part in parts}
    if len(quantised) > 1:
        raise UserError(
            f"{parts[0].file}: {printable(parts[0].name)} and the other experts of its layer are "
            "not all quantised; quantise all or none"
        )

    def read(index: Index = ()) -> np.ndarray | QuantizedWeight:
        wanted = bounds(index, shape)
        found = [part[wanted[1:]] for part in parts[wanted[0]]]
        if parts[0].quantised:
            return jax.tree.map(lambda *a: np.stack(a), *(part.read() for part in found))
        out = np.empty((len(found), *found[0].shape), dtype)
        for place, part in zip(out, found, strict=True):
            part.read_into(place)
        return out

    return StoredTensor(parts[0].name, parts[0].file, shape, dtype, read, tuple(parts), *quantised)


def _hold(tensor: StoredTensor, path: Path, held: dict[Path, np.ndarray]) -> StoredTensor:
    """`tensor` with its values left in `held` until another's are: its experts take turns."""

    def read(index: Index = ()) -> np.ndarray:
        if path not in held:
            held.clear()
            held[path] = tensor.read()
        return held[path][index]

    return dataclasses.replace(tensor, read=read)


def _expert(tensor: StoredTensor, expert: int) -> StoredTensor:
    if tensor.parts:
        return tensor.parts[expert]

    def read(index: Index = ()) -> np.ndarray:
        return tensor.read((slice(expert, expert + 1), *index))[0]

    return dataclasses.replace(tensor, shape=tensor.shape[1:], read=read)


def _paste(name: str, pieces: list[tuple[Region, StoredTensor]]) -> StoredTensor:
    """The stored tensor that the pieces make up."""
    region, tensor = pieces[0]
    if region.rows is None:
        return dataclasses.replace(tensor, name=name)
    dtype = np.result_type(*{tensor.dtype for _, tensor in pieces})
    # Experts are taken off already.
    shape = stored_shape(dataclasses.replace(region, expert=None, unit_axis=False), tensor.shape)

    def read(index: Index = ()) -> np.ndarray:
        out = np.empty(shape, dtype)
        for region, tensor in pieces:
            place = _grouped(out, region.rows)
            place[...] = tensor.read().reshape(place.shape)
        return (out[:, None] if region.unit_axis else out)[index]

    whole = stored_shape(dataclasses.replace(region, expert=None), tensor.shape)
    return StoredTensor(name, None, whole, dtype, read)


def in_file_order(
    parameters: Mapping[Path, StoredTensor], regions: Iterable[Region], stored: Iterable[str]
) -> dict[Path, StoredTensor]:
    """`parameters` as the files have them, so that a disk is read in order."""
    place = {name: number for number, name in enumerate(stored)}
    first: dict[Path, int] = {}
    for region in regions:
        first[region.path] = min(first.get(region.path, len(place)), place[region.name])
    return dict(sorted(parameters.items(), key=lambda item: first[item[0]]))
