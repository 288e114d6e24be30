"""From an endless stream of documents to steps of full packs: best fit over a window, nothing lost, state of a few numbers."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from smalt.model import Document

from ..errors import BadRecord
from .agreement import Entry
from .stream import SkippedSample

# So many samples in a row without a usable one end the run: the data is wrong, not a record.
BAD_IN_A_ROW = 256


@dataclass
class PackerState:
    """Where the packer stands. cursor: next sample to read; carried: (sample, low, high, length) of what was read but not yet packed,
    rows low to high of a document of that length. Version 0.2 had (sample, piece), counted by the sequence_length of its run."""

    cursor: int = 0
    carried: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class StepPlan:
    """The packs of one step, in global order; what was read and what was skipped while they were made; the state after them.

    keys: of each document, in the order of the packs, the index of its sample in the stream and its first row of that sample.
    """

    packs: list[list[Document]]
    keys: list[tuple[int, int]]
    read: list[Entry]
    skipped: list[SkippedSample]
    state: PackerState


class Packer:
    """Makes steps of ``num_packs`` packs of ``length`` tokens; every process that asks gets the same ones.

    It reads the stream ``window`` samples at a time and keeps what did not fit for later steps. The oldest document that waits opens
    the next pack, so none waits forever; then the longest that still fits is added until nothing fits.
    """

    def __init__(
        self,
        read: Callable[[int], Document | SkippedSample],
        length: int,
        num_packs: int,
        window: int,
        long_documents: Literal["skip", "split"],
        state: PackerState | None = None,
    ):
        self.read, self.length, self.num_packs, self.window = read, length, num_packs, window
        self.long_documents = long_documents
        self.cursor = state.cursor if state else 0
        # By (sample, first row), with the length of the document of which it is a piece, or which it is.
        self.waiting: dict[tuple[int, int], tuple[Document, int]] = {}
        # Documents that wait, as (tokens, key), sorted: the longest that fits is one bisection away.
        self.by_length: list[tuple[int, tuple[int, int]]] = []
        self.tokens = 0
        # Since the step before: every sample that was read, and those of them that were skipped.
        self.seen: list[Entry] = []
        self.skipped: list[SkippedSample] = []
        # Documents carried over are read again, in their order; what can no longer be read is reported by the first step.
        carried = [tuple(map(int, entry)) for entry in state.carried] if state else []
        for sample, entries in itertools.groupby(carried, key=lambda entry: entry[0]):
            self._take_up(sample, [entry[1:] for entry in entries])

    def next(self) -> StepPlan:
        bad_in_a_row = 0
        # Twice a step's tokens to choose from: enough small documents are then left to fill the gaps of the large.
        while self.tokens < 2 * self.num_packs * self.length:
            before = self.tokens
            for sample in range(self.cursor, self.cursor + self.window):
                document = self._read(sample)
                if document is not None:
                    self._wait(sample, document, self._cut(document, 0, len(document)))
            self.cursor += self.window
            bad_in_a_row = bad_in_a_row + self.window if self.tokens == before else 0
            if bad_in_a_row >= BAD_IN_A_ROW:
                self._all_bad(self.skipped[-bad_in_a_row:])
        keys: list[tuple[int, int]] = []
        packs = [self._fill(keys) for _ in range(self.num_packs)]
        carried: list[tuple[int, ...]] = [
            (sample, low, low + len(piece), length) for (sample, low), (piece, length) in self.waiting.items()
        ]
        read, skipped, self.seen, self.skipped = self.seen, self.skipped, [], []
        return StepPlan(packs, keys, read, skipped, PackerState(self.cursor, carried))

    def _fill(self, keys: list[tuple[int, int]]) -> list[Document]:
        key = next(iter(self.waiting))
        documents, free = [], self.length
        while True:
            document, _ = self.waiting.pop(key)
            self.by_length.pop(bisect.bisect_left(self.by_length, (len(document), key)))
            self.tokens -= len(document)
            documents.append(document)
            keys.append(key)
            free -= len(document)
            at = bisect.bisect_right(self.by_length, free, key=lambda entry: entry[0])
            if at == 0:
                return documents
            key = self.by_length[at - 1][1]

    def _read(self, sample: int) -> Document | None:
        """A sample of the stream, None where it was skipped for what it is."""
        found = self.read(sample)
        self.seen.append(Entry.of(found))
        if isinstance(found, Document):
            return found
        self.skipped.append(found)
        return None

    def _take_up(self, sample: int, carried: list[tuple[int, ...]]) -> None:
        """Let wait again what was carried of a sample: (low, high, length) of each, or of version 0.2 the number of a piece."""
        document = self._read(sample)
        if document is None:
            return
        if len(carried[0]) == 1:
            pieces = self._cut(document, 0, len(document))
            rows = [pieces[number] for (number,) in carried if number < len(pieces)]
        else:
            rows = [piece for low, high, length in carried for piece in self._left(document, low, high, length)]
        self._wait(sample, document, rows)

    def _left(self, document: Document, low: int, high: int, length: int) -> list[tuple[int, int]]:
        """Rows low to high of a document that had that length when it was cut."""
        if length == len(document):
            return self._cut(document, low, high)
        if high - low == length:  # a whole one, which another share of thoughts shows otherwise
            return self._cut(document, 0, len(document))
        detail = f"rows {low} to {high} of {length} were not trained on yet; the document now has {len(document)}"
        return self._skip(document, "changed since the checkpoint", detail)

    def _cut(self, document: Document, low: int, high: int) -> list[tuple[int, int]]:
        """Rows low to high of a document in pieces that fit in a pack; none where it is skipped for that."""
        if high - low <= self.length:
            return [(low, high)]
        if self.long_documents == "skip":
            detail = f"{high - low} tokens do not fit in a pack of {self.length}; raise sequence_length or set data.long_documents"
            return self._skip(document, "longer than a pack", detail)
        try:
            return cut_rows(document, self.length, low, high)
        except BadRecord as error:
            return self._skip(document, error.cause, error.detail)

    def _skip(self, document: Document, cause: str, detail: str) -> list[tuple[int, int]]:
        self.skipped.append(SkippedSample(document.source, document.record, cause, detail))
        return []

    def _wait(self, sample: int, document: Document, rows: list[tuple[int, int]]) -> None:
        for low, high in rows:
            whole = high - low == len(document)
            piece, key = document if whole else piece_of(document, low, high), (sample, low)
            self.waiting[key] = piece, len(document)
            bisect.insort(self.by_length, (len(piece), key))
            self.tokens += len(piece)

    def _all_bad(self, skipped: list[SkippedSample]) -> None:
        causes = ", ".join(f"{n} x {cause}" for cause, n in Counter(s.cause for s in skipped).most_common())
        raise BadRecord("no usable record", f"{len(skipped)} records in a row were skipped ({causes}); the first: {skipped[0].detail}")


def cut_rows(document: Document, length: int, low: int, high: int) -> list[tuple[int, int]]:
    """Cut rows low to high of a document into pieces of at most ``length`` tokens, never inside an image: the rows of each.

    A piece begins with the last token of the one before it, as context only, so every target stays one; next to an image, where the
    template has no target, it does not.
    Raises BadRecord if an image alone is longer than a pack.
    """
    pieces: list[tuple[int, int]] = []
    while True:
        end = min(low + length, high)
        for first, last in document.spans:
            if first < end < last:
                end = int(first)
        if end == low:
            raise BadRecord("longer than a pack", f"an image of the document does not fit in a pack of {length} tokens")
        pieces.append((low, end))
        if end == high:
            return pieces
        low = end if any(first <= end <= last for first, last in document.spans) else end - 1


def piece_of(document: Document, low: int, high: int) -> Document:
    """Rows low to high as a document of its own, whose first token is context only."""
    per_tile = len(document.image_index) // max(1, len(document.tiles))
    inside = (document.image_index >= low) & (document.image_index < high)
    targets = document.targets[low:high].copy()
    targets[0] = False
    return replace(
        document,
        tokens=document.tokens[low:high],
        targets=targets,
        image_index=document.image_index[inside] - low,
        tiles=document.tiles[np.unique(np.flatnonzero(inside) // per_tile)] if inside.any() else document.tiles[:0],
        spans=document.spans[(document.spans[:, 0] >= low) & (document.spans[:, 1] <= high)] - low,
    )
