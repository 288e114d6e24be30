"""Fully sharded data parallel (FSDP2) whose numbers are those of one process, and what must be summed over its shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from smalt.model import MultimodalModel

from .mesh import World


def shard_model(model: MultimodalModel, mesh: DeviceMesh | None) -> None:
    """Shard the parameters over the mesh in place, block by block; without a mesh nothing changes.

    Gradients are summed over ranks, not averaged: the loss of each rank is already divided by the tokens of all.
    """
    if mesh is None:
        return
    for block in [*model.vision.blocks, *model.language.blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # In float32 a factor makes FSDP ask for a premultiplied sum, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)


def reduce_gradients_at(model: MultimodalModel, last: bool) -> None:
    """Reduce gradients over ranks in the backward pass to come only if it is the last of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def reshard(model: MultimodalModel) -> None:
    """Give up gathered parameters after a forward pass that no backward pass follows; FSDP keeps those of the root."""
    if isinstance(model, FSDPModule):
        model.reshard()


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """The sum of a tensor over all ranks, the same bits on each."""
    if world.mesh is not None:
        dist.all_reduce(values)
    return values


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float, world: World) -> float:
    """Scale all gradients so that their global L2 norm is at most ``max_norm``; returns the norm before, summed in float64."""
    grads = [_local(p.grad) for p in parameters if p.grad is not None]
    squares = torch.stack([g.double().pow(2).sum() for g in grads]).sum() if grads else torch.zeros((), dtype=torch.float64)
    norm = float(sum_over_ranks(squares.to(world.device), world).sqrt())
    if norm > max_norm:
        torch._foreach_mul_(grads, max_norm / norm)
    return norm


def full_state(model: MultimodalModel) -> dict[str, Tensor]:
    """Every parameter whole, on each rank."""
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
