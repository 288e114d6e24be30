"""How a checkpoint leaves the training thread: copies in memory that is kept, and torch.distributed.checkpoint's writing of them.

DCP's own ways were tried. ``async_save`` copies on the caller's thread, once in its stager and, unless told otherwise, once more in
the writer; ``HuggingFaceStorageWriter`` makes the whole file in memory before it writes it, under the interpreter's lock. So here:
one copy, whose memory stays; a plan that is made when that memory is; the rest through the public interfaces of DCP's planner and
storage, in a thread of ours. What is shared between processes, which of them writes what, and whose error everyone gets, is DCP's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from smalt.parallel.compat import OFFSETS_KEY, PIECES_KEY
from smalt.parallel.layout import local_part

from .tensor_files import SUFFIX, FileRecord, write_tensors

Commit = Callable[[list[FileRecord]], None]


class Snapshot:
    """This process's part of every tensor, copied to host memory that the next save uses again; pinned for tensors of a GPU.

    Pinned memory comes in powers of two, so it can take up to twice what the tensors have.
    """

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}
        self.items: list[WriteItem] = []
        self._layout: dict[str, tuple[Any, ...]] = {}
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors as they are now. From a GPU the copies are only put in the stream of training: what training puts there
        next comes after them. Memory is allocated when names, shapes or layout have changed since the last call."""
        layout = {name: _layout(tensor) for name, tensor in tensors.items()}
        if layout != self._layout:
            self.copies = {name: self._memory(name, layout[name], tensor) for name, tensor in tensors.items()}
            self.items = create_default_local_save_plan(tensors, is_coordinator=False).items
            self._layout = layout
        for name, tensor in tensors.items():
            self.copies[name].copy_(local_part(tensor), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Return when the copies are complete; for the thread that reads them."""
        if self._copied is not None:
            self._copied.synchronize()

    def _memory(self, name: str, layout: tuple[Any, ...], tensor: Tensor) -> Tensor:
        if self._layout.get(name) == layout:
            return self.copies[name]
        local = local_part(tensor)
        return torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)


def save_snapshot(snapshot: Snapshot, folder: Path, rank: int, group: dist.ProcessGroup | None, commit: Commit) -> None:
    """Write the snapshots of all processes into ``folder``, made anew: one safetensors file a process, synced; then call ``commit``
    on the main process with what was written. All processes of the group call this; an error of one, that of ``commit`` too, is
    raised on all."""
    storage = _ShardStorage(snapshot, folder, rank, commit)
    planner = _SnapshotPlanner(snapshot)
    # The planner knows what to save. A dict given here would only be walked through and logged, tensor by tensor.
    dcp.save({}, storage_writer=storage, planner=planner, process_group=group, no_dist=group is None)


class _SnapshotPlanner(dcp.DefaultSavePlanner):
    """The plan is that of the tensors that were copied, which need not be there any more."""

    def __init__(self, snapshot: Snapshot):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.snapshot = snapshot

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(list(self.snapshot.items))
        return self.plan


class _ShardStorage(dcp.StorageWriter):
    """One file for each process, in the form that ``HuggingFaceStorageReader`` reads."""

    def __init__(self, snapshot: Snapshot, folder: Path, rank: int, commit: Commit):
        self.snapshot, self.folder, self.commit = snapshot, folder, commit
        self.path = folder / f"shard-{rank:05d}{SUFFIX}"

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing to do: there is one of these for each save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(plan.items) if plan.items else [])
        return future

    def _write(self, items: list[WriteItem]) -> list[WriteResult]:
        # Here, and not before DCP begins: an error of the device on one process is then raised on all.
        self.snapshot.wait()
        chunks = {item.index.fqn: item.tensor_data for item in items if item.tensor_data is not None}
        if len(chunks) < len(items):
            raise ValueError(f"{self.path}: what is no tensor, or comes in several pieces on one process, has no place in this format")
        pieces = {name: {OFFSETS_KEY: list(data.chunk.offsets)} for name, data in chunks.items()}
        record = write_tensors(
            self.path,
            {name: (data.properties.dtype, data.chunk.sizes) for name, data in chunks.items()},
            self.snapshot.copies.__getitem__,
            {PIECES_KEY: json.dumps(pieces), "format": "pt"},
        )
        return [WriteResult(item.index, record.size, record) for item in items]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.commit(sorted({result.storage_data for of_rank in results for result in of_rank}, key=lambda record: record.name))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """All that the plan and the memory of a copy depend on."""
    placed = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    return (tensor.dtype, tensor.shape, tensor.is_cuda, *placed)
