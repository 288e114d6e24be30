"""Checkpoints: written in the background, committed by one rename, and trusted only when every byte is the one that was written.

A checkpoint is a folder ``step-00000100`` with the tensors (weights, optimiser state, random state) in one safetensors file a
process, ``state.json`` (everything else) and ``checksums.json`` (size and checksum of each of those files). It is written as
``step-00000100.partial`` and renamed when every byte of every process is on disk, so a folder with the final name was whole once.
Whether it still is, is seen when it is read: a damaged one is renamed ``step-00000100.damaged``, never removed, and the one before
it is used. Nothing in a checkpoint is a pickle.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from smalt.model import ModelConfig
from smalt.parallel import World

from .errors import UserError
from .shard_storage import Snapshot, save_snapshot
from .tensor_files import SUFFIX, FileRecord, checksum, sync_folder, write_file

# A single process saves without a process group, on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

STATE, CHECKSUMS = "state.json", "checksums.json"
PARTIAL, DAMAGED = ".partial", ".damaged"
# In state.json. Version 0.2.1 wrote neither it nor checksums.
FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]


class CheckpointWriter:
    """Saves one checkpoint at a time into ``folder`` and keeps the newest ``keep``.

    The thread that trains only copies the tensors; a thread of this class writes, syncs, commits and removes old ones. ``on_error``
    is called in the thread that trains, by the next ``poll``, ``save`` or ``wait``, with what went wrong when a save failed; the
    checkpoints before it are untouched. All processes of a run make the same calls.
    """

    def __init__(self, folder: Path, keep: int, world: World, on_error: Callable[[str], None]):
        self.folder, self.keep, self.world, self.on_error = folder, keep, world, on_error
        self.pending: tuple[Future[None], int] | None = None
        self.snapshot = Snapshot()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Collectives of a save run in its thread: on the group of training they would mix with those of the step.
        self.group = dist.new_group(backend="gloo", timeout=world.timeout) if world.meshes is not None else None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(leftover)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to save the tensors as they are now; waits for the save before it. ``state`` must be JSON."""
        self.wait()
        self.snapshot.take(tensors)
        text = json.dumps({"format": FORMAT, "step": step, **state}, indent=1)
        self.pending = self.thread.submit(self._write, step, text), step

    def poll(self) -> None:
        """Report the save in progress if it is done; call between steps."""
        if self.pending and self.pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Return when no save is in progress; report what went wrong in the one that was."""
        if self.pending is None:
            return
        (future, step), self.pending = self.pending, None
        error = future.exception()
        if error is not None:
            last = _committed(self.folder)
            good = f"the last good one is {last[-1]}" if last else "there is no earlier one"
            self.on_error(f"checkpoint of step {step} could not be written to {self.folder}: {_root_cause(error)}; {good}")

    # The rest runs in the thread of the save.

    def _write(self, step: int, state: str) -> None:
        partial = self.folder / f"step-{step:08d}{PARTIAL}"
        try:
            save_snapshot(self.snapshot, partial, self.world.rank, self.group, lambda shards: self._commit(partial, state, shards))
        except BaseException:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _commit(self, partial: Path, state: str, shards: list[FileRecord]) -> None:
        """On the main process, when the shards of all are on disk."""
        records = [*shards, write_file(partial / STATE, [state.encode()])]
        write_file(partial / CHECKSUMS, [json.dumps([asdict(record) for record in records], indent=1).encode()])
        sync_folder(partial)
        final = partial.with_name(partial.name.removesuffix(PARTIAL))
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync_folder(self.folder)
        for old in _committed(self.folder)[: -self.keep]:
            _remove(old)


def holds_checkpoints(folder: Path) -> bool:
    """Whether a run has saved there: a checkpoint, be it damaged, but not one whose writing was cut short."""
    return any(not path.name.endswith(PARTIAL) for path in folder.glob("step-*"))


def latest_checkpoint(folder: Path) -> Checkpoint:
    """The newest whole checkpoint of a folder, every file of it verified; for one process of a run.

    Newer ones that are damaged are set aside, and stderr says what is wrong with them. Raises UserError when no whole one is left.
    """
    passed: list[Path] = []
    while left := [path for path in _committed(folder) if path not in passed]:
        path = left[-1]
        checkpoint, damage = _examine(path)
        if checkpoint is not None:
            if passed:
                _say(f"step {checkpoint.step} is used instead: {path}")
            return checkpoint
        if path.exists():  # a run that is under way may have removed it meanwhile
            passed.append(path)
            _say(f"checkpoint {path} is damaged: {damage}; {_set_aside(path)}")
    damaged = sorted(path.name for path in folder.glob(f"step-*{DAMAGED}*"))
    raise UserError(f"{folder} holds no {'whole ' if damaged else ''}checkpoint" + (f", only {', '.join(damaged)}" if damaged else ""))


def checkpoint_of_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step, verified. Raises UserError when there is none, or when it is damaged."""
    found = {_step(path): path for path in _committed(folder)}
    if step not in found:
        raise UserError(f"{folder} holds no checkpoint of step {step}; the steps are {', '.join(map(str, found)) or 'none'}")
    checkpoint, damage = _examine(found[step])
    if checkpoint is None:
        raise UserError(f"checkpoint {found[step]} is damaged: {damage}; choose another step")
    return checkpoint


