"""Gradients over a mesh: their norm, in which each element counts once; clipping; a tied weight; what has none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .compat import scale_gradients
from .layout import cut_axes, local_part
from .mesh import World


def global_norm(tensors: Iterable[Tensor], world: World) -> float:
    """L2 norm of all tensors over all ranks, formed in float64. ``tensors``: those of this rank; of a weight that two pipeline
    stages hold, one of them leaves it out."""
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for tensor in tensors:
        total += _own_square(tensor, world)
    return math.sqrt(float(world.sum(total)))


def squared_norms(tensors: Mapping[str, Iterable[Tensor]], world: World) -> dict[str, float]:
    """Squared L2 norms of groups of tensors over all ranks, by name, formed in float64, the same on each rank.

    A rank may have groups that others have not, as pipeline stages do. For a log: it waits for the device, once.
    """
    own = {}
    for name, group in tensors.items():
        own[name] = torch.stack([_own_square(t, world).to(world.device) for t in group]).sum()
    values = torch.stack(list(own.values())).tolist() if own else []
    mine = dict(zip(own, values, strict=True))
    if world.meshes is None:
        return mine
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, mine)
    total: dict[str, float] = {}
    for of_rank in everyone:
        for name, value in of_rank.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _own_square(tensor: Tensor, world: World) -> Tensor:
    """This rank's share of the squared norm of a tensor: what all ranks have adds up to the whole."""
    return local_part(tensor).double().square().sum() / copies(tensor, world)


def copies(tensor: Tensor, world: World) -> int:
    """How many ranks of a pipeline stage hold the same elements as this one."""
    shards = math.prod(tensor.device_mesh.shape[axis] for axis in cut_axes(tensor)) if isinstance(tensor, DTensor) else 1
    return world.size // world.parallel.pp // shards


def clip(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Scale all gradients in place so that a global norm of ``norm`` becomes at most ``max_norm``."""
    if gradients and norm > max_norm:  # a pipeline stage may hold nothing that learns
        scale_gradients([local_part(g) for g in gradients], max_norm / norm)


def check_gradients(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Raise RuntimeError, naming them, when trainable parameters have no gradient, which no optimiser would notice."""
    missing = [name for name, p in parameters.items() if p.requires_grad and p.grad is None]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise RuntimeError(
            f"no gradient reached {shown}, which are to be trained: they take no part in the loss, or the layout lost it; "
            "freeze them (stages.NAME.trainable), or report this with the section parallel of the config"
        )


def sum_tied(gradient: Tensor, group: dist.ProcessGroup) -> None:
    """Sum the gradient of a weight that the first and the last pipeline stage hold, in place."""
    dist.all_reduce(local_part(gradient), group=group)
