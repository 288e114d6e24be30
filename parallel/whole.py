"""Functions of whole matrices that are cut over processes: each matrix is computed by one process of those that share it.

Matrices are dealt out in rounds of one matrix a process. In a round every process sends its parts of the matrices to their owners,
each owner puts its matrix together and computes, and the parts of the result go back. On a mesh of several axes the parts travel along
one axis after the other, so that no other process groups than those of the axes are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .layout import cut_axes, local_part, part_bounds

Coordinate = tuple[int, ...]
Item = tuple[int, Coordinate]
"""Number of a matrix in its round, and whose part of it."""


class Deal:
    """Matrices that are cut along the same axes of a mesh, at most one a process; matrix i belongs to process i of these axes.

    Raises ValueError for a matrix whose part here is not what its placements say.
    """

    def __init__(self, matrices: Sequence[Tensor]):
        self.matrices = list(matrices)
        self.axes = cut_axes(matrices[0])
        mesh = matrices[0].device_mesh if isinstance(matrices[0], DTensor) else None
        coordinate = mesh.get_coordinate() if mesh else None
        self.here: Coordinate = tuple(coordinate[axis] for axis in self.axes) if coordinate else ()
        self.groups = [mesh.get_group(axis) for axis in self.axes] if mesh else []
        self.ranges = [range(mesh.size(axis)) for axis in self.axes] if mesh else []
        self.owners: list[Coordinate] = list(product(*self.ranges))[: len(matrices)]
        for i, matrix in enumerate(matrices if self.axes else ()):
            expected, held = [stop - start for start, stop in self._bounds(i, self.here)], list(local_part(matrix).shape)
            if held != expected:
                # The exchange would go wrong on every process, far from here.
                raise ValueError(f"a parameter {tuple(matrix.shape)} is cut in another way than torch's: {held} here, not {expected}")

    def map(self, parts: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """``function`` of each whole matrix, in this process's parts.

        parts: this process's part of each matrix, cut as ``matrices`` are, all of one dtype. function: keeps shape and dtype. A
        collective over the processes that share the matrices.
        """
        if not self.axes:
            return [function(part) for part in parts]
        nothing = parts[0].new_empty(0)
        held = {(i, self.here): part.reshape(-1) for i, part in enumerate(parts)}
        for k in range(len(self.axes)):
            held = self._exchange(held, nothing, k, to_owners=True)
        if self.here in self.owners:
            i = self.owners.index(self.here)
            whole = parts[0].new_empty(self.matrices[i].shape)
            for who in product(*self.ranges):
                view = whole[self._slices(i, who)]
                view.copy_(held[i, who].view(view.shape))
            result = function(whole)
            held = {(i, who): result[self._slices(i, who)].reshape(-1) for who in product(*self.ranges)}
        for k in reversed(range(len(self.axes))):
            held = self._exchange(held, nothing, k, to_owners=False)
        return [held[i, self.here].view(part.shape) for i, part in enumerate(parts)]

    def _exchange(self, held: dict[Item, Tensor], nothing: Tensor, k: int, to_owners: bool) -> dict[Item, Tensor]:
        """Parts go along axis k to the place that their owner has on it, or from there back. nothing: what an empty part is like."""
        away = [[item for item in self._held(self.here, k) if self.owners[item[0]][k] == place] for place in self.ranges[k]]
        others = [(*self.here[:k], place, *self.here[k + 1 :]) for place in self.ranges[k]]
        home = [[item for item in self._held(other, k) if self.owners[item[0]][k] == self.here[k]] for other in others]
        sent, received = (away, home) if to_owners else (home, away)
        out = torch.cat([nothing, *(held[item] for item in _flat(sent))])
        going, coming = ([sum(self._numel(*item) for item in items) for items in lists] for lists in (sent, received))
        into = out.new_empty(sum(coming))
        dist.all_to_all_single(into, out, coming, going, group=self.groups[k])
        items = _flat(received)
        return dict(zip(items, into.split([self._numel(*item) for item in items]), strict=True))

    def _held(self, who: Coordinate, k: int) -> list[Item]:
        """What the process at ``who`` holds before the parts travel along axis k towards their owners, in order."""
        sources = [(*first, *who[k:]) for first in product(*self.ranges[:k])]
        return [(i, source) for i, owner in enumerate(self.owners) if owner[:k] == who[:k] for source in sources]

    def _slices(self, i: int, who: Coordinate) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self._bounds(i, who))

    def _numel(self, i: int, who: Coordinate) -> int:
        return math.prod(stop - start for start, stop in self._bounds(i, who))

    def _bounds(self, i: int, who: Coordinate) -> tuple[tuple[int, int], ...]:
        matrix = self.matrices[i]
        assert isinstance(matrix, DTensor)
        coordinate = [0] * matrix.device_mesh.ndim
        for axis, place in zip(self.axes, who, strict=True):
            coordinate[axis] = place
        return part_bounds(matrix, coordinate)


def rounds(matrices: Iterable[Tensor]) -> list[Deal]:
    """The matrices dealt out. The dearest first, so that those of a round cost about the same; in the same order on every process."""
    alike: dict[Hashable, list[Tensor]] = {}
    for matrix in matrices:
        mesh = matrix.device_mesh if isinstance(matrix, DTensor) else None
        alike.setdefault((mesh, cut_axes(matrix), matrix.dtype), []).append(matrix)
    dealt = []
    for members in alike.values():
        members.sort(key=lambda m: m.numel() * min(m.shape), reverse=True)
        size = math.prod(members[0].device_mesh.size(axis) for axis in cut_axes(members[0]))  # type: ignore[attr-defined]
        dealt += [Deal(members[i : i + size]) for i in range(0, len(members), size)]
    return dealt


def _flat(lists: Iterable[Iterable[Item]]) -> list[Item]:
    return [item for items in lists for item in items]
