"""Puts a model on a mesh of processes. Knows nothing of stages."""

from .mesh import World, join_world, leave_world
from .sharding import clip_gradients, full_state, reduce_gradients_at, reshard, shard_model, sum_over_ranks

__all__ = [
    "World",
    "clip_gradients",
    "full_state",
    "join_world",
    "leave_world",
    "reduce_gradients_at",
    "reshard",
    "shard_model",
    "sum_over_ranks",
]
