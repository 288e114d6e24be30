"""The processes of a run, and the mesh they form."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among all. mesh: one axis, ``fsdp``; None for a single process, which needs no process group."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(device: str = "auto") -> World:
    """Join the processes that torchrun started, or stand alone. device: "auto" (a GPU where there is one), "cpu" or "cuda"."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    target = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(target)
    if size == 1:
        return World(0, 1, target, None)
    # Workers that torchrun restarts would read the addresses of the dead ones from the old keys: every life has its own prefix.
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    life = f"{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(life, store), rank=rank, world_size=size, timeout=TIMEOUT)
    return World(rank, size, target, init_device_mesh(kind, (size,), mesh_dim_names=("fsdp",)))


def leave_world(world: World) -> None:
    """Close the process group."""
    if world.mesh is not None:
        dist.destroy_process_group()
