"""Fully sharded data parallel (FSDP2; Zhao et al. 2023, arXiv 2304.11277) whose gradients are those of one process."""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from .compat import read_parameters, set_unshard_async
from .mesh import World
from .part import ModelPart


def shard_part(part: ModelPart, world: World, compute: torch.dtype | None) -> None:
    """Shard the parameters of a part in place, block by block; what no block holds is gathered with the root.

    The decoder's over fsdp x cp, the tower's and the projector's over fsdp x cp x tp: every rank of a mesh sees other rows, or other
    tiles, and the reduction of FSDP is the whole reduction. Gradients are summed over ranks, not averaged, in the parameters'
    dtype: the loss of each rank is already divided by the tokens of all. compute: the dtype that weights are rounded to before they
    are gathered and used; their own if None.
    """
    assert world.meshes is not None
    reshard = not world.parallel.keeps_gathered
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute and torch.float32, cast_forward_inputs=False)
    # The tower's rows are a view, which the projector reads and nothing writes into.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPVisionTower\) returned a view tensor")
    tower = [*part.vision.blocks, part.vision, part.projector] if part.is_first else []
    for module in tower:
        fully_shard(module, mesh=world.meshes.vision, mp_policy=policy, reshard_after_forward=reshard)
    for block in part.language.blocks.values():
        fully_shard(block, mesh=world.meshes.weights, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(part, mesh=world.meshes.weights, mp_policy=policy)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # In float32 a factor makes FSDP ask for a premultiplied sum, which gloo does not have.
            module.set_force_sum_reduction_for_comms(True)
    if world.parallel.prefetch:
        # On a GPU gathers have a stream; on a CPU FSDP would wait for each where it starts it.
        set_unshard_async(part, world.device.type == "cpu")
        _prefetch([*tower[:-2], *part.language.blocks.values()])


def _prefetch(blocks: list) -> None:
    """While a block computes, the weights of the next one come: forward and, in the other order, backward."""
    for block, after in pairwise(blocks):
        block.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([block])


def round_weights(part: ModelPart, compute: torch.dtype, but: type[nn.Module] | tuple[()] = ()) -> None:
    """Let every module of a part that FSDP does not hold read its weights as FSDP would give them, rounded; their gradients stay wide.

    but: modules that are left out.
    """
    for module in part.modules():
        if not isinstance(module, but):
            read_parameters(module, lambda parameter: parameter.to(compute))
