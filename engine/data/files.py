"""Files of data sources, on a disk or behind a URL of fsspec (s3://, gs://, hf://, ...): whole, in part, and by folder."""

from __future__ import annotations

import errno
import glob
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from ..errors import BadRecord, UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WEB = ("http", "https")


@dataclass(frozen=True)
class Stamp:
    """By which a file is known to be the one that it was. size: bytes; version: time of the last change in ns, or what fsspec has."""

    size: int
    version: str


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def folder_of(path: str) -> str:
    return path.rpartition("/")[0] if is_url(path) else os.path.dirname(path)


def follow(folder: str, path: str) -> str:
    """Where a path leads that stands in a file of ``folder``.

    Raises ValueError for one that leaves the place of the source: data must not make a trainer fetch what it likes.
    """
    if not is_url(folder):
        if path.startswith("file://"):
            return path.removeprefix("file://")
        if is_url(path):
            raise ValueError("it is a URL, and its source is none")
        return os.path.join(folder, path)
    if "::" in path:
        raise ValueError("it is a chain of URLs")
    if is_url(path):
        found = path
    elif path.startswith("/"):
        raise ValueError("it is a path of this machine, and its source is a URL")
    else:
        scheme, _, place = folder.partition("://")
        found = f"{scheme}://{posixpath.normpath(f'{place}/{path}')}"
    ours, theirs = urlsplit(folder), urlsplit(found)
    if ours.scheme != theirs.scheme or (ours.scheme in _WEB and ours.netloc != theirs.netloc):
        raise ValueError(f"it is not of {ours.scheme}://{ours.netloc if ours.scheme in _WEB else ''}, where its source is")
    return found


def open_file(path: str) -> BinaryIO:
    """The file, to be read from its start. Raises OSError, and ValueError for a path that cannot be one."""
    if not is_url(path):
        return _regular_file(path).open("rb")
    system, inner = _file_system(path)
    with os_errors(path):
        return system.open(inner, "rb")


def read_file(path: str) -> bytes:
    """All of the file. Raises as :func:`open_file` does."""
    if is_url(path):
        system, inner = _file_system(path)
        with os_errors(path):
            return system.cat_file(inner)
    with open_file(path) as file:
        return file.read()


def read_part(path: str, start: int, length: int, expected: Stamp | None = None) -> bytes:
    """``length`` bytes from byte ``start``. Raises OSError; UserError where a local file is no longer the ``expected`` one."""
    if length == 0:
        return b""
    if is_url(path):
        system, inner = _file_system(path)
        with os_errors(path):
            data = system.cat_file(inner, start=start, end=start + length)
    else:
        with open_file(path) as file:
            if expected is not None:
                _compare(path, _local_stamp(os.fstat(file.fileno())), expected)
            file.seek(start)
            data = file.read(length)
    if len(data) != length:
        raise OSError(errno.ENODATA, f"{len(data)} bytes at {start} where {length} should be", path)
    return data


def stamp(path: str) -> Stamp:
    """Raises OSError for what is missing, or not a file."""
    if not is_url(path):
        return _local_stamp(_regular_file(path).stat())
    system, inner = _file_system(path)
    with os_errors(path):
        found = system.info(inner)
        if found["type"] != "file" or found.get("size") is None:
            raise OSError(errno.EINVAL, "it is not a file of known length", path)
        return Stamp(int(found["size"]), str(system.ukey(inner)))


def check(path: str, expected: Stamp) -> None:
    """Raises UserError where the file is no longer the expected one, OSError where it is not there."""
    _compare(path, stamp(path), expected)


def is_folder(path: str) -> bool:
    if not is_url(path):
        return os.path.isdir(path)
    system, inner = _file_system(path)
    if urlsplit(path).scheme in _WEB:  # the web has no folders; to ask would fetch the whole file
        return False
    with os_errors(path):
        return bool(system.isdir(inner))


def exists(path: str) -> bool:
    if not is_url(path):
        return os.path.exists(path)
    system, inner = _file_system(path)
    with os_errors(path):
        return bool(system.exists(inner))


def files_in(folder: str) -> list[str]:
    """What lies in a folder and is none, by name; names that begin with a dot are left out."""
    if is_url(folder):
        system, inner = _file_system(folder)
        with os_errors(folder):
            names = [posixpath.basename(found["name"]) for found in system.ls(inner, detail=True) if found["type"] == "file"]
    else:
        names = [name for name in os.listdir(folder) if not os.path.isdir(os.path.join(folder, name))]
    return [f"{folder.rstrip('/')}/{name}" for name in sorted(names) if not name.startswith(".")]


def files_like(pattern: str) -> list[str]:
    """The files that a pattern with ``*``, ``?`` or ``[...]`` names, in order."""
    if not is_url(pattern):
        return sorted(path for path in glob.glob(pattern) if os.path.isfile(path))
    system, inner = _file_system(pattern)
    with os_errors(pattern):
        return sorted(system.unstrip_protocol(path) for path in system.glob(inner))


@contextmanager
def os_errors(path: str) -> Iterator[None]:
    """What the libraries behind a URL raise as OSError, with EIO where it may pass; what is wrong with content stays as it is."""
    if not is_url(path):
        yield
        return
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
        raise
    except (UserError, BadRecord, ValueError, TypeError, NotImplementedError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", path) from error


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be opened by fsspec: {error}") from error


def _regular_file(path: str) -> Path:
    """The path, where it is a file: a folder has no bytes, and a pipe would be waited for without end."""
    found = Path(path)
    if found.exists() and not found.is_file():
        raise OSError(errno.EINVAL, "it is not a file", path)
    return found


def _local_stamp(found: os.stat_result) -> Stamp:
    return Stamp(found.st_size, str(found.st_mtime_ns))


def _compare(path: str, found: Stamp, expected: Stamp) -> None:
    if found != expected:
        raise UserError(
            f"{path} has changed since this run opened it ({expected.size} bytes then, {found.size} now): other records stand where "
            "its own stood. Bring the file back, or let the run go on with the new one by --resume"
        )
