"""Which part of a parameter each process holds.

Parameters are plain tensors, or DTensors cut along some axes of their mesh and replicated along the others: by FSDP2 (one axis, with
replicas two), by tensor parallelism, or by both, where FSDP2 cuts what tensor parallelism has left. Every part is a contiguous range
of each dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

from .compat import StridedShard

Bounds = tuple[tuple[int, int], ...]
"""[start, stop) along each dim."""


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, or the plain tensor itself; it shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor:
    """This process's part of ``parameter.grad``, cut as the parameter is."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local_part(gradient)


def cut_axes(tensor: Tensor) -> tuple[int, ...]:
    """The axes of a DTensor's mesh along which its parts differ, outermost first; none for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return ()
    sizes = tensor.device_mesh.shape
    return tuple(a for a, placement in enumerate(tensor.placements) if isinstance(placement, Shard | StridedShard) and sizes[a] > 1)


def part_bounds(tensor: DTensor, coordinate: Sequence[int]) -> Bounds:
    """The part that the process at ``coordinate`` of the tensor's mesh holds.

    Raises ValueError for placements that leave parts which are no contiguous ranges.
    """
    return _bounds(tuple(tensor.shape), tuple(tensor.device_mesh.shape), tuple(tensor.placements), tuple(coordinate))


def local_bounds(tensor: Tensor) -> Bounds:
    """The part that this process holds; all of a plain tensor."""
    if not isinstance(tensor, DTensor):
        return tuple((0, size) for size in tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return part_bounds(tensor, coordinate)


def first_index(tensor: Tensor) -> int:
    """The index, in the whole tensor, of the first element that this process holds; 0 where it holds none.

    The elements after it follow one another in the whole tensor where dim 0 alone is cut, as FSDP2 does.
    """
    index = 0
    for (start, stop), size in zip(local_bounds(tensor), tensor.shape, strict=True):
        if start == stop:
            return 0
        index = index * size + start
    return index


@cache
def _bounds(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], coordinate: tuple[int, ...]
) -> Bounds:
    bounds = [(0, size) for size in shape]
    # A strided axis stands before the axes whose parts it cuts again: in truth it comes after them.
    for axis in sorted(range(len(placements)), key=lambda axis: isinstance(placements[axis], StridedShard)):
        placement = placements[axis]
        if isinstance(placement, Shard | StridedShard):
            if isinstance(placement, StridedShard):
                _check_strides(shape, mesh_shape, placements, axis)
            bounds[placement.dim] = _chunk(*bounds[placement.dim], mesh_shape[axis], coordinate[axis])
    return tuple(bounds)


def _check_strides(shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], axis: int) -> None:
    strided = placements[axis]
    assert isinstance(strided, StridedShard)
    later = zip(placements[axis + 1 :], mesh_shape[axis + 1 :], strict=True)
    parts = math.prod(size for p, size in later if isinstance(p, Shard | StridedShard) and p.dim == strided.dim)
    if strided.split_factor != parts:
        raise ValueError(
            f"a parameter {shape} has placements {placements} on a mesh {mesh_shape}: the axes after axis {axis} make {parts} parts, "
            f"its split factor is {strided.split_factor}; apply tensor parallelism first and then fully_shard"
        )


def _chunk(start: int, stop: int, parts: int, index: int) -> tuple[int, int]:
    """Part ``index`` of a range as torch.chunk cuts it: the last parts may be smaller or empty."""
    length = math.ceil((stop - start) / parts)
    return min(start + index * length, stop), min(start + (index + 1) * length, stop)
