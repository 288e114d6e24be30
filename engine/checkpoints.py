"""Checkpoints: written in the background, committed by one rename, and trusted only when every byte is the one that was written.

A checkpoint is a folder ``step-00000100`` with the tensors (weights, optimiser state, random state) in one safetensors file a
process, ``state.json`` (everything else) and ``checksums.json`` (size and checksum of each of those files). It is written as
``step-00000100.partial`` and renamed when every byte of every process is on disk, so a folder with the final name was whole once.
Whether it still is, is seen when it is read: the one before a damaged one is used, and the run, but no mere reader, renames the
damaged one ``step-00000100.damaged``; it is never removed. A file that the disk does not give is no damage: it may be whole, so that
is an error, and changes nothing. Nothing in a checkpoint is a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from smalt.model import ModelConfig
from smalt.parallel import World

from .config import flat
from .errors import UserError, warn
from .shard_storage import Snapshot, save_snapshot
from .tensor_files import SUFFIX, FileRecord, checksum, sync_folder, write_file

# A single process saves without a process group, on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

STATE, CHECKSUMS = "state.json", "checksums.json"
PARTIAL, DAMAGED, DIVERGED = ".partial", ".damaged", ".diverged"
# In state.json. Version 0.2.1 wrote neither it nor checksums.
FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]


@dataclass
class _Save:
    """A save that :meth:`CheckpointWriter.wait` has not seen to yet. error: why it failed; asked: it is over on this process, and the
    poll that reports is being chosen; report_at: that poll; polls: those that have begun since the save did; lost: the processes lost
    each other in it; reported: this process has said what became of it."""

    step: int
    ended: Future[None] = field(default_factory=Future)
    error: BaseException | None = None
    asked: threading.Event = field(default_factory=threading.Event)
    report_at: Future[int] = field(default_factory=Future)
    polls: int = 0
    lost: bool = False
    reported: bool = False


class CheckpointWriter:
    """Saves one checkpoint at a time into ``folder`` and keeps the newest ``keep``.

    The thread that trains only copies the tensors; a thread of this class writes, syncs, commits and removes old ones. ``on_error``
    is called in the thread that trains, by ``poll``, ``save`` or ``wait``, with what went wrong when a save failed; the checkpoints
    before it are untouched. All processes of a run make the same calls, and the same call of each of them reports.
    """

    # Why the same call: what on_error does, such as to raise, must be done by all processes in one step, or those that go on wait
    # for the others in the next collective. DCP gives every process the same outcome of a save, but each hears of it at a moment of
    # its own. So when a save has ended, the thread of the save asks for the number of polls that this process has begun since it
    # was begun, and the largest of all processes, plus one, is the poll that reports; this costs one collective a save, in that
    # thread. From the question to the answer a poll waits: otherwise it could be past that number when the answer comes. The answer
    # needs only the threads of the saves, which wait for no training, so that this cannot lock up, and is as quick as the network.
    # Where those threads lose each other there is no such answer, and one process may have failed alone. Then wait reports, in which
    # all tell each other over the group of training how the save ended.

    def __init__(self, folder: Path, keep: int, world: World, on_error: Callable[[str], None]):
        self.folder, self.keep, self.world, self.on_error = folder, keep, world, on_error
        self.pending: _Save | None = None
        self.snapshot = Snapshot()
        self._refused: set[Path] = set()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Collectives of a save run in its thread: on the group of training they would mix with those of the step.
        self.group = _new_group(world) if world.meshes is not None else None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"*{PARTIAL}"):
                self._remove_folder(leftover)

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to save the tensors as they are now; waits for the save before it. ``state`` must be JSON."""
        self.wait()
        self.snapshot.take(tensors)
        text = json.dumps({"format": FORMAT, "step": step, **state}, indent=1)
        self.pending = save = _Save(step)
        save.ended = self.thread.submit(self._write, save, text)

    def poll(self) -> None:
        """Report the save in progress if it is over, in the same call on all processes; call between steps."""
        if (save := self.pending) is None or save.reported:
            return
        save.polls += 1
        # Counted before it looks, as _agree asks before it reads the count: one of the two sees the other.
        if save.asked.is_set() and save.polls >= save.report_at.result():
            self._report(save, [self._failure(save)])

    def wait(self) -> None:
        """Return when no save is in progress; report what went wrong in the one that was."""
        if self.pending is None:
            return
        save, self.pending = self.pending, None
        save.ended.result()
        failures: list[tuple[bool, str] | None] = [self._failure(save)]
        if self.group is not None:
            known: list[Any] = [None] * self.world.size
            dist.all_gather_object(known, (save.lost, *failures))
            failures = [failure for _, failure in known]
            if any(lost for lost, _ in known):
                # Connections that have timed out stay closed.
                dist.destroy_process_group(self.group)
                self.group = _new_group(self.world)
        if not save.reported:
            self._report(save, failures)

    def _report(self, save: _Save, failures: list[tuple[bool, str] | None]) -> None:
        save.reported = True
        if failed := [failure for failure in failures if failure is not None]:
            _, cause = min(failed)
            self.on_error(f"checkpoint of step {save.step} could not be written to {self.folder}: {cause}; {self._last_good()}")

    def _failure(self, save: _Save) -> tuple[bool, str] | None:
        """Why the save failed here, and before it whether that may be but the loss of a process to which something else happened."""
        if save.error is None:
            return None
        rank, cause = _root_cause(save.error, self.world.rank)
        return save.lost and isinstance(save.error, RuntimeError), f"rank {rank}: {cause}" if self.world.size > 1 else cause

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, while no save is in progress: the run has gone back before them."""
        if self.world.is_main:
            for path in (path for path in _committed(self.folder) if _step(path) > step):
                self._remove(path)

    def _last_good(self) -> str:
        try:
            last = _committed(self.folder)
        except UserError:
            return "those before it are as they were"
        return f"the last good one is {last[-1]}" if last else "there is no earlier one"

    # The rest runs in the thread of the save, _remove_folder in that of training too.

    def _write(self, save: _Save, state: str) -> None:
        partial = self.folder / f"step-{save.step:08d}{PARTIAL}"
        try:
            save_snapshot(self.snapshot, partial, self.world.rank, self.group, lambda shards: self._commit(partial, state, shards))
        except BaseException as error:
            save.error = error
        # DCP's own error is raised on all processes. Of any other, such as a lost connection, the others may not know: they would not
        # come to agree.
        save.lost = self.group is not None and not isinstance(save.error, CheckpointException | None)
        if not save.lost:
            self._agree(save)
        # Not before: a poll waits for that, and a slow disk takes its time.
        if save.error is not None and self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)

    def _agree(self, save: _Save) -> None:
        """Choose, with all processes, the poll that reports; none, where they lose each other in it."""
        save.asked.set()
        number = torch.tensor(save.polls + 1)
        try:
            if self.group is not None:
                dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        except RuntimeError:
            save.lost, number = True, torch.tensor(sys.maxsize)
        save.report_at.set_result(int(number))

    def _commit(self, partial: Path, state: str, shards: list[FileRecord]) -> None:
        """On the main process, when the shards of all are on disk."""
        records = [*shards, write_file(partial / STATE, [state.encode()])]
        write_file(partial / CHECKSUMS, [json.dumps([asdict(record) for record in records], indent=1).encode()])
        sync_folder(partial)
        final = partial.with_name(partial.name.removesuffix(PARTIAL))
        if final.is_dir():
            self._remove(final)
        partial.rename(final)
        sync_folder(self.folder)
        try:
            old = _committed(self.folder)[: -self.keep]
        except UserError as error:
            warn(f"old checkpoints are not removed: {error}")
            return
        for path in old:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a final name.
        doomed = path.with_name(f"{path.name}.old{PARTIAL}")
        try:
            path.rename(doomed)
        except OSError as error:
            self._say_refused(path, error)
        else:
            self._remove_folder(doomed)

    def _remove_folder(self, path: Path) -> None:
        """Remove as much of a folder as the file system allows. What it refuses costs room, which is no reason to end a run."""
        try:
            shutil.rmtree(path)
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            self._say_refused(path, error)

    def _say_refused(self, path: Path, error: OSError) -> None:
        """Once: every save comes to the same old checkpoints again."""
        if path not in self._refused:
            self._refused.add(path)
            where = f" ({error.filename})" if error.filename else ""
            warn(f"{path} cannot be removed: {error.strerror or error}{where}; the run goes on; remove it by hand, if it stays")


def holds_checkpoints(folder: Path) -> bool:
    """Whether a run has saved there: a checkpoint, be it damaged, but not one whose writing was cut short. Raises UserError when the
    folder cannot be read."""
    return any(not path.name.endswith(PARTIAL) for path in _step_folders(folder))


def latest_checkpoint(folder: Path, *, set_aside: bool = True) -> Checkpoint:
    """The newest whole checkpoint of a folder, every file of it verified; for one process of a run.

    Newer ones that are damaged are passed over, and stderr says what is wrong with them. set_aside: rename them too, which is for the
    run that has the folder's lock: under a reader's hands another may be at work on them. Raises UserError when no whole one is left,
    and when a file cannot be read.
    """
    passed: list[Path] = []
    while left := [path for path in _committed(folder) if path not in passed]:
        path = left[-1]
        checkpoint, damage = _examine(path)
        if checkpoint is not None:
            if passed:
                warn(f"step {checkpoint.step} is used instead: {path}")
            return checkpoint
        if path in _committed(folder):  # a run that is under way may have removed it meanwhile
            passed.append(path)
            done = "it is passed over, and left as it is"
            if set_aside:
                done = _set_aside(path, DAMAGED, "it is passed over where it is")
            warn(f"checkpoint {path} is damaged: {damage}; {done}")
    damaged = sorted(path.name for path in _step_folders(folder) if DAMAGED in path.name or path in passed)
    raise UserError(f"{folder} holds no {'whole ' if damaged else ''}checkpoint" + (f", only {', '.join(damaged)}" if damaged else ""))


def checkpoint_of_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step, verified. Raises UserError when there is none, when it is damaged, and when it cannot be read."""
    found = {_step(path): path for path in _committed(folder)}
    if step not in found:
        raise UserError(f"{folder} holds no checkpoint of step {step}; the steps are {', '.join(map(str, found)) or 'none'}")
    checkpoint, damage = _examine(found[step])
    if checkpoint is None:
        raise UserError(f"checkpoint {found[step]} is damaged: {damage}; choose another step")
    return checkpoint


