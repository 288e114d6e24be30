"""Indices of files that have none of their own: made by one scan, kept in a cache folder, and mapped into memory from there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from ...errors import UserError
from ..files import Stamp, is_url

# Of the layout of all indices; those of another one are made again.
_VERSION = 1
_CHECKSUM_BYTES = 4


def cache_folder() -> Path:
    """``SMALT_CACHE``, else ``smalt`` in ``XDG_CACHE_HOME``, which is ~/.cache when not set."""
    if given := os.environ.get("SMALT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smalt"


def cached_table(kind: str, path: str, stamp: Stamp, build: Callable[[], pa.Table]) -> pa.Table:
    """What ``build`` makes of the file at ``path``, made once for each stamp of it. Damaged ones are made again.

    Raises UserError where the cache folder cannot be written, and what ``build`` raises.
    """
    file = _file_for(kind, path, ".index")
    about = json.dumps([_VERSION, _absolute(path), stamp.size, stamp.version]).encode()
    if (table := _read(file, about)) is not None:
        return table
    with _alone(file):
        if (table := _read(file, about)) is None:  # another process may have made it meanwhile
            _write(file, build(), about)
            table = _read(file, about)
    if table is None:
        raise UserError(f"the index {file} cannot be read back; set SMALT_CACHE to a folder of a disk that works")
    return table


def cached_copy(kind: str, path: str, stamp: Stamp, blocks: Callable[[], Iterator[bytes]]) -> Path:
    """A file of the blocks that are made of the one at ``path``, once for each stamp; that of an earlier one is removed."""
    version = hashlib.blake2b(f"{stamp.size} {stamp.version}".encode(), digest_size=8).hexdigest()
    file = _file_for(kind, path, f".{version}")
    if not file.exists():
        with _alone(file):
            if not file.exists():
                _write_whole(file, blocks())
                for other in file.parent.glob(f"{file.stem}.*"):
                    if other != file:
                        other.unlink(missing_ok=True)
    return file


def _file_for(kind: str, path: str, ending: str) -> Path:
    return cache_folder() / f"{kind}-{hashlib.blake2b(_absolute(path).encode(), digest_size=16).hexdigest()}{ending}"


def _absolute(path: str) -> str:
    return path if is_url(path) else os.path.abspath(path)


def _read(file: Path, about: bytes) -> pa.Table | None:
    """The table of an index that is whole and of the file that ``about`` describes."""
    try:
        whole = pa.memory_map(str(file)).read_buffer()
        size = max(0, whole.size - _CHECKSUM_BYTES)
        content = whole.slice(0, size)
        if zlib.crc32(content).to_bytes(_CHECKSUM_BYTES) != whole.slice(size).to_pybytes():
            return None
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
    except (OSError, pa.ArrowException):
        return None
    return table if (table.schema.metadata or {}).get(b"about") == about else None


def _write(file: Path, table: pa.Table, about: bytes) -> None:
    sink = pa.BufferOutputStream()
    table = table.combine_chunks().replace_schema_metadata({"about": about})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    _write_whole(file, [content, zlib.crc32(content).to_bytes(_CHECKSUM_BYTES)])


def _write_whole(file: Path, blocks: Iterable[bytes | pa.Buffer]) -> None:
    """The file is there when all of it is."""
    partial = file.with_name(f"partial-{file.name}-{os.uname().nodename}-{os.getpid()}")
    with _cache_errors(file):
        out = partial.open("wb")
    try:
        for block in blocks:
            with _cache_errors(file):
                out.write(block)
        with _cache_errors(file):
            out.flush()
            os.fsync(out.fileno())
            out.close()
            partial.replace(file)
    except BaseException:
        with suppress(OSError):  # what could not be written cannot be written now
            out.close()
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Of the processes of one machine that want an index at once, one makes it and the others wait."""
    with _cache_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = (file.parent / f"{file.stem[-2:]}.lock").open("a")
    with lock:
        with suppress(OSError):  # a file system without locks: each makes its own, and the last one stays
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _cache_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache folder {file.parent} cannot be written: {error.strerror or error}; set SMALT_CACHE to another folder"
        ) from error
