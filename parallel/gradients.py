"""Gradients over a mesh: their norm, in which each element counts once; clipping; a tied weight; what has none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .compat import scale_gradients
from .mesh import World


def global_norm(tensors: Iterable[Tensor], world: World) -> float:
    """L2 norm of all tensors over all ranks, formed in float64. ``tensors``: those of this rank; of a weight that two pipeline
    stages hold, one of them leaves it out."""
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for tensor in tensors:
        total += local(tensor).double().square().sum() / copies(tensor, world)
    return math.sqrt(float(world.sum(total)))


def copies(tensor: Tensor, world: World) -> int:
    """How many ranks of a pipeline stage hold the same elements as this one."""
    shards = 1
    if isinstance(tensor, DTensor):
        sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        shards = math.prod(size for size, placement in sizes if not placement.is_replicate())
    return world.size // world.parallel.pp // shards


def clip(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Scale all gradients in place so that a global norm of ``norm`` becomes at most ``max_norm``."""
    if gradients and norm > max_norm:  # a pipeline stage may hold nothing that learns
        scale_gradients([local(g) for g in gradients], max_norm / norm)


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
    dist.all_reduce(local(gradient), group=group)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
