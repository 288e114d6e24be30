"""What is done with a record, in a worker process or where there is none: it is measured, and later built.

To measure takes its text and the headers of its images; steps are planned from that. To build decodes its pixels, on the ranks that
train on it. A record is read twice, so that no rank reads all of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from smalt.model import Document

from ..errors import BadRecord
from .chat import ChatEncoder, Draft, Mode
from .records import Records

# Of these the disk can be the cause, and another machine might read what this one cannot.
READING_CAUSES = ("unreadable record", "missing image")


@dataclass(frozen=True)
class Draw:
    """A record as one sample of the stream shows it. keep: share of its thought, None for all of it."""

    source: str
    record: int
    mode: Mode
    keep: float | None


@dataclass(frozen=True)
class SkippedSample:
    """A record that could not become a document: which, and why. detail: for people; it may differ from machine to machine."""

    source: str
    record: int
    cause: str
    detail: str = field(compare=False)

    def __str__(self) -> str:
        return f"skipped for {self.cause!r} ({self.detail})"


@dataclass(frozen=True)
class Measured:
    """What planning needs of a document. spans: first row and end of each image; tiles: of each image; checksum: of its tokens and of
    which of them are targets."""

    source: str
    record: int
    length: int
    spans: tuple[tuple[int, int], ...]
    tiles: tuple[int, ...]
    checksum: int

    def __str__(self) -> str:
        return f"read (tokens: {self.length}, tiles: {sum(self.tiles)}, checksum: {self.checksum:08x})"


@dataclass(frozen=True)
class Part:
    """Rows low to high of a document, to be built as one of its own. measured: what it was when the step was planned."""

    draw: Draw
    measured: Measured
    low: int
    high: int


class Unlike(Exception):
    """A record is not what it was when it was measured, by this rank or another."""

    def __init__(self, measured: Measured, found: Measured | SkippedSample):
        super().__init__(measured, found)
        self.measured, self.found = measured, found


@dataclass(frozen=True)
class Reader:
    """Sources by name, and what makes documents of their records. Goes to worker processes as a pickle."""

    sources: Mapping[str, Records]
    encoder: ChatEncoder

    def measure(self, draws: Sequence[Draw]) -> list[Measured | SkippedSample]:
        drafts = map(self._draft, draws)
        return [measure(draft) if isinstance(draft, Draft) else draft for draft in drafts]

    def build(self, parts: Sequence[Part]) -> list[Document | SkippedSample]:
        """Skipped is what turns out to be no image when its pixels are decoded. Raises Unlike for a record that can no longer be read,
        or is no longer what it was."""
        return [self._build(part) for part in parts]

    def read(self, draw: Draw) -> Document | SkippedSample:
        """A whole document at once."""
        draft = self._draft(draw)
        return self._decode(draft, draw) if isinstance(draft, Draft) else draft

    def _build(self, part: Part) -> Document | SkippedSample:
        draft = self._draft(part.draw)
        found = measure(draft) if isinstance(draft, Draft) else draft
        if isinstance(draft, Draft) and found == part.measured:
            whole = part.high - part.low == len(draft.document)
            made = self._decode(draft if whole else draft.piece(part.low, part.high), part.draw)
            if isinstance(made, Document) or made.cause not in READING_CAUSES:
                return made
            found = made
        raise Unlike(part.measured, found)

    def _draft(self, draw: Draw) -> Draft | SkippedSample:
        try:
            return self.encoder.draft(self.sources[draw.source][draw.record], draw.mode, draw.keep)
        except BadRecord as error:
            return SkippedSample(draw.source, draw.record, error.cause, error.detail)

    def _decode(self, draft: Draft, draw: Draw) -> Document | SkippedSample:
        try:
            return draft.decode(self.encoder.image.side, self.encoder.limits)
        except BadRecord as error:
            return SkippedSample(draw.source, draw.record, error.cause, error.detail)


def measure(draft: Draft) -> Measured:
    document = draft.document
    return Measured(
        document.source,
        document.record,
        len(document),
        tuple((int(low), int(high)) for low, high in document.spans),
        tuple(grid.num_tiles for grid in draft.grids),
        zlib.crc32(document.targets.tobytes(), zlib.crc32(document.tokens.tobytes())),
    )
