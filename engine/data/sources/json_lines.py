"""Files of JSON lines: a piece is a file, read by an index of its lines. A compressed file, or a JSON array, is unpacked once."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ...errors import UserError
from .. import files
from ..forms import Place, find_form_of_object, read_object, read_record
from ..records import Record
from .indices import cached_copy, cached_table
from .pieces import WholeFile

ENDINGS = (".jsonl", ".json")
_CODECS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSED_ENDINGS = tuple(ending + codec for ending in ENDINGS for codec in _CODECS)
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Lines:
    """The lines of ``plain``, of ``path`` itself or its unpacked copy. index: int64 columns start and end, bytes of each line."""

    path: str
    plain: str
    stamp: files.Stamp
    columns: Mapping[str, str]
    index: pa.Table = field(repr=False)
    nbytes: int = 0

    def record(self, number: int) -> Record:
        start, end = (self.index[column][number].as_py() for column in ("start", "end"))
        row = read_object(files.read_part(self.plain, start, end - start, self.stamp), f"{self.path}, line at byte {start}")
        return read_record(row, find_form_of_object(row, self.columns), Place(files.folder_of(self.path)))


def open_json_lines(path: str, columns: Mapping[str, str]) -> list[WholeFile]:
    """columns: as :func:`..forms.find_form` has them. Raises UserError for a compressed file that is damaged or cut short."""
    stamp = files.stamp(path)
    return [WholeFile(path, stamp, columns, _load, len(_load(path, stamp, columns).index))]


def _load(path: str, stamp: files.Stamp, columns: Mapping[str, str]) -> Lines:
    plain = _plain(path, stamp)
    plain_stamp = stamp if plain == path else files.stamp(plain)
    return Lines(path, plain, plain_stamp, columns, cached_table("lines", plain, plain_stamp, lambda: _scan(plain)))


def _scan(path: str) -> pa.Table:
    """Where the lines of a file are that are not blank."""
    starts, ends, at = array("q"), array("q"), 0
    with files.os_errors(path), files.open_file(path) as file:
        for line in file:
            if not line.isspace():
                starts.append(at)
                ends.append(at + len(line))
            at += len(line)
    return pa.table({"start": np.asarray(starts), "end": np.asarray(ends)})


def _plain(path: str, stamp: files.Stamp) -> str:
    """The path of a file of lines with the records of this one: itself, or a copy."""
    codec = next((codec for ending, codec in _CODECS.items() if path.endswith(ending)), None)
    if codec is not None:
        path = str(cached_copy("unpacked", path, stamp, lambda: _unpacked(path, codec)))
        stamp = files.stamp(path)
    with files.os_errors(path), files.open_file(path) as file:
        is_array = file.read(_BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return str(cached_copy("array", path, stamp, lambda: _entries(path))) if is_array else path


def _unpacked(path: str, codec: str) -> Iterator[bytes]:
    with files.os_errors(path), files.open_file(path) as packed, pa.CompressedInputStream(packed, codec) as content:
        while True:
            try:
                block = content.read(_BLOCK_BYTES)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path} cannot be unpacked: {error}; it is damaged, or cut short") from error
            if not block:
                return
            yield block


def _entries(path: str) -> Iterator[bytes]:
    """The entries of a JSON array, one a line."""
    try:
        entries = json.loads(files.read_file(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} begins as a JSON array and is none: {error}") from error
    for entry in entries:
        yield json.dumps(entry).encode() + b"\n"