def checkpoint_before(folder: Path, step: int) -> Checkpoint | None:
    """The newest whole checkpoint of that step or earlier, None where there is none; stderr names damaged ones that it passes over.
    Raises UserError when a file cannot be read."""
    for path in reversed([path for path in _committed(folder) if _step(path) <= step]):
        checkpoint, damage = _examine(path)
        if checkpoint is not None:
            return checkpoint
        warn(f"checkpoint {path} is damaged: {damage}; the one before it is looked at")
    return None


def distrust_from(folder: Path, step: int) -> str:
    """Set aside the checkpoints of that step and later ones, from which a run has diverged; returns what was done and what is left,
    for people. For one process of a run."""
    done = [f"{path} is {_set_aside(path, DIVERGED, 'left where it is')}" for path in _committed(folder) if _step(path) >= step]
    left = _committed(folder)  # one that cannot be renamed among them
    return "; ".join([*done, f"--resume goes on from {left[-1].name}" if left else "no checkpoint from before is left: begin anew"])


def check_architecture(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise UserError, naming every difference, when the checkpoint is of another architecture. Another YaRN makes none: it changes no
    weight."""
    saved, wanted = flat(checkpoint.state["model"], "model."), flat(config.model_dump(), "model.")
    # Version 0.3 knew no tiles: its images were one each.
    wanted = {key: value for key, value in wanted.items() if key in saved or not key.startswith("model.tiling.")}
    wanted = {key: value for key, value in wanted.items() if not key.startswith("model.language.yarn")}
    different = [f"{k}: {saved.get(k)} in the checkpoint, {wanted.get(k)} here" for k in wanted if saved.get(k) != wanted[k]]
    if different:
        raise UserError(f"checkpoint {checkpoint.path} is of another architecture:\n  " + "\n  ".join(different))


def check_optimizer(checkpoint: Checkpoint, kind: str) -> None:
    """Raise UserError when the state of that kind of optimiser has other tensors than the checkpoint; all AdamWs have the same, on any
    device and in any dtype. Checkpoints before version 0.3 do not say what wrote them."""
    saved = checkpoint.state.get("optimizer", kind)
    if (saved == "muon") != (kind == "muon"):
        raise UserError(
            f"checkpoint {checkpoint.path} is of another optimiser:\n  optimizer.kind: {saved} in the checkpoint, {kind} here; "
            f"go on with --optimizer.kind {saved}, or begin a new run"
        )


def load_tensors(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors in place from the checkpoint, whatever layout wrote it. Raises UserError when one is missing or broken."""
    try:
        reader = dcp.HuggingFaceStorageReader(str(checkpoint.path))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # DCP's own is no Exception, and holds those of all ranks
        raise UserError(f"checkpoint {checkpoint.path} cannot be loaded: {_root_cause(error)[1]}") from error


def _examine(path: Path) -> tuple[Checkpoint | None, str]:
    """A checkpoint if it is whole, else what is wrong with it. Raises UserError when a file of it cannot be read: the next time it may
    be, and be whole, so that this is no damage. A file that is gone is."""
    try:
        if damage := _damage(path):
            return None, damage
        state = json.loads(_text(path / STATE))
        checkpoint = Checkpoint(path, state["step"], state)
        has_checksums = (path / CHECKSUMS).exists()
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        return None, f"{STATE} cannot be read ({type(error).__name__}: {error})"
    except OSError as error:
        raise _unreadable(path, error) from error
    if has_checksums:
        return checkpoint, ""
    if "format" in state:
        return None, f"{CHECKSUMS} is missing"
    warn(f"checkpoint {path} has no checksums, as those of version 0.2.1: only the form of its files was checked")
    return checkpoint, ""


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint: the first fault that is found."""
    try:
        names = {file.name for file in path.iterdir()}
        if CHECKSUMS not in names:
            return _damaged_form(path, names)
        records = [FileRecord(**record) for record in json.loads(_text(path / CHECKSUMS))]
    except (FileNotFoundError, ValueError, TypeError) as error:
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
        raise _unreadable(path, error) from error


def _damaged_form(path: Path, names: set[str]) -> str | None:
    """What can be seen without checksums: a shard that is cut off, or none at all."""
    shards = sorted(name for name in names if name.endswith(SUFFIX))
    for name in shards:
        try:
            # Opened twice, for safetensors calls whatever it cannot open a file that is not there.
            with (path / name).open("rb"), safe_open(path / name, framework="pt"):
                pass
        except (SafetensorError, FileNotFoundError) as error:
            return f"{name} cannot be read ({error})"
    return None if shards else f"it holds no {SUFFIX} file"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    """What is said of a file or folder that the disk does not give."""
    return UserError(
        f"{error.filename or path} cannot be read: {error.strerror or error}; check the disk, then start again. It is left as it was, "
        "for it may be whole; where it is lost for good, move its checkpoint away, and the one before it is used"
    )


def _set_aside(path: Path, suffix: str, otherwise: str) -> str:
    """Rename a checkpoint so that nothing goes on from it; returns what was done, for people. otherwise: done where it cannot be."""
    names = [path.name + suffix, *(f"{path.name}{suffix}-{number}" for number in range(2, 1000))]
    try:
        target = next(target for target in map(path.with_name, names) if not target.exists())
        path.rename(target)
    except OSError as error:
        return f"{otherwise}, for it cannot be renamed ({error})"
    return f"set aside as {target.name}"


def _committed(folder: Path) -> list[Path]:
    """The checkpoints of a folder by step, neither partial nor set aside."""
    return sorted((path for path in _step_folders(folder) if path.name[5:].isdigit()), key=_step)


def _step_folders(folder: Path) -> list[Path]:
    """Checkpoints, whatever has become of them. None where ``folder`` is not there; raises UserError where it cannot be read, which
    ``Path.glob`` would take for an empty one."""
    try:
        with os.scandir(folder) as entries:
            return [folder / entry.name for entry in entries if entry.name.startswith("step-") and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error


def _step(path: Path) -> int:
    return int(path.name[5:])


def _root_cause(error: BaseException, rank: int = 0) -> tuple[int, str]:
    """What went wrong and where: on this process, ``rank``, or, as DCP raises one exception for all ranks, in one of theirs inside."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, error = next(iter(failures.items()))
        error = error[0] if isinstance(error, tuple) else error
    return rank, f"{type(error).__name__}: {error}"


def _new_group(world: World) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=world.timeout)
