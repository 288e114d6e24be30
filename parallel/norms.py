"""Norms of tensors on any mesh, each element counted once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from .layout import cut_axes, local_part


def squared_norms(tensors: Sequence[Tensor]) -> list[float]:
    """The squared L2 norm of each whole tensor, summed in float64; the same on every process of a tensor's mesh.

    The tensors may be on different meshes; all processes of a mesh must pass the same ones in the same order. One all-reduce an axis
    of a mesh along which something is cut, whatever the number of tensors.
    """
    norms = [0.0] * len(tensors)
    by_mesh: dict[DeviceMesh | None, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_mesh.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(i)
    for mesh, members in by_mesh.items():
        for i, norm in zip(members, _squared_norms([tensors[i] for i in members], mesh), strict=True):
            norms[i] = norm
    return norms


def _squared_norms(tensors: Sequence[Tensor], mesh: DeviceMesh | None) -> list[float]:
    tensors = [_summed(t) for t in tensors]
    squares = [torch.linalg.vector_norm(local_part(t), dtype=torch.float64).square() for t in tensors]
    # State that is kept on the CPU is reduced where the mesh is.
    values = torch.stack([s.to(mesh.device_type) if mesh else s for s in squares])
    if mesh is None:
        return values.tolist()
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for axis in range(mesh.ndim):
        cut = torch.tensor([axis in cut_axes(t) for t in tensors], device=values.device)
        if any(axis in cut_axes(t) for t in tensors):
            if coordinate[axis]:
                # What is replicated along this axis is counted at its first process alone.
                values = torch.where(cut, values, 0.0)
            dist.all_reduce(values, group=mesh.get_group(axis))
    return values.tolist()


def _summed(tensor: Tensor) -> Tensor:
    """A DTensor whose parts are still to be added up, added up."""
    if isinstance(tensor, DTensor) and any(p.is_partial() for p in tensor.placements):
        return tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
    return tensor
