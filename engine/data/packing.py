"""From an endless stream of documents to steps of full packs: best fit over a window, nothing lost, state of a few numbers."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from smalt.model import Document

from ..errors import BadRecord
from .stream import SkippedSample

# So many samples in a row without a usable one end the run: the data is wrong, not a record.
BAD_IN_A_ROW = 256


@dataclass
class PackerState:
    """Where the packer stands. cursor: next sample to read; carried: (sample, piece) of documents read but not yet packed."""

    cursor: int = 0
    carried: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class StepPlan:
    """The packs of one step, in global order; what was skipped while they were made; the state after them.

    positions: of each document, in the order of the packs, the index of its sample in the stream.
    """

    packs: list[list[Document]]
    positions: list[int]
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
        self.waiting: dict[tuple[int, int], Document] = {}
        # Documents that wait, as (tokens, key), sorted: the longest that fits is one bisection away.
        self.by_length: list[tuple[int, tuple[int, int]]] = []
        self.tokens = 0
        # Documents carried over are read again, in their order; what can no longer be read is reported by the first step.
        carried = [(int(s), int(p)) for s, p in state.carried] if state else []
        self.lost: list[SkippedSample] = []
        pieces = dict(entry for sample in dict.fromkeys(s for s, _ in carried) for entry in self._pieces(sample, self.lost))
        for key in carried:
            if key in pieces:
                self._wait(key, pieces[key])

    def next(self) -> StepPlan:
        skipped, self.lost = self.lost, []
        bad_in_a_row = 0
        # Twice a step's tokens to choose from: enough small documents are then left to fill the gaps of the large.
        while self.tokens < 2 * self.num_packs * self.length:
            before = self.tokens
            for sample in range(self.cursor, self.cursor + self.window):
                for key, document in self._pieces(sample, skipped):
                    self._wait(key, document)
            self.cursor += self.window
            bad_in_a_row = bad_in_a_row + self.window if self.tokens == before else 0
            if bad_in_a_row >= BAD_IN_A_ROW:
                self._all_bad(skipped[-bad_in_a_row:])
        positions: list[int] = []
        packs = [self._fill(positions) for _ in range(self.num_packs)]
        return StepPlan(packs, positions, skipped, PackerState(self.cursor, list(self.waiting)))

    def _fill(self, positions: list[int]) -> list[Document]:
        key = next(iter(self.waiting))
        documents, free = [], self.length
        while True:
            document = self.waiting.pop(key)
            self.by_length.pop(bisect.bisect_left(self.by_length, (len(document), key)))
            self.tokens -= len(document)
            documents.append(document)
            positions.append(key[0])
            free -= len(document)
            at = bisect.bisect_right(self.by_length, free, key=lambda entry: entry[0])
            if at == 0:
                return documents
            key = self.by_length[at - 1][1]

    def _wait(self, key: tuple[int, int], document: Document) -> None:
        self.waiting[key] = document
        bisect.insort(self.by_length, (len(document), key))
        self.tokens += len(document)

    def _pieces(self, sample: int, skipped: list[SkippedSample]) -> list[tuple[tuple[int, int], Document]]:
        document = self.read(sample)
        if isinstance(document, SkippedSample):
            skipped.append(document)
            return []
        if len(document) <= self.length:
            return [((sample, 0), document)]
        if self.long_documents == "split":
            try:
                return [((sample, i), piece) for i, piece in enumerate(split_document(document, self.length))]
            except BadRecord as error:
                skipped.append(SkippedSample(document.source, document.record, error.cause, error.detail))
                return []
        detail = f"{len(document)} tokens do not fit in a pack of {self.length}; raise sequence_length or set data.long_documents"
        skipped.append(SkippedSample(document.source, document.record, "longer than a pack", detail))
        return []

    def _all_bad(self, skipped: list[SkippedSample]) -> None:
        causes = ", ".join(f"{n} x {cause}" for cause, n in Counter(s.cause for s in skipped).most_common())
        raise BadRecord("no usable record", f"{len(skipped)} records in a row were skipped ({causes}); the first: {skipped[0].detail}")


def split_document(document: Document, length: int) -> list[Document]:
    """Cut a long document into pieces of at most ``length`` tokens, never inside an image.

    A piece begins with the last token of the one before it, as context only, so every target stays one; next to an image, where the
    template has no target, it does not.
    Raises BadRecord if an image alone is longer than a pack.
    """
    pieces, low = [], 0
    per_tile = len(document.image_index) // max(1, len(document.tiles))
    while True:
        high = min(low + length, len(document))
        for start, end in document.spans:
            if start < high < end:
                high = int(start)
        if high == low:
            raise BadRecord("longer than a pack", f"an image of the document does not fit in a pack of {length} tokens")
        inside = (document.image_index >= low) & (document.image_index < high)
        spans = document.spans[(document.spans[:, 0] >= low) & (document.spans[:, 1] <= high)] - low
        targets = document.targets[low:high].copy()
        targets[0] = False
        pieces.append(
            replace(
                document,
                tokens=document.tokens[low:high],
                targets=targets,
                image_index=document.image_index[inside] - low,
                tiles=document.tiles[np.unique(np.flatnonzero(inside) // per_tile)] if inside.any() else document.tiles[:0],
                spans=spans,
            )
        )
        if high == len(document):
            return pieces
        low = high if any(start <= high <= end for start, end in document.spans) else high - 1
