"""The processes of a run, and the meshes they form."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .compat import forget_meshes, record_collectives, set_group_timeout
from .config import AXES, ParallelConfig
from .meeting import TIMEOUT, alive, meet_in_store, open_store, wait_for_alive
from .watchdog import group_timeout

T = TypeVar("T")

# Of the group of all, in which objects are exchanged too; those of meshes exchange tensors of the device alone.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
MESH_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class Meshes:
    """The same processes seen four ways; a rank is (pp, dp, fsdp, cp, tp), pp outermost.

    weights: (dp, shard) of the decoder, shard = fsdp x cp; where there is one replica, shard alone. vision: the same of the vision
    tower and the projector, shard = fsdp x cp x tp. tp, cp, pp: one axis each. tiles: cp x tp, the ranks that share a pack.
    """

    weights: DeviceMesh
    vision: DeviceMesh
    tp: DeviceMesh
    cp: DeviceMesh
    tiles: DeviceMesh
    pp: DeviceMesh


@dataclass(frozen=True)
class World:
    """This process among all. parallel: the sizes of the axes; meshes: None before there is a layout, and for a single process, which
    needs no process group; store: the key-value store of this life of the processes; timeout: of process groups; restarted: torchrun
    has started processes of the run before, known to the main one."""

    rank: int
    size: int
    device: torch.device
    parallel: ParallelConfig
    meshes: Meshes | None
    store: dist.Store | None = None
    timeout: timedelta = TIMEOUT
    restarted: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def coordinates(self) -> dict[str, int]:
        """Where this rank stands on each axis."""
        place, rest = {}, self.rank
        for axis in reversed(AXES):
            rest, place[axis] = divmod(rest, getattr(self.parallel, axis) or 1)
        return place

    @property
    def num_replicas(self) -> int:
        """Groups of ranks that take different packs: dp x fsdp."""
        return self.parallel.dp * (self.parallel.fsdp or 1)

    @property
    def replica(self) -> int:
        """Which of them this rank belongs to."""
        place = self.coordinates
        return place["dp"] * (self.parallel.fsdp or 1) + place["fsdp"]

    @property
    def groups(self) -> list[tuple[str, dist.ProcessGroup]]:
        """Every process group of the meshes with the name of its axis; none for a single process."""
        meshes = [] if self.meshes is None else [getattr(self.meshes, view.name) for view in fields(self.meshes)]
        return [(axis, mesh.get_group(axis)) for mesh in meshes for axis in mesh.mesh_dim_names]

    def agree(self, decide: Callable[[], Any], name: str | None = None) -> Any:
        """What the main process decides, on every rank; what it raises is raised by all. name: of a decision that may take longer than
        the timeout, and is made once: the others wait for it as long as the main process is alive."""
        if self.size == 1:
            return decide()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                with alive(self.store, name) if name and self.store else nullcontext():
                    answer[0] = decide()
            except (Exception, SystemExit) as error:
                answer[1] = error
        elif name and self.store:
            wait_for_alive(self.store, name)
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def attempt(self, act: Callable[[], T]) -> T:
        """``act()`` on every rank, the main one first, of which the others hear whether it failed: they would wait for it in vain."""
        made: list[T] = []
        self.agree(lambda: made.append(act()))
        return made[0] if made else act()

    def gather(self, value: T) -> list[T]:
        """The value of each rank, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def is_same(self, number: int) -> bool:
        """Whether every rank has this number, of 63 bits, in one small exchange between CPUs."""
        if self.size == 1:
            return True
        bounds = torch.tensor([number, -number])
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        return bool(bounds[0] == -bounds[1])

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place, the same bits on each."""
        if self.meshes is not None:
            dist.all_reduce(values)
        return values


def alone(device: torch.device, parallel: ParallelConfig | None = None) -> World:
    """A single process, without a process group. Raises ValueError when an axis is larger than 1."""
    return World(0, 1, device, (parallel or ParallelConfig()).sized(1), None)


def join_world(device: str = "auto", parallel: ParallelConfig | None = None) -> World:
    """:func:`meet`, and at once :func:`lay_out`."""
    return lay_out(meet(), device, parallel or ParallelConfig())


def meet() -> World:
    """Join the processes that torchrun started, or stand alone: a world in which processes can agree, before it has a layout.

    Raises RuntimeError, naming the ranks, when they do not come within ten minutes.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    cpu = torch.device("cpu")
    if size == 1:
        return World(0, 1, cpu, ParallelConfig(), None, restarted=restarts > 0)
    store, restarted = meet_in_store(open_store(), rank, size, restarts)
    record_collectives()
    world = World(rank, size, cpu, ParallelConfig(), None, store, restarted=restarted)
    _join_all(world)
    return world


