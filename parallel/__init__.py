"""Puts a model on a mesh of processes. Knows nothing of stages."""

from .batch import PackShard
from .config import ParallelConfig
from .distillation import Distillation, make_teacher
from .mesh import World, alone, join_world, lay_out, leave_world, meet, rejoin
from .model import ParallelModel
from .watchdog import FIRST_STEP, Watchdog

__all__ = [
    "FIRST_STEP", "Distillation", "PackShard", "ParallelConfig", "ParallelModel", "Watchdog", "World", "alone", "join_world",
    "lay_out", "leave_world", "make_teacher", "meet", "rejoin",
]  # fmt: skip
