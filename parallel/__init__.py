"""Puts a model on a mesh of processes. Knows nothing of stages."""

from .batch import PackShard
from .config import ParallelConfig
from .mesh import World, alone, join_world, leave_world
from .model import ParallelModel
from .watchdog import FIRST_STEP, Watchdog

__all__ = ["FIRST_STEP", "PackShard", "ParallelConfig", "ParallelModel", "Watchdog", "World", "alone", "join_world", "leave_world"]
