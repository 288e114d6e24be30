"""Activation checkpointing and compilation, block by block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from . import compat
from .config import ParallelConfig
from .mesh import World
from .part import ModelPart


def recompute_blocks(part: ModelPart, parallel: ParallelConfig) -> None:
    """Make the blocks of a part keep less for the backward pass, as ``parallel.checkpointing`` says."""
    if parallel.checkpointing == "none":
        return
    context: dict[str, Any] = {}
    if parallel.checkpointing == "selective":
        context["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps)
    for block in _blocks(part):
        block.forward = _computed_again(block.forward, context)


def _computed_again(forward: Callable[..., Tensor], context: dict[str, Any]) -> Callable[..., Tensor]:
    # A function, not a partial: torch.compile passes over modules whose forward is none, without a word.
    def run(*inputs: Any) -> Tensor:
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **context)

    return run


def compile_blocks(part: ModelPart, world: World) -> None:
    """Compile the blocks of a part, where ``parallel.compile`` is on."""
    parallel = world.parallel
    if not parallel.compile:
        return
    # All three are of the process: one that trains run after run has those of the last one otherwise.
    compat.set_memory_budget(1.0 if parallel.memory_budget is None else parallel.memory_budget)
    compat.donate_buffers(not (parallel.schedule == "zero_bubble" and parallel.pp > 1))
    compat.set_async_tp(world.meshes.tp.get_group() if world.meshes is not None and parallel.async_tp else None)
    for block in _blocks(part):
        block.compile()


def _blocks(part: ModelPart) -> list[nn.Module]:
    return [*(part.vision.blocks if part.is_first else []), *part.language.blocks.values()]


def _keeps(context, operator, *args, **kwargs) -> CheckpointPolicy:
    """Keep what is dear to make and small: matrix products, attention, and what came from other ranks."""
    return CheckpointPolicy.MUST_SAVE if operator in compat.DEAR else CheckpointPolicy.PREFER_RECOMPUTE
