"""From an endless stream of measured documents to steps of full packs: nothing lost, and a state of a few numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from smalt.model.cost import Cost, Workload

from ..errors import BadRecord
from .balance import choose_packs
from .reading import Measured, SkippedSample

# So many samples in a row without a usable one end the run: the data is wrong, not a record.
BAD_IN_A_ROW = 256
# Steps' worth of tokens that wait, to choose from.
POOL = 4


@dataclass
class PackerState:
    """Where the packer stands. cursor: next sample to read; carried: (sample, low, high, length) of what was read but not yet packed,
    rows low to high of a document of that length.
    log: of the changes of weights from the first of these samples on (SampleStream)."""

    cursor: int = 0
    carried: list[tuple[int, int, int, int]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def oldest(self) -> int:
        """The first sample that is asked for again."""
        return min([self.cursor, *(entry[0] for entry in self.carried)])


@dataclass(frozen=True)
class Piece:
    """Rows low to high of a document, all of it or as much as fits in a pack. sample: its index in the stream; cost: of work."""

    sample: int
    low: int
    high: int
    document: Measured
    work: Workload
    cost: float

    def __len__(self) -> int:
        return self.high - self.low


@dataclass(frozen=True)
class StepPlan:
    """The packs of one step, in global order; what was skipped while they were chosen; the state after them."""

    packs: list[list[Piece]]
    skipped: list[SkippedSample]
    state: PackerState


class Packer:
    """Makes steps of ``num_packs`` packs of ``length`` tokens; every process that asks gets the same ones.

    It reads the stream ``window`` samples at a time, by ``measure``, and keeps what is not chosen for later steps. ``measure`` gives
    fewer where the stream ends.
    """

    def __init__(
        self,
        measure: Callable[[Sequence[int]], list[Measured | SkippedSample]],
        length: int,
        num_packs: int,
        window: int,
        long_documents: Literal["skip", "split"],
        cost: Cost,
        image_attention: Literal["bidirectional", "causal"],
        state: PackerState | None = None,
    ):
        self.measure, self.length, self.num_packs, self.window = measure, length, num_packs, window
        self.long_documents, self.cost, self.image_attention = long_documents, cost, image_attention
        self.cursor = state.cursor if state else 0
        # Oldest first, by (sample, first row).
        self.waiting: dict[tuple[int, int], Piece] = {}
        self.tokens, self.ended = 0, False
        # Since the step before.
        self.skipped: list[SkippedSample] = []
        # What is carried over is measured again, in its order; what can no longer be read is reported by the first step.
        groups = [
            (sample, list(entries)) for sample, entries in itertools.groupby(state.carried if state else [], lambda entry: entry[0])
        ]
        for (sample, entries), found in zip(groups, self._measured([sample for sample, _ in groups]), strict=True):
            if found is not None:
                self._wait(sample, found, [rows for _, low, high, length in entries for rows in self._left(found, low, high, length)])

    def next(self) -> StepPlan | None:
        """None where the stream has ended, and what is left of it is fewer documents than packs."""
        bad_in_a_row = 0
        while self.tokens < POOL * self.num_packs * self.length and not self.ended:
            before = self.tokens
            window = range(self.cursor, self.cursor + self.window)
            measured = self._measured(window)
            for sample, found in zip(window, measured, strict=False):
                if found is not None:
                    self._wait(sample, found, self._cut(found, 0, found.length))
            self.cursor += len(measured)
            self.ended = len(measured) < self.window
            bad_in_a_row = bad_in_a_row + len(measured) if self.tokens == before else 0
            if bad_in_a_row >= BAD_IN_A_ROW:
                self._all_bad(self.skipped[-bad_in_a_row:])
        if len(self.waiting) < self.num_packs:
            return None
        pieces = list(self.waiting.values())
        lengths, costs = np.array([len(piece) for piece in pieces]), np.array([piece.cost for piece in pieces])
        packs = [[pieces[i] for i in pack] for pack in choose_packs(lengths, costs, self.num_packs, self.length)]
        for piece in (piece for pack in packs for piece in pack):
            del self.waiting[piece.sample, piece.low]
            self.tokens -= len(piece)
        carried = [(p.sample, p.low, p.high, p.document.length) for p in self.waiting.values()]
        skipped, self.skipped = self.skipped, []
        return StepPlan(packs, skipped, PackerState(self.cursor, carried))

    def _measured(self, samples: Sequence[int]) -> list[Measured | None]:
        """Samples of the stream; None where one was skipped for what it is."""
        found = self.measure(samples)
        self.skipped += [one for one in found if isinstance(one, SkippedSample)]
        return [one if isinstance(one, Measured) else None for one in found]

    def _left(self, document: Measured, low: int, high: int, length: int) -> list[tuple[int, int]]:
        """Rows low to high of a document that had that length when it was cut."""
        if length == document.length:
            return self._cut(document, low, high)
        if high - low == length:  # a whole one, which another share of thoughts shows otherwise
            return self._cut(document, 0, document.length)
        detail = f"rows {low} to {high} of {length} were not trained on yet; the document now has {document.length}"
        return self._skip(document, "changed since the checkpoint", detail)

    def _cut(self, document: Measured, low: int, high: int) -> list[tuple[int, int]]:
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

    def _skip(self, document: Measured, cause: str, detail: str) -> list[tuple[int, int]]:
        self.skipped.append(SkippedSample(document.source, document.record, cause, detail))
        return []

    def _wait(self, sample: int, document: Measured, rows: list[tuple[int, int]]) -> None:
        for low, high in rows:
            work = self._work(document, low, high)
            self.waiting[sample, low] = Piece(sample, low, high, document, work, self.cost(work))
            self.tokens += high - low

    def _work(self, document: Measured, low: int, high: int) -> Workload:
        images = [i for i, (first, end) in enumerate(document.spans) if low <= first and end <= high]
        pairs = (high - low) * (high - low + 1) / 2
        if self.image_attention == "bidirectional":
            pairs += sum((end - first) * (end - first - 1) / 2 for first, end in (document.spans[i] for i in images))
        return Workload(high - low, pairs, sum(document.tiles[i] for i in images))

    def _all_bad(self, skipped: list[SkippedSample]) -> None:
        causes = ", ".join(f"{n} x {cause}" for cause, n in Counter(s.cause for s in skipped).most_common())
        raise BadRecord("no usable record", f"{len(skipped)} records in a row were skipped ({causes}); the first: {skipped[0].detail}")


def cut_rows(document: Measured, length: int, low: int, high: int) -> list[tuple[int, int]]:
    """Cut rows low to high of a document into pieces of at most ``length`` tokens, never inside an image: the rows of each.

    A piece begins with the last token of the one before it, as context only, so every target stays one; or with an image, whose rows
    are no targets. Only where an image fills a pack alone does a piece begin right after it: a caption loses its first target then.
    Raises BadRecord if an image alone is longer than a pack.
    """
    pieces: list[tuple[int, int]] = []
    while True:
        end = min(low + length, high)
        for first, last in document.spans:
            if first < end <= last and end < high and not (low == first and end == last):
                end = first
        if end == low:
            raise BadRecord("longer than a pack", f"an image of the document does not fit in a pack of {length} tokens")
        pieces.append((low, end))
        if end == high:
            return pieces
        low = end if any(first <= end <= last for first, last in document.spans) else end - 1