def checkpoint_before(folder: Path, step: int) -> Checkpoint | None:
    """The newest whole checkpoint of that step or earlier, None where there is none; stderr names damaged ones that it passes over."""
    for path in reversed([path for path in _committed(folder) if _step(path) <= step]):
        checkpoint, damage = _examine(path)
        if checkpoint is not None:
            return checkpoint
        _say(f"checkpoint {path} is damaged: {damage}; the one before it is looked at")
    return None


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


def _examine(path: Path) -> tuple[Checkpoint | None, str]:
    """A checkpoint if it is whole, else what is wrong with it."""
    if damage := _damage(path):
        return None, damage
    try:
        state = json.loads((path / STATE).read_text())
        checkpoint = Checkpoint(path, state["step"], state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{STATE} cannot be read ({type(error).__name__}: {error})"
    if (path / CHECKSUMS).exists():
        return checkpoint, ""
    if "format" in state:
        return None, f"{CHECKSUMS} is missing"
    _say(f"checkpoint {path} has no checksums, as those of version 0.2.1: only the form of its files was checked")
    return checkpoint, ""


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint: the first fault that is found."""
    try:
        names = {file.name for file in path.iterdir()}
        if CHECKSUMS not in names:
            return _damaged_form(path, names)
        records = [FileRecord(**record) for record in json.loads((path / CHECKSUMS).read_text())]
    except (OSError, ValueError, TypeError) as error:
        return f"{CHECKSUMS} cannot be read ({type(error).__name__}: {error})"
    # DCP would read any safetensors file that it finds.
    if strange := sorted(name for name in names - {r.name for r in records} if name.endswith(SUFFIX)):
        return f"{', '.join(strange)} is not of it"
    with ThreadPoolExecutor(8) as threads:
        return next(filter(None, threads.map(lambda record: _damaged_file(path / record.name, record), records)), None)


def _damaged_file(path: Path, record: FileRecord) -> str | None:
    try:
        if (size := path.stat().st_size) != record.size:
            return f"{record.name} has {size:,} bytes, {record.size:,} were written"
        return None if checksum(path) == record.checksum else f"{record.name} is not what was written: its checksum differs"
    except FileNotFoundError:
        return f"{record.name} is missing"
    except OSError as error:
        return f"{record.name} cannot be read ({error})"


def _damaged_form(path: Path, names: set[str]) -> str | None:
    """What can be seen without checksums: a shard that is cut off, or none at all."""
    shards = sorted(name for name in names if name.endswith(SUFFIX))
    for name in shards:
        try:
            with safe_open(path / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{name} cannot be read ({error})"
    return None if shards else f"it holds no {SUFFIX} file"


def _set_aside(path: Path) -> str:
    """Rename a damaged checkpoint so that nothing takes it for one; returns what was done, for people."""
    names = [path.name + DAMAGED, *(f"{path.name}{DAMAGED}-{number}" for number in range(2, 1000))]
    target = next(target for target in map(path.with_name, names) if not target.exists())
    try:
        path.rename(target)
    except OSError as error:
        return f"it is passed over where it is, for it cannot be renamed ({error})"
    return f"set aside as {target.name}"


def _say(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _committed(folder: Path) -> list[Path]:
    """The checkpoints of a folder by step, neither partial nor set aside."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name[5:])


def _remove(path: Path) -> None:
    # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a final name.
    doomed = path.with_name(f"{path.name}.old{PARTIAL}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _flat(config: dict[str, Any], prefix: str = "model") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}.{key}") if isinstance(value, dict) else {f"{prefix}.{key}": value})
    return flat


def _root_cause(error: BaseException) -> str:
    """DCP raises one exception for all ranks, with theirs inside."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))
        error = error[0] if isinstance(error, tuple) else error
    return f"{type(error).__name__}: {error}"
