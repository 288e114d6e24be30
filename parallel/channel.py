"""Exchanges of small objects between all ranks, beside the collectives of training: for a thread that works ahead of it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from .mesh import World

T = TypeVar("T")

# A rank that is ahead waits as long as the others train, save or evaluate. One that dies breaks its connection at once.
_PATIENCE = timedelta(days=7)


class Channel:
    """Its own process group, so that a thread's exchanges do not mix with those of others; every rank makes one at the same point."""

    def __init__(self, world: World):
        self.size = world.size
        self.group = dist.new_group(backend="gloo", timeout=_PATIENCE) if world.size > 1 else None

    def gather(self, value: T) -> list[T]:
        """The value of each rank, by rank; every rank calls it. Raises RuntimeError when another has gone."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def close(self) -> None:
        """Every rank calls it, after the last exchange."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None
