"""Records on disk: Parquet files of chat messages with images, read one record at a time.

Columns: ``messages``, a list of {role, content}; ``images``, a list of {bytes, path} or of bytes or of paths, optional, one for each
``<image>`` in the contents; any other column is ignored. It is the form that Hugging Face ``datasets`` writes.
"""

from __future__ import annotations

import bisect
import errno
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import BadRecord, UserError
from .retry import with_retries

# Decoded row groups of a source that stay in memory, in number and in bytes: shuffled reads over more decode them again and again.
CACHED_ROW_GROUPS, CACHED_BYTES = 64, 2**30


@dataclass(frozen=True)
class Image:
    """An image as it stands in a record: its bytes, or the path of a file."""

    data: bytes | None
    path: str | None

    def __str__(self) -> str:
        return self.path or f"{len(self.data or b'')} bytes"


@dataclass(frozen=True)
class Record:
    """One conversation. messages: (role, content) pairs; source, number: where it stands."""

    messages: tuple[tuple[str, str], ...]
    images: tuple[Image, ...]
    source: str = ""
    number: int = -1


class ParquetRecords:
    """Random access to the records of one Parquet file, or of all ``*.parquet`` files of a folder in the order of their names."""

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not path.exists() or not files:
            what = "holds no *.parquet file" if path.exists() else "does not exist"
            raise UserError(f"data source {name!r}: {path} {what}. `smalt data digits` makes the data of the default run.")
        self._groups: list[tuple[Path, pq.ParquetFile, int]] = []
        self._ends: list[int] = []
        for file in files:
            self._open(file)
        if not len(self):
            raise UserError(f"data source {name!r}: {path} holds no records")
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def _open(self, file: Path) -> None:
        try:
            parquet = pq.ParquetFile(file)  # not mapped: a page of it that cannot be read would end the process
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"data source {self.name!r}: {file} is not a readable Parquet file: {error}") from error
        if "messages" not in parquet.schema_arrow.names:
            columns = ", ".join(parquet.schema_arrow.names)
            raise UserError(f"data source {self.name!r}: {file} has no column 'messages'; its columns are {columns}")
        for group in range(parquet.num_row_groups):
            self._groups.append((file, parquet, group))
            self._ends.append(len(self) + parquet.metadata.row_group(group).num_rows)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        """Record ``index``. Raises BadRecord when it cannot be read or is not of the documented form."""
        group = bisect.bisect_right(self._ends, index)
        first = self._ends[group - 1] if group else 0
        try:
            row = self._table(group).slice(index - first, 1).to_pylist()[0]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadRecord("unreadable record", f"{self.path}: {error}") from error
        return Record(_messages(row["messages"]), _images(row.get("images"), self.path), self.name, index)

    def _table(self, group: int) -> pa.Table:
        if group not in self._cache:
            self._cache[group] = with_retries(lambda: self._read(group))
            while len(self._cache) > CACHED_ROW_GROUPS or (len(self._cache) > 1 and self._bytes() > CACHED_BYTES):
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]

    def _read(self, group: int) -> pa.Table:
        file, parquet, number = self._groups[group]
        try:
            return parquet.read_row_group(number, columns=[c for c in ("messages", "images") if c in parquet.schema_arrow.names])
        except OSError as error:
            if error.errno == errno.ESTALE:  # an open file that has gone stale stays so: the next try opens it anew
                self._groups[group] = file, pq.ParquetFile(file, metadata=parquet.metadata), number
            raise

    def _bytes(self) -> int:
        return sum(table.nbytes for table in self._cache.values())


def open_sources(paths: Mapping[str, Path]) -> dict[str, ParquetRecords]:
    """Every source by its name. Raises UserError for one that is missing or empty."""
    return {name: ParquetRecords(name, path) for name, path in paths.items()}


def _messages(raw: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(raw, list) or not raw:
        raise BadRecord("no messages", "the list of messages is empty or missing")
    pairs = []
    for message in raw:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise BadRecord("malformed message", f"{message!r:.200}; needed are a role (system, user, assistant) and a text content")
        pairs.append((role, content))
    return tuple(pairs)


def _images(raw: Any, source: Path) -> tuple[Image, ...]:
    if raw is not None and not isinstance(raw, list):
        raise BadRecord("malformed image", f"{raw!r:.200}; needed is a list of images")
    images = []
    for entry in raw or ():
        if isinstance(entry, dict):
            data, path = entry.get("bytes"), entry.get("path")
        else:
            data, path = (entry, None) if isinstance(entry, bytes) else (None, entry)
        if isinstance(data, bytes):
            images.append(Image(data, path))
        elif isinstance(path, str):
            # Relative paths are relative to the file that names them, not to where the run was started.
            images.append(Image(None, str((source if source.is_dir() else source.parent) / path)))
        else:
            raise BadRecord("malformed image", f"{entry!r:.200}; needed are bytes or a path")
    return tuple(images)
