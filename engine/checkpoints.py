"""Checkpoints: safetensors shards written in the background by torch.distributed.checkpoint, committed by one rename.

A checkpoint is a folder ``step-00000100`` with the tensors (weights, optimiser state, random state) and ``state.json``
(everything else). It is written as ``step-00000100.partial`` and renamed when every byte of every rank is on disk, so a folder
with the final name is always whole. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from smalt.model import ModelConfig
from smalt.parallel import ParallelModel, World

from .errors import UserError
from .optimizers import optimizer_tensors

# A single process saves without a process group, on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

STATE = "state.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]


class CheckpointWriter:
    """Saves one checkpoint at a time into ``folder`` and keeps the newest ``keep``.

    ``on_error`` is called in the training thread with what went wrong when a save failed; the checkpoints before it are untouched.
    """

    def __init__(self, folder: Path, keep: int, world: World, on_error: Callable[[str], None]):
        self.folder, self.keep, self.world, self.on_error = folder, keep, world, on_error
        self.pending: tuple[Future, int] | None = None
        # Collectives of a save run in its thread: on the group of training they would mix with those of the step.
        self.group = dist.new_group(backend="gloo") if world.meshes is not None else None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(leftover)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to save a copy of the tensors as they are now; waits for the save before it. ``state`` must be JSON."""
        self.wait()
        path = self.folder / f"step-{step:08d}{PARTIAL}"
        snapshot = {name: _copy_to_cpu(tensor) for name, tensor in tensors.items()}
        writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        try:
            if self.world.is_main:
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
                _write_synced(path / STATE, json.dumps({"step": step, **state}, indent=1))
            future = dcp.async_save(snapshot, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            assert isinstance(future, Future)
            self.pending = future, step
        except OSError as error:
            self._failed(step, error)

    def poll(self) -> None:
        """Commit the save in progress if it is done; call between steps."""
        if self.pending and self.pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Finish the save in progress, if there is one, and commit it."""
        if self.pending is None:
            return
        (future, step), self.pending = self.pending, None
        error = future.exception()
        if error is not None:
            self._failed(step, error)
        elif self.world.is_main:
            try:
                self._commit(step)
            except OSError as os_error:
                self._failed(step, os_error)

    def _commit(self, step: int) -> None:
        partial, final = self.folder / f"step-{step:08d}{PARTIAL}", self.folder / f"step-{step:08d}"
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(self.folder)
        for old in _whole(self.folder)[: -self.keep]:
            # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a final name.
            doomed = old.with_name(old.name + PARTIAL)
            old.rename(doomed)
            shutil.rmtree(doomed)

    def _failed(self, step: int, error: BaseException) -> None:
        if self.world.is_main:
            shutil.rmtree(self.folder / f"step-{step:08d}{PARTIAL}", ignore_errors=True)
        last = _whole(self.folder)
        good = f"the last good one is {last[-1]}" if last else "there is no earlier one"
        self.on_error(f"checkpoint of step {step} could not be written to {self.folder}: {_root_cause(error)}; {good}")


def latest_checkpoint(folder: Path) -> Checkpoint:
    """The newest whole checkpoint of a folder. Raises UserError when there is none."""
    whole = _whole(folder)
    if not whole:
        raise UserError(f"{folder} holds no checkpoint")
    path = whole[-1]
    try:
        state = json.loads((path / STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {path}: {STATE} cannot be read ({error}); remove the folder to use the one before") from error
    return Checkpoint(path, state["step"], state)


def check_architecture(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise UserError, naming every difference, when the checkpoint is of another architecture."""
    saved, wanted = _flat(checkpoint.state["model"]), _flat(config.model_dump())
    different = [f"{k}: {saved.get(k)} in the checkpoint, {wanted.get(k)} here" for k in wanted if saved.get(k) != wanted[k]]
    if different:
        raise UserError(f"checkpoint {checkpoint.path} is of another architecture:\n  " + "\n  ".join(different))


def load_tensors(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors in place from the checkpoint, whatever layout wrote it. Raises UserError when one is missing or broken."""
    try:
        reader = dcp.HuggingFaceStorageReader(str(checkpoint.path))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # DCP's own is no Exception, and holds those of all ranks
        raise UserError(f"checkpoint {checkpoint.path} cannot be loaded: {_root_cause(error)}") from error


def training_tensors(model: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights as ``model.NAME``, and the optimiser's state as ``optimizer.STATE.NAME``, made now where no step was taken yet."""
    names = {p: n for n, p in model.named_parameters()}
    return {**{f"model.{n}": p.data for p, n in names.items()}, **optimizer_tensors(optimizer, names)}


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """A copy that later steps do not change, the only one: moving from a GPU copies already."""
    return tensor.detach().cpu() if tensor.is_cuda else tensor.detach().clone()


def _whole(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and not p.name.endswith(PARTIAL))


def _flat(config: dict[str, Any], prefix: str = "model") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}.{key}") if isinstance(value, dict) else {f"{prefix}.{key}": value})
    return flat


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _root_cause(error: BaseException) -> str:
    """DCP raises one exception for all ranks, with theirs inside."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))
        error = error[0] if isinstance(error, tuple) else error
    return f"{type(error).__name__}: {error}"
