"""Puts a model on a mesh of processes. Knows nothing of stages."""

from .batch import PackShard
from .config import ParallelConfig
from .mesh import World, alone, join_world, leave_world
from .model import ParallelModel

__all__ = ["PackShard", "ParallelConfig", "ParallelModel", "World", "alone", "join_world", "leave_world"]
