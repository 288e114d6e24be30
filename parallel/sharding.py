"""Fully sharded data parallel (FSDP2; Zhao et al. 2023, arXiv 2304.11277) whose gradients are those of one process."""

from __future__ import annotations

from itertools import pairwise

from torch.distributed.fsdp import FSDPModule, fully_shard

from .compat import set_unshard_async
from .mesh import World
from .part import ModelPart


def shard_part(part: ModelPart, world: World) -> None:
    """Shard the parameters of a part in place, block by block; what no block holds is gathered with the root.

    The decoder's over fsdp x cp, the tower's and the projector's over fsdp x cp x tp: every rank of a mesh sees other rows, or other
    tiles, and the reduction of FSDP is the whole reduction. Gradients are summed over ranks, not averaged, in the parameters'
    dtype: the loss of each rank is already divided by the tokens of all.
    """
    assert world.meshes is not None
    reshard = not world.parallel.keeps_gathered
    tower = [*part.vision.blocks, part.vision, part.projector] if part.is_first else []
    for module in tower:
        fully_shard(module, mesh=world.meshes.vision, reshard_after_forward=reshard)
    for block in part.language.blocks.values():
        fully_shard(block, mesh=world.meshes.weights, reshard_after_forward=reshard)
    fully_shard(part, mesh=world.meshes.weights)
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
