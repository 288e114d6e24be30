"""Folders on a disk for what does not fit into memory: each belongs to one process, and none outlives it for long."""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory

PREFIX = "smalt-swap-"


def swap_folder(disk: Path) -> TemporaryDirectory[str]:
    """A new folder on the disk, removed with the object or when this process exits. What killed processes have left there goes first.

    A process locks its folder, and the kernel frees the lock however the process ends. Its id would not tell who is alive: containers
    that share a disk have ids of their own. Where the file system knows no locks, nothing is removed. Raises OSError.
    """
    # Held from the making of a folder until it is locked, so that no other process takes it for a leftover meanwhile.
    turn = _lock(disk, fcntl.LOCK_EX)
    try:
        if turn is not None:
            _remove_leftovers(disk)
        folder = TemporaryDirectory(prefix=PREFIX, dir=disk)
        lock = _lock(Path(folder.name), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:
            weakref.finalize(folder, os.close, lock)
        return folder
    finally:
        if turn is not None:
            os.close(turn)


def _remove_leftovers(disk: Path) -> None:
    for folder in disk.glob(f"{PREFIX}*"):
        lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path, kind: int) -> int | None:
    """The descriptor that holds the lock, None where it cannot be had. Not lockf: by that a process would meet no lock of its own."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, kind)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
