"""Stored tensors <-> parameters, by the regions that the tables of names say are equal.

Nothing is read here: each side is made of the other as tensors that read when asked.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from qwen_jax.checkpoint.names import Path, Region, Rows, printable
from qwen_jax.checkpoint.reader import StoredTensor
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
    rows = region.rows
    if region.unit_axis:
        tensor = _derived(tensor, (tensor.shape[0], *tensor.shape[2:]), lambda values: values[:, 0])
    if rows is None:
        return tensor
    shape = list(tensor.shape)
    shape[rows.axis] = rows.groups * (rows.stop - rows.start)

    def change(values: np.ndarray | QuantizedWeight) -> np.ndarray | QuantizedWeight:
        if not isinstance(values, QuantizedWeight):
            return _grouped(values, rows).reshape(shape)
        numbers = _grouped(np.arange(tensor.shape[rows.axis]), dataclasses.replace(rows, axis=0))
        return values[(*(slice(None),) * rows.axis, numbers.reshape(-1))]

    return _derived(tensor, tuple(shape), change)


def _grouped(values: np.ndarray, rows: Rows) -> np.ndarray:
    """The rows of each group, [..., groups, stop - start, ...]; a view of `values`."""
    before, after = values.shape[: rows.axis], values.shape[rows.axis + 1 :]
    grouped = values.reshape(*before, rows.groups, rows.total, *after)
    within = (slice(None),) * (rows.axis + 1)
    return grouped[(*within, slice(rows.start, rows.stop))]


def _derived(
    tensor: StoredTensor, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]
) -> StoredTensor:
    return dataclasses.replace(tensor, shape=shape, read=lambda: change(tensor.read()), parts=())


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

    def read() -> np.ndarray | QuantizedWeight:
        if parts[0].quantised:
            return jax.tree.map(lambda *a: np.stack(a), *(part.read() for part in parts))
        out = np.empty(shape, dtype)
        for place, part in zip(out, parts, strict=True):
            part.read_into(place)
        return out

    return StoredTensor(parts[0].name, parts[0].file, shape, dtype, read, tuple(parts), *quantised)


def _hold(tensor: StoredTensor, path: Path, held: dict[Path, np.ndarray]) -> StoredTensor:
    """`tensor` with its values left in `held` until another's are: its experts take turns."""

    def read() -> np.ndarray:
        if path not in held:
            held.clear()
            held[path] = tensor.read()
        return held[path]

    return dataclasses.replace(tensor, read=read)


def _expert(tensor: StoredTensor, expert: int) -> StoredTensor:
    if tensor.parts:
        return tensor.parts[expert]
    return _derived(tensor, tensor.shape[1:], lambda values: values[expert])


def _paste(name: str, pieces: list[tuple[Region, StoredTensor]]) -> StoredTensor:
    """The stored tensor that the pieces make up."""
    region, tensor = pieces[0]
    if region.rows is None:
        return dataclasses.replace(tensor, name=name)
    dtype = np.result_type(*{tensor.dtype for _, tensor in pieces})
    # Experts are taken off already.
    shape = stored_shape(dataclasses.replace(region, expert=None, unit_axis=False), tensor.shape)

    def read() -> np.ndarray:
        out = np.empty(shape, dtype)
        for region, tensor in pieces:
            place = _grouped(out, region.rows)
            place[...] = tensor.read().reshape(place.shape)
        return out[:, None] if region.unit_axis else out

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
