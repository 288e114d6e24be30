"""Random access to the records of a source that is made of pieces: row groups, files of lines, tars."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import pyarrow as pa

from ...errors import BadRecord
from .. import files
from ..records import Record
from ..retry import with_retries

# Pieces of a source that stay loaded, whatever their size: shuffled reads over more load them again and again.
LOADED_PIECES = 64


class Loaded(Protocol):
    """A piece that can be read. nbytes: of memory that is its own."""

    @property
    def nbytes(self) -> int: ...

    def record(self, number: int) -> Record:
        """Record ``number`` of the piece. Raises BadRecord, OSError, and UserError when the file has changed."""
        ...


class Piece(Protocol):
    """What is known of a piece without loading it; it is pickled."""

    @property
    def num_records(self) -> int: ...

    def load(self) -> Loaded:
        """Raises OSError, and UserError when the file has changed."""
        ...


@dataclass(frozen=True)
class WholeFile:
    """A piece that is a file with an index. open: makes what reads it, of path, stamp and columns; pickled by its name."""

    path: str
    stamp: files.Stamp
    columns: Mapping[str, str]
    open: Callable[[str, files.Stamp, Mapping[str, str]], Loaded]
    num_records: int

    def load(self) -> Loaded:
        files.check(self.path, self.stamp)
        return self.open(self.path, self.stamp, self.columns)


class PieceRecords:
    """The records of all pieces, in their order. cached_bytes: of memory that loaded pieces may take, but for the last one.

    A pickled copy has nothing loaded: each process opens the files for itself.
    """

    def __init__(self, name: str, path: str, pieces: Sequence[Piece], cached_bytes: int):
        self.name, self.path, self.cached_bytes = name, path, cached_bytes
        self._pieces = [piece for piece in pieces if piece.num_records]
        self._ends = list(accumulate(piece.num_records for piece in self._pieces))
        self._loaded: OrderedDict[int, Loaded] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        piece = bisect.bisect_right(self._ends, index)
        number = index - (self._ends[piece] - self._pieces[piece].num_records)
        try:
            record = with_retries(lambda: self._load(piece).record(number))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise BadRecord("unreadable record", f"{self.path}: {error}") from error
        return replace(record, source=self.name, number=index)

    def _load(self, piece: int) -> Loaded:
        if piece not in self._loaded:
            self._loaded[piece] = self._pieces[piece].load()
            while len(self._loaded) > LOADED_PIECES or (len(self._loaded) > 1 and self._bytes() > self.cached_bytes):
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(piece)
        return self._loaded[piece]

    def _bytes(self) -> int:
        return sum(loaded.nbytes for loaded in self._loaded.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": OrderedDict()}