def lay_out(world: World, device: str, parallel: ParallelConfig) -> World:
    """The world with a device and its meshes; every rank calls it. device: "auto" (a GPU where there is one), "cpu" or "cuda".

    DeepSpeed needs a process group even alone. Raises ValueError when the axes do not multiply to the number of processes, or the
    device lacks what the layout needs.
    """
    parallel, target = parallel.sized(world.size), _device(device)
    if parallel.async_tp and target.type != "cuda":
        raise ValueError("parallel.async_tp works on GPUs, and this run is on the cpu: leave it out")
    if world.size == 1 and parallel.runtime == "torch":
        return replace(world, device=target, parallel=parallel)
    if world.size == 1:
        dist.init_process_group(BACKENDS[target.type], store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    watched = timedelta(seconds=parallel.watchdog_seconds)
    timeout = group_timeout(watched) if watched else TIMEOUT
    assert dist.group.WORLD is not None
    set_group_timeout(dist.group.WORLD, timeout)
    meshes = build_meshes(parallel, target.type, timeout)
    return replace(world, device=target, parallel=parallel, meshes=meshes, timeout=timeout)


def _device(kind: str) -> torch.device:
    """This process's, made the current one. Raises ValueError where there is none."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if kind == "auto" else kind
    if kind == "cpu":
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f"process {local_rank} of this machine has no GPU: torch sees {count}; start as many, or set device to cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def build_meshes(parallel: ParallelConfig, kind: str, timeout: timedelta = TIMEOUT) -> Meshes:
    """The meshes over all processes of the default group. kind: "cpu" or "cuda"; timeout: of their groups."""
    pp, dp, fsdp, cp, tp = (getattr(parallel, axis) for axis in AXES)
    forget_meshes()  # of a layout that these processes had before

    # Each view is a mesh of its own over all ranks: slices of a flattened axis are private to torch, and about to go. Backends are
    # named so that an axis over all ranks has a group of its own: in one group weights and keys would wait for each other.
    backend = "fake" if dist.get_backend() == "fake" else MESH_BACKENDS[kind]

    def view(**axes: int) -> DeviceMesh:
        backends: dict[int | str, Any] = dict.fromkeys(axes, backend)
        mesh = init_device_mesh(kind, tuple(axes.values()), mesh_dim_names=tuple(axes), backend_override=backends)
        for axis in axes if backend != "fake" else ():
            set_group_timeout(mesh.get_group(axis), timeout)
        return mesh

    def shards(mesh: DeviceMesh, axis: str) -> DeviceMesh:
        return mesh["dp", axis] if dp > 1 else mesh[axis]

    weights = view(pp=pp, dp=dp, fsdp_cp=fsdp * cp, tp=tp)
    vision = view(pp=pp, dp=dp, fsdp_cp_tp=fsdp * cp * tp)
    rows = view(pp_dp_fsdp=pp * dp * fsdp, cp=cp, tp=tp)
    tiles = view(pp_dp_fsdp=pp * dp * fsdp, cp_tp=cp * tp)
    if kind == "cuda" and pp > 1:
        # NCCL makes the communicator of a group in its first exchange, to which all must come, and a pipeline begins with pairs.
        dist.all_reduce(torch.zeros(1, device=kind), group=weights["pp"].get_group())
    return Meshes(shards(weights, "fsdp_cp"), shards(vision, "fsdp_cp_tp"), weights["tp"], rows["cp"], tiles["cp_tp"], weights["pp"])


def leave_world(world: World) -> None:
    """Close the process group."""
    if world.meshes is not None:
        dist.destroy_process_group()


def rejoin(world: World, name: str) -> World:
    """The processes of :func:`meet` once more, when they have left the layout that they had: a group of all and keys in the store that
    nothing has used yet, under a name that was not given before; every rank calls it."""
    if world.size == 1:
        return world
    assert world.store is not None
    store = dist.PrefixStore(name, world.store)
    again = replace(world, store=store)
    _join_all(again)
    return again


def _join_all(world: World) -> None:
    kind = "cuda" if torch.cuda.is_available() and dist.is_nccl_available() else "cpu"
    dist.init_process_group(BACKENDS[kind], store=world.store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
